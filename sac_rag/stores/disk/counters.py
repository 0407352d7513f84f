"""Counts that a store keeps across processes. Knows nothing of what they count."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter

from sac_rag.stores.disk.index import Index

_PREFIX = "count."
# Counting every read on disk would cost more than the read.
_FLUSH_SECONDS = 30.0
_FLUSH_COUNTS = 1000


class Tally:
    """Counts in memory, added to those in the index now and then, and when the store is closed.

    A killed process loses what it counted since. Shared by threads; after a fork, the child
    counts from zero.
    """

    def __init__(self, index: Index, read_only: bool) -> None:
        self._index = index
        self._read_only = read_only
        self._lock = threading.Lock()
        self._pending: Counter[str] = Counter()
        self._flushed = time.monotonic()
        self._pid = os.getpid()

    def count(self, name: str) -> None:
        """Counts one more."""
        with self._lock:
            self._mine()[name] += 1
            due = (
                self._pending.total() >= _FLUSH_COUNTS
                or time.monotonic() - self._flushed > _FLUSH_SECONDS
            )
        if due:
            self.flush()

    def flush(self) -> None:
        """Writes the counts down, if the index can be written just now."""
        with self._lock:
            pending, self._pending = self._mine(), Counter()
            self._flushed = time.monotonic()
        if self._read_only or not pending:
            return
        done = False
        with self._index.at_once_or_not():
            self.add(dict(pending))
            done = True
        if not done:
            with self._lock:
                self._pending.update(pending)

    def add(self, counts: dict[str, int]) -> None:
        """Adds counts to those in the index now, with the transaction that is open, if one is."""
        rows = ", ".join("(?, ?)" for _ in counts)
        values = [part for name, n in counts.items() for part in (_PREFIX + name, n)]
        self._index.sql(
            f"INSERT INTO Meta VALUES {rows} "  # noqa: S608 (nothing but question marks)
            "ON CONFLICT (name) DO UPDATE SET value = CAST(value AS INTEGER) + excluded.value",
            tuple(values),
        )

    def totals(self) -> Counter[str]:
        """All counts: those of other processes that are written down, and one's own."""
        select = "SELECT name, CAST(value AS INTEGER) FROM Meta WHERE name GLOB ?"
        rows = self._index.sql(select, (_PREFIX + "*",)).fetchall()
        totals = Counter({name[len(_PREFIX) :]: int(value or 0) for name, value in rows})
        with self._lock:
            totals.update(self._mine())
        return totals

    def _mine(self) -> Counter[str]:
        if self._pid != os.getpid():
            self._pid, self._pending = os.getpid(), Counter()
        return self._pending
