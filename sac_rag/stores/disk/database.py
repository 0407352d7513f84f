"""The SQLite file of a DiskStore's index: tables, connections and transactions."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import diskcache
from diskcache.core import DBNAME, DEFAULT_SETTINGS, METADATA

VERSION = 3
LOCK_SECONDS = 60
# Readers wait only for a writer that is just opening or closing the file.
_READ_LOCK_SECONDS = 2
# Passed in full: none is taken from the folder, see _drop_settings.
_SETTINGS = {
    **DEFAULT_SETTINGS,
    "eviction_policy": "least-recently-used",  # makes the SQL index on access_time
    "sqlite_mmap_size": 0,  # a file cut short would end the process with SIGBUS
}
# diskcache's own table Cache says of an entry, and we use: key, size, filename, store_time,
# access_time, and tag: not NULL where the entry is pinned.
_TABLES = """
CREATE TABLE IF NOT EXISTS Owner (
    document BLOB NOT NULL,       -- an id, as Index._seal encodes it
    key TEXT NOT NULL,
    PRIMARY KEY (document, key)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS Owner_key ON Owner (key);
CREATE TABLE IF NOT EXISTS Origin (
    key TEXT PRIMARY KEY,
    text_id TEXT,                 -- the same for the text under every fingerprint
    fingerprint TEXT,
    num_tokens INTEGER,           -- of the chunk; NULL where format 2 wrote the entry
    num_entries INTEGER,          -- of its KV, in all heads together
    num_heads INTEGER             -- KV heads of all layers together
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS Origin_text_id ON Origin (text_id);
CREATE TABLE IF NOT EXISTS Departed (
    number INTEGER PRIMARY KEY,   -- grows, so that the oldest can be dropped
    digest BLOB NOT NULL UNIQUE,  -- of a key that is no longer there
    reason TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS Meta (
    name TEXT PRIMARY KEY,        -- salt, cipher, and counters
    value
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS Cache_evictable ON Cache (access_time) WHERE tag IS NULL;
"""


_State: TypeAlias = tuple[int, tuple[int, ...] | None]


class Database:
    """Connections to an existing file, one per thread and process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()

    @property
    def nbytes(self) -> int:
        """Bytes of the file and its log."""
        return sum(path.stat().st_size for path in self.path.parent.glob(f"{self.path.name}*"))

    def sql(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Executes a statement on this thread's connection."""
        return self._connection.execute(statement, values)

    def close(self) -> None:
        """Closes this thread's connection; the next statement opens another one."""
        connection = getattr(self._local, "connection", None)
        self._local.connection = self._local.state = None
        if connection is not None:
            connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block takes effect or none of it, and stays in effect after a power cut.

        Waits up to a minute for other transactions.
        """
        connection = self._connection
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
    def best_effort(self) -> Iterator[None]:
        """For hints: the block neither waits nor fails where the file is locked or the disk full.

        A power cut may undo it.
        """
        self.sql("PRAGMA synchronous = NORMAL")
        self.sql("PRAGMA busy_timeout = 0")
        try:
            with contextlib.suppress(sqlite3.OperationalError):
                yield
        finally:
            self.sql(f"PRAGMA busy_timeout = {LOCK_SECONDS * 1000}")

    def rewrite(self) -> bool:
        """Leaves no byte of deleted rows in file and log; False if readers hold the log.

        SQLite's secure_delete would not do: it leaves the copies that are in pages whose contents
        were moved to others before.
        """
        self.sql("VACUUM")
        busy, _, _ = self.sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    @property
    def _connection(self) -> sqlite3.Connection:
        state = self._state()
        if getattr(self._local, "state", None) != state:
            self.close()
            self._local.connection = self._connect(state)
            self._local.state = state
        connection: sqlite3.Connection = self._local.connection
        return connection

    def _state(self) -> _State:
        """Where this changes, the connection cannot be used any longer."""
        return os.getpid(), None  # SQLite's connections must not cross a fork

    def _connect(self, state: _State) -> sqlite3.Connection:
        connection = _connect(self.path, LOCK_SECONDS)
        try:
            for pragma in ("cache_size", "mmap_size"):
                connection.execute(f"PRAGMA {pragma} = {_SETTINGS[f'sqlite_{pragma}']}")
        except BaseException:
            connection.close()
            raise
        return connection


class ReadOnlyDatabase(Database):
    """The same file, read without writing so much as a lock file where nobody else writes.

    SQLite must write beside a database that it shares with a writer. As long as there is no
    writer, the file is opened as immutable; before every use the traces of a writer are looked
    for, and the file is reopened if there are any.
    """

    def _state(self) -> _State:
        """The process, and the file's state if nobody has it open for writing."""
        path = str(self.path)
        if os.path.exists(f"{path}-shm") or _size(f"{path}-wal"):  # noqa: PTH110 (5 times faster)
            return os.getpid(), None
        stat = os.stat(path)  # noqa: PTH116
        return os.getpid(), (stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def _connect(self, state: _State) -> sqlite3.Connection:
        _, unshared = state
        uri = f"{self.path.as_uri()}?{'mode=ro' if unshared is None else 'immutable=1'}"
        return _connect(uri, _READ_LOCK_SECONDS)


def open_database(folder: Path, max_bytes: int, read_only: bool) -> Database:
    """Opens the file in a folder; made with its tables, or upgraded, unless it may only be read.

    Raises:
        sqlite3.Error: if that fails.
    """
    path = folder / DBNAME
    database = ReadOnlyDatabase(path) if read_only else Database(path)
    try:
        if read_only:
            _require_version(database)
        else:
            with _cache_table(path, max_bytes):
                _upgrade(database)
    except BaseException:
        database.close()
        raise
    return database


def _connect(path: Path | str, lock_seconds: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=lock_seconds, isolation_level=None, uri=isinstance(path, str)
    )
    # What others wrote into the tables need not be UTF-8.
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


@contextlib.contextmanager
def _cache_table(path: Path, max_bytes: int) -> Iterator[None]:
    """Has diskcache make its tables, triggers and SQL indexes, unless they are there."""
    if path.exists():
        _drop_settings(path)
    settings = {**_SETTINGS, "size_limit": max_bytes}
    try:
        cache = diskcache.Cache(str(path.parent), timeout=LOCK_SECONDS, **settings)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise sqlite3.DatabaseError(f"its settings are not diskcache's: {error}") from error
    # Open while the block lasts: SQLite rewrites its log when the last connection is closed.
    with contextlib.closing(cache):
        yield


def _drop_settings(path: Path) -> None:
    """Deletes all settings, whoever wrote them; diskcache then writes those it is called with.

    It would make attributes, arguments and PRAGMA statements of every row in its table of
    settings. Rows of METADATA, which triggers update, become attributes and nothing else.
    """
    marks = ", ".join("?" * len(METADATA))
    delete = f"DELETE FROM Settings WHERE typeof(key) != 'text' OR key NOT IN ({marks})"  # noqa: S608 (nothing but question marks)
    with contextlib.closing(_connect(path, LOCK_SECONDS)) as connection:
        try:
            connection.execute(delete, tuple(METADATA))
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise


def _upgrade(database: Database) -> None:
    """Makes our tables, unless they are there.

    A store of format 1 kept an entry's documents as a JSON list in diskcache's tag. One of format
    2 did not record the extent of an entry.
    """
    if _version(database) == VERSION:
        return
    with database.transaction():
        version = _version(database)  # another may have been faster
        if version == 2:
            for column in ("num_tokens", "num_entries", "num_heads"):
                database.sql(f"ALTER TABLE Origin ADD COLUMN {column} INTEGER")
        elif version != VERSION:
            for statement in _TABLES.split(";\n"):
                database.sql(statement)
            tagged = "SELECT CAST(key AS TEXT), CAST(tag AS TEXT) FROM Cache WHERE tag IS NOT NULL"
            for key, tag in database.sql(tagged).fetchall():
                for document in _documents_of_format_1(tag):
                    database.sql("INSERT OR IGNORE INTO Owner VALUES (?, ?)", (document, key))
            database.sql("UPDATE Cache SET tag = NULL WHERE tag IS NOT NULL")
            # Format 1 had no encryption.
            database.sql(
                "INSERT OR IGNORE INTO Meta SELECT 'cipher', '' WHERE EXISTS (SELECT 1 FROM Cache)"
            )
            salt = secrets.token_bytes(32)
            database.sql("INSERT OR IGNORE INTO Meta VALUES ('salt', ?)", (salt,))
        database.sql(f"PRAGMA user_version = {VERSION}")


def _require_version(database: Database) -> None:
    try:
        version = _version(database)
    except sqlite3.OperationalError as error:
        raise sqlite3.OperationalError(
            f"it cannot be opened without writing: {error}; if its writer was killed, open "
            "the store once with write permission"
        ) from error
    if version != VERSION:
        raise sqlite3.DatabaseError(
            f"its tables are of version {version}, expected {VERSION}; if the store is "
            "older, open it once with write permission"
        )


def _version(database: Database) -> int:
    return int(database.sql("PRAGMA user_version").fetchone()[0])


def _documents_of_format_1(tag: str) -> list[bytes]:
    try:
        names = json.loads(tag)
    except (ValueError, RecursionError):
        return []
    if not isinstance(names, list):
        return []
    return [name.encode("utf-8", "surrogatepass") for name in names if isinstance(name, str)]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except FileNotFoundError:
        return 0
