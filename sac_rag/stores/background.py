"""Background: a thread for the work of a store that nobody waits for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from sac_rag import forks


class Background:
    """Does work in one thread, in the order it is submitted. May be shared by threads.

    A forked child has a thread of its own, and none of the parent's work.

    Args:
        name: Of the thread.
        most_pending: Most pieces of work that are waiting or being done.
    """

    def __init__(self, name: str, most_pending: int) -> None:
        self._name = name
        self._most_pending = most_pending
        self._pool: ThreadPoolExecutor | None = None
        self._renew()
        forks.in_child(self, Background._renew)

    def submit(self, work: Callable[[], None]) -> Future[None] | None:
        """Does something later; None where as much is pending as may be."""
        with self._lock:
            if len(self._pending) >= self._most_pending:
                return None
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, self._name)
            future = self._pool.submit(work)
            self._pending.add(future)
        future.add_done_callback(self._ended)
        return future

    def flush(self) -> None:
        """Waits until all is done that was submitted so far."""
        while True:
            with self._lock:
                pending = list(self._pending)
            if not pending:
                return
            for future in pending:
                with contextlib.suppress(CancelledError):
                    future.result()

    def close(self) -> None:
        """Drops the work that has not begun, and ends the thread; later work starts another."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _ended(self, future: Future[None]) -> None:
        with self._lock:
            self._pending.discard(future)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._pool = None
        self._pending: set[Future[None]] = set()
