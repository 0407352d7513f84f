"""The SQLite file of a DiskStore's index: tables, connections and transactions."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import diskcache
from diskcache.core import DBNAME, DEFAULT_SETTINGS, METADATA

from sac_rag import forks

VERSION = 3
# Longest wait for others that write.
LOCK_SECONDS = 60.0
# In the path of an answer, which does not need what is written.
BRIEF_SECONDS = 1.0
# Readers wait only for a writer that is just opening or closing the file.
_READ_LOCK_SECONDS = 2.0
_CHECKPOINT_MS = 500  # of waiting inside of SQLite, which keeps new writers out meanwhile
SIDE_FILES = ("", "-wal", "-shm", "-journal")
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


# Process, inode, and what is known of a file that nobody writes.
_State: TypeAlias = tuple[int, int, tuple[int, ...] | None]
_Result = TypeVar("_Result")


class Connection(sqlite3.Connection):
    """A connection that is closed before a fork.

    A child must not inherit one: SQLite's locks on a file are the process's, and would be in the
    child's memory without being the child's.
    """

    is_open = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_open = True
        forks.before(self, Connection.close)

    def close(self) -> None:
        """Closes it, in any thread."""
        with forks.held_off():
            self.is_open = False
            super().close()

    def __del__(self) -> None:  # at the end of its thread
        if self.is_open:
            self.close()


class Database:
    """Connections to an existing file, one per thread, closed before a fork.

    A folder that was moved or deleted is a FileNotFoundError of every statement outside of a
    transaction; where another index is at the path by now, it is opened.
    """

    lock_seconds = LOCK_SECONDS

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._is_stuck = False

    @property
    def nbytes(self) -> int:
        """Bytes of the file and its log."""
        return sum(path.stat().st_size for path in self.path.parent.glob(f"{self.path.name}*"))

    def sql(
        self, statement: str, values: tuple[Any, ...] = (), patience_s: float | None = None
    ) -> list[Any]:
        """Executes a statement on this thread's connection; all of its rows.

        Waits for locks here and not in SQLite, where no Ctrl-C would end the waiting.

        Args:
            statement: One statement.
            values: Of its question marks.
            patience_s: Longest wait for others. Default: `lock_seconds`.
        """
        return self._patiently(
            lambda: self._connection.execute(statement, values).fetchall(), patience_s
        )

    def close(self) -> None:
        """Closes this thread's connection; the next statement opens another one."""
        connection: Connection | None = getattr(self._local, "connection", None)
        self._local.connection = self._local.state = None
        if connection is not None:
            connection.close()

    def transaction(
        self,
        patience_s: float | None = None,
        *,
        flush: bool = True,
        check: Callable[[], None] | None = None,
    ) -> Connection:
        """Begins a transaction, which `with` ends: all of its block takes effect or none of it.

        What is returned is the connection, because its exit is C code: no Ctrl-C can come between
        the block and COMMIT or ROLLBACK, as it can where the exit is Python. For the same reason
        the caller holds off forks: `with forks.held_off(), database.transaction():`.

        Args:
            patience_s: Longest wait for others. Default: `lock_seconds`.
            flush: Whether it stays in effect after a power cut.
            check: Called in the transaction; may raise.

        Raises:
            sqlite3.OperationalError: if others write for longer than it waits.
        """
        connection = self._patiently(lambda: self._connection, patience_s)
        connection.rollback()
        try:
            # Flushing each commit takes 0.4 ms; diskcache's setting flushes at checkpoints only.
            self.sql(f"PRAGMA synchronous = {'FULL' if flush else 'NORMAL'}")
            self._begin(patience_s)
            if check is not None:
                check()
            return connection
        except BaseException:
            connection.rollback()
            raise

    def best_effort(self, work: Callable[[], object]) -> bool:
        """Writes hints, without waiting; False where the file is locked or cannot be written.

        A power cut may undo it.
        """
        try:
            with forks.held_off(), self.transaction(patience_s=0, flush=False):
                work()
        except (sqlite3.OperationalError, OSError):
            return False
        return True

    def rewrite(self) -> bool:
        """Leaves no byte of deleted rows in file and log; False if readers hold the log.

        SQLite's secure_delete would not do: it leaves the copies that are in pages whose contents
        were moved to others before.
        """
        self.sql("VACUUM")
        deadline = time.monotonic() + self.lock_seconds
        try:
            self.sql(f"PRAGMA busy_timeout = {_CHECKPOINT_MS}")
            while True:
                # Busy at once, however long it may wait, where another checkpoint is running.
                [(busy, _, _)] = self.sql("PRAGMA wal_checkpoint(TRUNCATE)")
                if not busy or time.monotonic() >= deadline:
                    break
                time.sleep(0.01)
            self.sql("PRAGMA busy_timeout = 0")
        except BaseException:
            self.close()
            raise
        return not busy

    def require_file(self) -> None:
        """Raises FileNotFoundError if the file of this thread's connection is not at its path."""
        if self._local.state[1] != _inode(self.path):
            raise _gone(self.path)

    @property
    def brief_s(self) -> float:
        """Patience of a write in an answer's path: none where the last such wait was in vain."""
        return 0.0 if self._is_stuck else BRIEF_SECONDS

    def _begin(self, patience_s: float | None) -> None:
        try:
            self.sql("BEGIN IMMEDIATE", patience_s=patience_s)
        except sqlite3.OperationalError:
            self._is_stuck = self._is_stuck or patience_s != 0
            raise
        self._is_stuck = False

    def _patiently(self, attempt: Callable[[], _Result], patience_s: float | None) -> _Result:
        patience_s = self.lock_seconds if patience_s is None else patience_s
        deadline, pause_s = None, 0.001
        while True:
            try:
                with forks.held_off():
                    return attempt()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or self._in_transaction:
                    raise
                deadline = deadline or time.monotonic() + patience_s
                if time.monotonic() >= deadline:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)

    @property
    def _in_transaction(self) -> bool:
        connection: Connection | None = getattr(self._local, "connection", None)
        return connection is not None and connection.is_open and connection.in_transaction

    @property
    def _connection(self) -> Connection:
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is not None and self._in_transaction:
            return connection  # of this block, whatever happens to the folder
        state = self._state()
        if connection is None or not connection.is_open or self._local.state != state:
            self.close()
            connection = self._local.connection = self._connect(state)
            self._local.state = state
        return connection

    def _state(self) -> _State:
        """Where this changes, the connection cannot be used any longer."""
        return os.getpid(), _inode(self.path), None

    def _connect(self, state: _State) -> Connection:
        connection = _connect(self.path)
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

    lock_seconds = _READ_LOCK_SECONDS

    def _state(self) -> _State:
        """The process, the file, and the file's state if nobody has it open for writing."""
        path = str(self.path)
        if os.path.exists(f"{path}-shm") or _size(f"{path}-wal"):  # noqa: PTH110 (5 times faster)
            return os.getpid(), _inode(self.path), None
        inode = _inode(self.path)
        status = os.stat(path)  # noqa: PTH116
        return os.getpid(), inode, (status.st_size, status.st_mtime_ns)

    def _connect(self, state: _State) -> Connection:
        *_, unshared = state
        return _connect(
            self.path, f"{self.path.as_uri()}?{'mode=ro' if unshared is None else 'immutable=1'}"
        )


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
            with forks.held_off(), _cache_table(database, max_bytes):
                _upgrade(database)
    except BaseException:
        database.close()
        raise
    return database


def require_plain_files(path: Path) -> None:
    """Refuses an index that is, or whose log is, a link or anything else that is no plain file.

    Raises:
        OSError: naming what is there.
    """
    for suffix in SIDE_FILES:
        name = path.with_name(path.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(name.lstat().st_mode):
                raise OSError(
                    errno.EINVAL, "a store's index must be a plain file and was not opened", name
                )


def _connect(path: Path, uri: str | None = None) -> Connection:
    require_plain_files(path)
    connection = sqlite3.connect(
        path if uri is None else uri,
        timeout=0,
        isolation_level=None,
        check_same_thread=False,  # closed by a thread that forks
        factory=Connection,
        uri=uri is not None,
    )
    # What others wrote into the tables need not be UTF-8.
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


@contextlib.contextmanager
def _cache_table(database: Database, max_bytes: int) -> Iterator[None]:
    """Has diskcache make its tables, triggers and SQL indexes, unless they are there."""
    path = database.path
    require_plain_files(path)
    if path.exists():
        _drop_settings(database)
    settings = {**_SETTINGS, "size_limit": max_bytes}
    try:
        cache = diskcache.Cache(str(path.parent), timeout=LOCK_SECONDS, **settings)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise sqlite3.DatabaseError(f"its settings are not diskcache's: {error}") from error
    # Open while the block lasts: SQLite rewrites its log when the last connection is closed.
    with contextlib.closing(cache):
        yield


def _drop_settings(database: Database) -> None:
    """Deletes all settings, whoever wrote them; diskcache then writes those it is called with.

    It would make attributes, arguments and PRAGMA statements of every row in its table of
    settings. Rows of METADATA, which triggers update, become attributes and nothing else.
    """
    marks = ", ".join("?" * len(METADATA))
    delete = f"DELETE FROM Settings WHERE typeof(key) != 'text' OR key NOT IN ({marks})"  # noqa: S608 (nothing but question marks)
    # The connection stays open, so that SQLite does not rewrite its log when diskcache's is closed.
    try:
        database.sql(delete, tuple(METADATA))
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
    with forks.held_off(), database.transaction():
        version = _version(database)  # another may have been faster
        if version == 2:
            for column in ("num_tokens", "num_entries", "num_heads"):
                database.sql(f"ALTER TABLE Origin ADD COLUMN {column} INTEGER")
        elif version != VERSION:
            for statement in _TABLES.split(";\n"):
                database.sql(statement)
            tagged = "SELECT CAST(key AS TEXT), CAST(tag AS TEXT) FROM Cache WHERE tag IS NOT NULL"
            for key, tag in database.sql(tagged):
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
    return int(database.sql("PRAGMA user_version")[0][0])


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


def _inode(path: Path) -> int:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        raise _gone(path) from None


def _gone(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        errno.ENOENT,
        "the index of the store is gone; if its folder was moved, open it where it is now",
        os.fspath(path),
    )
