"""The index of a DiskStore that is only read. Knows nothing of the files."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

from sac_rag.stores.disk import database as schema
from sac_rag.stores.disk.index import Index, readable

# Readers wait for nobody but a writer that is just opening or closing the file.
_LOCK_SECONDS = 2


class ReadOnlyIndex(Index):
    """The same table, read without writing so much as a lock file where nobody else writes.

    SQLite needs to write beside a database that it shares with a writer. As long as there is no
    writer, the file is opened as immutable; what shows that one has come is looked at before
    every use, and the file opened anew.
    """

    def __init__(self, folder: Path) -> None:
        # Not diskcache's own, which writes settings and tables.
        self._directory = str(folder)
        self._local = threading.local()
        self.size_limit = 0
        try:
            version = self.sql("PRAGMA user_version").fetchone()[0]
        except sqlite3.OperationalError as error:
            raise sqlite3.OperationalError(
                f"it cannot be opened without writing: {error}; if its writer was killed, open "
                "the store once with write permission"
            ) from error
        if version != schema.VERSION:
            raise sqlite3.DatabaseError(
                f"its tables are of version {version}, expected {schema.VERSION}; if the store is "
                "older, open it once with write permission"
            )

    @property
    def _con(self) -> sqlite3.Connection:
        state = self._state()
        if getattr(self._local, "state", None) != state:
            self.close()
            self._local.con = self._connect(immutable=state[1] is not None)
            self._local.state = state
        connection: sqlite3.Connection = self._local.con
        return connection

    def _state(self) -> tuple[int, Any]:
        """The process, and the file's state if nobody has it open for writing."""
        path = str(self.path)
        if os.path.exists(f"{path}-shm") or _size(f"{path}-wal"):  # noqa: PTH110 (5 times faster)
            return os.getpid(), None
        found = os.stat(path)  # noqa: PTH116
        return os.getpid(), (found.st_ino, found.st_size, found.st_mtime_ns)

    def _connect(self, immutable: bool) -> sqlite3.Connection:
        uri = f"{self.path.as_uri()}?{'immutable=1' if immutable else 'mode=ro'}"
        connection = sqlite3.connect(uri, timeout=_LOCK_SECONDS, isolation_level=None, uri=True)
        connection.text_factory = readable
        return connection


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except FileNotFoundError:
        return 0
