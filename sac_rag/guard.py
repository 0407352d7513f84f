"""Whether a stored chunk is worth loading. Knows nothing of stores, compressors or text."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

_WINDOW = 16  # loads and compressions remembered; what is older says nothing of today's disk
_ENOUGH_LOADS = 8
_ENOUGH_COMPUTING = 2
# Computing takes the model from other threads, so it must be clearly faster.
_MARGIN = 1.5
_PROBE_EVERY = 16  # of the chunks that would be computed, so many apart one is loaded all the same
# A process that only ever loads does not know how fast it computes. Loads this slow, in seconds,
# are worth computing a chunk or two to find out.
_WORTH_A_TRIAL = 0.1


@dataclass(frozen=True)
class _Load:
    chars: int
    tokens: int
    nbytes: int
    seconds: float


class Guard:
    """Learns from a process's own loads and compressions which of the two is faster.

    Loading is taken to cost something fixed and something for each byte, computing something for
    each token. How many bytes and tokens a chunk has is told by its length in characters, for it is
    asked about before it is loaded or tokenized. Safe to share between threads.
    """

    def __init__(self) -> None:
        self._loads: deque[_Load] = deque(maxlen=_WINDOW)
        self._computed: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._passed_over = 0
        self._probing = False
        self._trying = False
        self._lock = threading.Lock()

    def loaded(self, chars: int, tokens: int, nbytes: int, seconds: float) -> None:
        """Notes that a chunk was loaded."""
        with self._lock:
            if self._probing:
                self._probing = False
                if seconds <= _MARGIN * tokens * self._seconds_per_token():
                    # The store has recovered: what it was like before counts no longer.
                    self._loads.clear()
            self._loads.append(_Load(chars, tokens, nbytes, seconds))

    def computed(self, tokens: int, seconds: float) -> None:
        """Notes that chunks of so many tokens in all were computed."""
        with self._lock:
            self._trying = False
            self._computed.append((tokens, seconds))

    def prefers_computing(self, chars: int) -> bool:
        """Whether to compute a stored chunk of so many characters instead of loading it.

        Now and then it says no although it should be yes, so that a store that has become faster is
        noticed; and yes without knowing, where loads are so slow that a trial is worth it.
        """
        with self._lock:
            if len(self._loads) < _ENOUGH_LOADS:
                return False
            load_s = self._load_s(chars)
            if len(self._computed) < _ENOUGH_COMPUTING:
                if self._trying or load_s < _WORTH_A_TRIAL:
                    return False
                self._trying = True
                return True
            tokens = chars * sum(x.tokens for x in self._loads) / sum(x.chars for x in self._loads)
            if load_s <= _MARGIN * tokens * self._seconds_per_token():
                return False
            self._passed_over += 1
            self._probing = self._passed_over % _PROBE_EVERY == 0
            return not self._probing

    def _load_s(self, chars: int) -> float:
        """Seconds that loading will take: a straight line through the loads seen."""
        # But for the slowest: a single hiccup is no slow disk.
        loads = sorted(self._loads, key=lambda load: load.seconds)[:-1]
        nbytes = chars * sum(x.nbytes for x in loads) / sum(x.chars for x in loads)
        mean_bytes = sum(x.nbytes for x in loads) / len(loads)
        mean_s = sum(x.seconds for x in loads) / len(loads)
        spread = sum((x.nbytes - mean_bytes) ** 2 for x in loads)
        together = sum((x.nbytes - mean_bytes) * (x.seconds - mean_s) for x in loads)
        # Neither the fixed part nor the one for each byte can be below nothing.
        per_byte = min(max(together / spread if spread else 0.0, 0.0), mean_s / mean_bytes)
        return mean_s + per_byte * (nbytes - mean_bytes)

    def _seconds_per_token(self) -> float:
        return sum(s for _, s in self._computed) / sum(tokens for tokens, _ in self._computed)
