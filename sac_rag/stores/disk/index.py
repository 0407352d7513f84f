"""The index of a DiskStore: one row an entry, in diskcache's table. Knows nothing of the files."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import diskcache
from diskcache.core import DBNAME, DEFAULT_SETTINGS, ENOVAL, METADATA, MODE_BINARY

from sac_rag.errors import CorruptEntryError
from sac_rag.stores.disk import database as schema
from sac_rag.stores.entry import is_key

# A read renews an entry's last use only when that is this old. Renewing at every read writes at
# every read: 28 instead of 7 microseconds alone, but 8 milliseconds in a hundredth of the reads
# while others write. To a store of gigabytes, a minute is no difference.
_RENEW_SECONDS = 60.0
LOCK_SECONDS = 60

# CAST, since SQLite lets a column hold anything, even text that is not UTF-8. A key that is not a
# key of ours reads as "".
_SELECT = (
    "SELECT rowid, CASE WHEN raw = 1 AND typeof(key) = 'text' AND length(key) BETWEEN 1 AND 64"
    " AND key NOT GLOB '*[^0-9a-f]*' THEN key ELSE '' END, CAST(mode AS INTEGER),"
    " CAST(filename AS BLOB), CAST(size AS INTEGER), CAST(store_time AS REAL), tag IS NOT NULL,"
    " CAST(access_time AS REAL) FROM Cache"
)
_FILE_NAME = re.compile(rb"([0-9a-f]{1,2})/([0-9a-f]{1,64})-[0-9a-f]{16}\.kv")


class Row(NamedTuple):
    """A line of the index as it was found; what it says is checked before it is followed."""

    rowid: int
    key: str
    mode: int | None
    filename: bytes | None
    size: int | None
    stored: float | None
    pinned: int
    used: float | None

    @property
    def name(self) -> str | None:
        """The entry's file, within the folder; None if the row is not one that we wrote."""
        match = _FILE_NAME.fullmatch(self.filename or b"")
        if self.mode != MODE_BINARY or match is None or match[2] != self.key.encode():
            return None
        return match[0].decode() if match[1] == match[2][:2] else None

    def same_entry(self, other: Row | None) -> bool:
        """Whether the other row is of the same bytes: pins and last uses may differ."""
        return other is not None and self[:6] == other[:6]


class NoPickle(diskcache.Disk):  # type: ignore[misc]
    """Lets keys through, if they are hex digests, and shuts diskcache's ways to values and files.

    Its own `Disk` unpickles what a row tells it to (CVE-2025-69872), and reads and deletes
    whatever path a row names. Values are read and written by `Files`.
    """

    def __init__(self, directory: str, **settings: object) -> None:
        super().__init__(directory)

    def put(self, key: object) -> tuple[str, bool]:
        """A key as diskcache's table holds it."""
        if not is_key(key):
            raise ValueError(f"a key must be a lower-case hex digest, was: {key!r:.100}")
        return key, True

    def get(self, key: object, raw: object) -> str:
        """A key out of diskcache's table."""
        if raw != 1 or not is_key(key):
            raise CorruptEntryError("a row whose key is not a hex digest; it was not unpickled")
        return key

    def store(self, *arguments: object, **keywords: object) -> NoReturn:
        """Refuses: diskcache would pickle what it does not know."""
        raise TypeError("entries are written by DiskStore, not through diskcache")

    fetch = store
    filename = store
    remove = store


class Index(diskcache.Cache):  # type: ignore[misc]
    """diskcache's table, with statements of our own.

    diskcache's `set` evicts ten rows at a time, even the one just written; its `get` holds the
    write lock while it reads the file; its retries never end in a folder that is read-only.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._ours = {
            **DEFAULT_SETTINGS,
            "eviction_policy": "least-recently-used",  # makes the SQL index on access_time
            "size_limit": max_bytes,
            "sqlite_mmap_size": 0,  # a file cut short would end the process with SIGBUS
        }
        try:
            super().__init__(folder, timeout=LOCK_SECONDS, disk=NoPickle, **self._ours)
            schema.prepare(self._con)
        except (AttributeError, TypeError, ValueError) as error:
            self.close()
            raise sqlite3.DatabaseError(f"its settings are not diskcache's: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return Path(self._directory, DBNAME)

    def reset(self, key: str, value: Any = ENOVAL, update: bool = True) -> Any:
        """Applies a setting. Whatever the folder's table says, it is one of ours with our value.

        diskcache makes attributes and PRAGMA statements of every row that it finds there.
        """
        if key in self._ours:
            return super().reset(key, self._ours[key], update)
        return super().reset(key) if key in METADATA else None

    @property
    def _con(self) -> sqlite3.Connection:
        connection: sqlite3.Connection = super()._con
        connection.text_factory = readable
        return connection

    def sql(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Executes a statement on this thread's connection."""
        cursor: sqlite3.Cursor = self._con.execute(statement, values)
        return cursor

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What is done inside is done whole or not at all, and stays done after a power cut.

        Waits its turn up to a minute.
        """
        connection = self._con
        # Flushing each commit takes 0.4 ms; diskcache's own setting flushes at checkpoints only.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def at_once_or_not(self) -> Iterator[None]:
        """For hints: what is done inside neither waits nor fails, be the folder busy or full."""
        self.sql("PRAGMA synchronous = NORMAL")  # a power cut may take it back
        self.sql("PRAGMA busy_timeout = 0")
        try:
            with contextlib.suppress(sqlite3.OperationalError):
                yield
        finally:
            self.sql(f"PRAGMA busy_timeout = {LOCK_SECONDS * 1000}")

    def number(self, name: str) -> int:
        """The "count" or "size" that triggers keep up to date."""
        select = "SELECT CAST(value AS INTEGER) FROM Settings WHERE key = ?"
        return int((self.sql(select, (name,)).fetchone() or [0])[0] or 0)

    def row(self, key: object) -> Row | None:
        """The row of a key, or None."""
        if not is_key(key):
            return None
        found = self.sql(_SELECT + " WHERE key = ? AND raw = 1", (key,)).fetchone()
        return None if found is None else Row(*found)

    def rows(self) -> Iterator[Row]:
        """All rows, read a thousand at a time, so that no snapshot is held open meanwhile."""
        last = 0
        select = _SELECT + " WHERE rowid > ? ORDER BY rowid LIMIT 1000"
        while found := self.sql(select, (last,)).fetchall():
            yield from map(Row._make, found)
            last = found[-1][0]

    def insert(self, key: str, name: str, size: int, stored: float | None = None) -> None:
        """Writes a row, in place of the key's if there is one; still pinned if that was."""
        old = self.row(key)
        now = time.time()
        stored = now if stored is None else stored
        if old is None:
            self.sql(
                "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, filename)"
                " VALUES (?, 1, ?, ?, ?, ?, ?)",
                (key, stored, now, size, MODE_BINARY, name),
            )
            return
        self.sql(
            "UPDATE Cache SET store_time = ?, access_time = ?, size = ?, mode = ?, filename = ?,"
            " value = NULL WHERE rowid = ?",
            (stored, now, size, MODE_BINARY, name, old.rowid),
        )

    def delete(self, row: Row) -> bytes | None:
        """Deletes a row; returns what it held in place of a file, which no row of ours does."""
        select = "SELECT CAST(value AS BLOB) FROM Cache WHERE rowid = ?"
        inline: bytes | None = self.sql(select, (row.rowid,)).fetchone()[0]
        self.sql("DELETE FROM Cache WHERE rowid = ?", (row.rowid,))
        return inline

    def least_recently_used(self, but: str) -> Row | None:
        """The row to evict next: not one that is pinned, nor that of the key given."""
        select = _SELECT + " WHERE tag IS NULL AND key != ? ORDER BY access_time LIMIT 1"
        found = self.sql(select, (but,)).fetchone()
        return None if found is None else Row(*found)

    def pin(self, key: str, pinned: bool) -> bool:
        """Keeps an entry from eviction, or no longer; False if there is none."""
        update = "UPDATE Cache SET tag = ? WHERE key = ? AND raw = 1"
        return self.sql(update, ("pinned" if pinned else None, key)).rowcount > 0

    def renew(self, row: Row) -> None:
        """Notes that an entry was used, if that was last noted a while ago."""
        now = time.time()
        if row.used is None or abs(now - row.used) >= _RENEW_SECONDS:
            with self.at_once_or_not():
                self.sql("UPDATE Cache SET access_time = ? WHERE rowid = ?", (now, row.rowid))

    def meta(self, name: str) -> Any:
        """A value of the store's own, or None."""
        found = self.sql("SELECT value FROM Meta WHERE name = ?", (name,)).fetchone()
        return None if found is None else found[0]

    def set_meta(self, name: str, value: object) -> None:
        """Keeps a value of the store's own."""
        self.sql("INSERT OR REPLACE INTO Meta VALUES (?, ?)", (name, value))

    def rewrite(self) -> bool:
        """Leaves no byte of what was deleted in file and log; False if readers keep the log.

        SQLite's secure_delete would not do: it leaves the copies that are in pages whose contents
        were moved to others before.
        """
        self.sql("VACUUM")
        busy, _, _ = self.sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy


def readable(text: bytes) -> str:
    """Text as SQLite gives it, whatever it holds."""
    # What others wrote into the table need not be UTF-8.
    return text.decode(errors="replace")
