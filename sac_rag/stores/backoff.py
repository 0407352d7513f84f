"""Backoff: after a server has failed, one caller at a time tries it, and the others do not wait."""

from __future__ import annotations

import time
from collections.abc import Callable

from sac_rag import forks


class Backoff:
    """Admits calls to a server that may fail. Safe to share between threads.

    Args:
        first_s: Seconds without calls after a first failure; each further one doubles them.
        most_s: Most seconds without calls.
        clock: Seconds since any moment.
    """

    def __init__(
        self, first_s: float, most_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.first_s, self.most_s = first_s, most_s
        self._clock = clock
        self._pause_s = 0.0  # 0 while the server is believed to answer
        self._until = 0.0
        self._lock = forks.lock(self, "_lock")

    def admits(self) -> bool:
        """Whether to call the server now; of several callers after a failure, one is admitted."""
        with self._lock:
            if not self._pause_s:
                return True
            if self._clock() < self._until:
                return False
            # This call is a trial. Until it has ended, others are refused for another pause.
            self._pause_s = min(2 * self._pause_s, self.most_s)
            self._until = self._clock() + self._pause_s
            return True

    def failed(self) -> None:
        """Records that a call has failed."""
        with self._lock:
            self._pause_s = self._pause_s or self.first_s
            self._until = self._clock() + self._pause_s

    def succeeded(self) -> None:
        """Records that a call was answered."""
        self._pause_s = 0.0
