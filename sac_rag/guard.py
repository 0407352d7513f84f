"""Guard: measures whether a stored chunk is loaded faster than it is computed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sac_rag import forks

_WINDOW = 16  # loads and compressions remembered; older ones do not describe today's disk
_ENOUGH_LOADS = 8
_ENOUGH_COMPUTING = 2
# Computing takes the model from other threads, so it must be clearly faster.
_MARGIN = 1.5
_PROBE_EVERY = 16  # every 16th chunk that would be computed is loaded, to notice a faster store
# A process that has only loaded has no measurement of computing. Where loads take at least this
# long, in seconds, it computes a chunk or two to get one.
_WORTH_A_TRIAL = 0.1


@dataclass(frozen=True)
class _Load:
    chars: int
    tokens: int
    nbytes: int
    seconds: float


class Guard:
    """Estimates from the process's loads and compressions which of the two is faster.

    The model: loading costs a fixed time and a time per byte, computing a time per token. Bytes and
    tokens of a chunk are estimated from its length in characters, because the decision comes before
    it is loaded or tokenized. Safe to share between threads.
    """

    def __init__(self) -> None:
        self._loads: deque[_Load] = deque(maxlen=_WINDOW)
        self._computed: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._passed_over = 0
        self._probing = False
        self._trial_in = 0  # chunks to load before a trial, which an interrupt may have ended
        self._lock = forks.lock(self, "_lock")

    def loaded(self, chars: int, tokens: int, nbytes: int, seconds: float) -> None:
        """Records a load."""
        with self._lock:
            if self._probing:
                self._probing = False
                if seconds <= _MARGIN * tokens * self._seconds_per_token():
                    # The store has recovered: earlier loads no longer describe it.
                    self._loads.clear()
            self._loads.append(_Load(chars, tokens, nbytes, seconds))

    def computed(self, tokens: int, seconds: float) -> None:
        """Records a compression of chunks with this total of tokens."""
        with self._lock:
            self._trial_in = 0
            self._computed.append((tokens, seconds))

    def prefers_computing(self, chars: int) -> bool:
        """Whether to compute a stored chunk of this length instead of loading it.

        Two answers serve measurement: False for every 16th chunk that should be computed, which
        notices a store that has become faster; and True without a measurement of computing where
        loads are so slow that a trial is worth it.
        """
        with self._lock:
            if len(self._loads) < _ENOUGH_LOADS:
                return False
            load_s = self._load_s(chars)
            if len(self._computed) < _ENOUGH_COMPUTING:
                self._trial_in = max(0, self._trial_in - 1)
                if self._trial_in or load_s < _WORTH_A_TRIAL:
                    return False
                self._trial_in = _PROBE_EVERY
                return True
            tokens = chars * sum(x.tokens for x in self._loads) / sum(x.chars for x in self._loads)
            if load_s <= _MARGIN * tokens * self._seconds_per_token():
                return False
            self._passed_over += 1
            self._probing = self._passed_over % _PROBE_EVERY == 0
            return not self._probing

    def _load_s(self, chars: int) -> float:
        """Expected seconds of a load: a straight line through the recorded loads."""
        # Without the slowest: one outlier does not mean a slow disk.
        loads = sorted(self._loads, key=lambda load: load.seconds)[:-1]
        nbytes = chars * sum(x.nbytes for x in loads) / sum(x.chars for x in loads)
        mean_bytes = sum(x.nbytes for x in loads) / len(loads)
        mean_s = sum(x.seconds for x in loads) / len(loads)
        spread = sum((x.nbytes - mean_bytes) ** 2 for x in loads)
        together = sum((x.nbytes - mean_bytes) * (x.seconds - mean_s) for x in loads)
        # Neither the fixed part nor the part per byte can be negative.
        per_byte = min(max(together / spread if spread else 0.0, 0.0), mean_s / mean_bytes)
        return mean_s + per_byte * (nbytes - mean_bytes)

    def _seconds_per_token(self) -> float:
        return sum(s for _, s in self._computed) / sum(tokens for tokens, _ in self._computed)
