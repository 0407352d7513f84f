"""The index of a DiskStore: one row an entry, in diskcache's table. Knows nothing of the files."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import diskcache
from diskcache.core import DEFAULT_SETTINGS, ENOVAL, METADATA, MODE_BINARY

from sac_rag.errors import CorruptEntry
from sac_rag.stores.entry import is_key

# A read renews an entry's last use only when that is this old. Renewing at every read writes at
# every read: 28 instead of 7 microseconds alone, but 8 milliseconds in a hundredth of the reads
# while others write. To a store of gigabytes, a minute is no difference.
_RENEW_SECONDS = 60.0
_LOCK_SECONDS = 60

# CAST, since SQLite lets a column hold anything, even text that is not UTF-8. A key that is not a
# key of ours reads as "".
_SELECT = (
    "SELECT rowid, CASE WHEN raw = 1 AND typeof(key) = 'text' AND length(key) BETWEEN 1 AND 64"
    " AND key NOT GLOB '*[^0-9a-f]*' THEN key ELSE '' END, CAST(mode AS INTEGER),"
    " CAST(filename AS BLOB), CAST(size AS INTEGER), CAST(tag AS BLOB), CAST(access_time AS REAL)"
    " FROM Cache"
)
_FILE_NAME = re.compile(rb"([0-9a-f]{1,2})/([0-9a-f]{1,64})-[0-9a-f]{16}\.kv")


class Row(NamedTuple):
    """A line of the index as it was found; what it says is checked before it is followed."""

    rowid: int
    key: str
    mode: int | None
    filename: bytes | None
    size: int | None
    tag: bytes | None
    used: float | None

    @property
    def name(self) -> str | None:
        """The entry's file, within the folder; None if the row is not one that we wrote."""
        match = _FILE_NAME.fullmatch(self.filename or b"")
        if self.mode != MODE_BINARY or match is None or match[2] != self.key.encode():
            return None
        return match[0].decode() if match[1] == match[2][:2] else None

    def documents(self, strict: bool = False) -> frozenset[str]:
        """The ids noted for the entry; if they cannot be read, none, or a `CorruptEntry`."""
        try:
            return document_ids(json.loads(self.tag or b"[]"))
        except (ValueError, TypeError, RecursionError) as error:
            if strict:
                raise CorruptEntry(f"its document ids cannot be read: {error}") from error
            return frozenset()


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
            raise CorruptEntry("a row whose key is not a hex digest; it was not unpickled")
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
        }
        try:
            super().__init__(folder, timeout=_LOCK_SECONDS, disk=NoPickle, **self._ours)
        except (AttributeError, TypeError, ValueError) as error:
            self.close()
            raise sqlite3.DatabaseError(f"its settings are not diskcache's: {error}") from error
        except BaseException:
            self.close()
            raise

    def reset(self, key: str, value: Any = ENOVAL, update: bool = True) -> Any:
        """Applies a setting. Whatever the folder's table says, it is one of ours with our value.

        diskcache makes attributes and PRAGMA statements of every row that it finds there.
        """
        if key in self._ours:
            return super().reset(key, self._ours[key], update)
        return super().reset(key) if key in METADATA else None

    def number(self, name: str) -> int:
        """The "count" or "size" that triggers keep up to date."""
        select = "SELECT CAST(value AS INTEGER) FROM Settings WHERE key = ?"
        return int((self._sql(select, (name,)).fetchone() or [0])[0] or 0)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What is done inside is done whole or not at all; waits its turn up to a minute."""
        connection = self._con
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def row(self, key: object) -> Row | None:
        """The row of a key, or None."""
        if not is_key(key):
            return None
        found = self._sql(_SELECT + " WHERE key = ? AND raw = 1", (key,)).fetchone()
        return None if found is None else Row(*found)

    def rows(self) -> Iterator[Row]:
        """All rows, read a thousand at a time, so that no snapshot is held open meanwhile."""
        last = 0
        select = _SELECT + " WHERE rowid > ? ORDER BY rowid LIMIT 1000"
        while found := self._sql(select, (last,)).fetchall():
            yield from map(Row._make, found)
            last = found[-1][0]

    def insert(self, key: str, name: str, size: int, documents: frozenset[str]) -> list[Row]:
        """Writes a row, keeping its documents; returns the one it replaces, if any."""
        old = self.row(key)
        tag = _tag(documents | (old.documents() if old else frozenset()))
        columns = (None, tag, size, MODE_BINARY, name, None)
        if old is None:
            self._row_insert(key, True, time.time(), columns)
            return []
        self._row_update(old.rowid, time.time(), columns)
        return [old]

    def add_documents(self, key: str, documents: frozenset[str]) -> bool:
        """Notes more documents; False if the key is not there."""
        row = self.row(key)
        if row is not None:
            tag = _tag(documents | row.documents())
            self._sql("UPDATE Cache SET tag = ? WHERE rowid = ?", (tag, row.rowid))
        return row is not None

    def delete(self, row: Row) -> bytes | None:
        """Deletes a row; returns what it held in place of a file, which no row of ours does."""
        select = "SELECT CAST(value AS BLOB) FROM Cache WHERE rowid = ?"
        inline: bytes | None = self._sql(select, (row.rowid,)).fetchone()[0]
        self._sql("DELETE FROM Cache WHERE rowid = ?", (row.rowid,))
        return inline

    def evict(self, kept: str) -> list[Row]:
        """Deletes the least recently used rows, but for one, until the rest fit."""
        select = _SELECT + " WHERE key != ? ORDER BY access_time LIMIT 1"
        evicted = []
        while self.number("size") > self.size_limit:
            oldest = self._sql(select, (kept,)).fetchone()
            if oldest is None:
                break
            evicted.append(Row._make(oldest))
            self.delete(evicted[-1])
        return evicted

    def renew(self, row: Row) -> None:
        """Notes that an entry was used, if that was last noted a while ago."""
        now = time.time()
        if row.used is not None and abs(now - row.used) < _RENEW_SECONDS:
            return
        # Only a hint: a read neither waits nor fails for it, be the folder busy, full or read-only.
        self._sql("PRAGMA busy_timeout = 0")
        with contextlib.suppress(sqlite3.OperationalError):
            self._sql("UPDATE Cache SET access_time = ? WHERE rowid = ?", (now, row.rowid))
        self._sql(f"PRAGMA busy_timeout = {_LOCK_SECONDS * 1000}")

    def problems(self) -> list[str]:
        """What diskcache finds wrong with the table and its files."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            try:
                found = self.check()
            except (diskcache.Timeout, TypeError, ValueError) as error:
                return [f"the index could not be compared with the files: {error!r}"]
        return [str(w.message) for w in found if w.category is not diskcache.EmptyDirWarning]


def _tag(documents: frozenset[str]) -> str | None:
    return json.dumps(sorted(documents)) if documents else None


def document_ids(documents: Iterable[str]) -> frozenset[str]:
    """Document ids as a set, refusing anything but several str."""
    if isinstance(documents, str):
        raise TypeError(f"documents must be several ids, was one str: {documents!r:.100}")
    ids = frozenset(documents)
    if not all(isinstance(name, str) for name in ids):
        raise TypeError(f"document ids must be str, were: {sorted(map(repr, ids))[:3]}")
    return ids
