"""InFlight: what threads compute, each thing in one of them while the others wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from sac_rag import forks

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Computation(Generic[V]):
    """What one thread computes: `result` is set, if it succeeds, before `ended`."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.result: V | None = None


class InFlight(Generic[K, V]):
    """What the threads of a process are computing now. Safe to share between threads.

    Attributes:
        ended: Number of computations that have ended.
    """

    def __init__(self) -> None:
        self.ended = 0
        self._renew()
        # The threads that were computing are not in the child.
        forks.in_child(self, InFlight._renew)

    def compute(
        self, wanted: Iterable[K], compute: Callable[[list[K]], Mapping[K, V]]
    ) -> tuple[dict[K, V], dict[K, V]]:
        """Computes what no other thread is computing, then waits for the rest.

        What another thread fails at, or is interrupted in, is computed here.

        Args:
            wanted: Keys of what is wanted.
            compute: Returns the results of some of the keys; may raise.

        Returns:
            The results computed here, and those of other threads.
        """
        remaining = dict.fromkeys(wanted)
        computed: dict[K, V] = {}
        received: dict[K, V] = {}
        while remaining:
            mine: dict[K, _Computation[V]] = {}
            try:
                theirs = self._claim(remaining, mine)
                if mine:
                    results = compute(list(mine))
                    for key, computation in mine.items():
                        computation.result = computed[key] = results[key]
            finally:
                try:
                    self._end(mine)
                finally:  # again if the first was interrupted: others wait
                    self._end(mine)
            for key, computation in theirs.items():
                computation.ended.wait()
                if computation.result is not None:
                    received[key] = computation.result
            remaining = {key: None for key in theirs if key not in received}
        return computed, received

    def _claim(self, keys: Iterable[K], mine: dict[K, _Computation[V]]) -> dict[K, _Computation[V]]:
        """Enters what nobody computes into `mine`; returns what others do."""
        theirs: dict[K, _Computation[V]] = {}
        with self._lock:
            for key in keys:
                if key in self._running:
                    theirs[key] = self._running[key]
                else:
                    # First into `mine`, which is ended whatever happens.
                    mine[key] = computation = _Computation[V]()
                    self._running[key] = computation
        return theirs

    def _end(self, mine: Mapping[K, _Computation[V]]) -> None:
        with self._lock:
            for key, computation in mine.items():
                if self._running.get(key) is computation:
                    del self._running[key]
                    self.ended += 1
                computation.ended.set()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[K, _Computation[V]] = {}
