"""What a pipeline has done since it was made, in numbers. Knows nothing of how it is done."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sac_rag import telemetry
from sac_rag.misses import name_of


@dataclass(frozen=True)
class Metrics:
    """Numbers of a pipeline's answers; all of them only grow. `asdict` makes it JSON.

    Where OpenTelemetry is installed it gets the same numbers under the same names, each behind
    `sac_rag.`: `sac_rag.misses` has the attribute "reason", and `sac_rag.first_token_seconds` is a
    histogram, with count, sum and maximum.

    Attributes:
        questions: Questions and turns of chats, each row of a batch one.
        failed: Calls that raised.
        hits: Chunks that were read from the store.
        misses: Chunks that were not, by the name of the reason (see `misses.REASONS`).
        loads: Entries read; fewer than hits where a batch has a chunk twice.
        load_seconds: Spent reading the store, misses too.
        load_bytes: Of keys and values read.
        computed_chunks: Chunks compressed because they were missing or slow.
        computed_tokens: Source tokens of them.
        compute_seconds: Spent compressing and storing them.
        store_failures: Writes that failed; the answer went on without.
        evictions: Entries that the store dropped for want of room, precompression's too.
        prompt_tokens: Tokens of plain text in prompts.
        reused_tokens: Those of them that an earlier call has read: the shared prefix.
        generated_tokens: Tokens of answers, their end tokens included.
        first_tokens: Calls that came to a first token; a batch is one call.
        first_token_seconds: Time to the first token, summed over these calls.
        first_token_seconds_max: The longest.
    """

    questions: int = 0
    failed: int = 0
    hits: int = 0
    misses: Mapping[str, int] = field(default_factory=dict)
    loads: int = 0
    load_seconds: float = 0.0
    load_bytes: int = 0
    computed_chunks: int = 0
    computed_tokens: int = 0
    compute_seconds: float = 0.0
    store_failures: int = 0
    evictions: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    first_token_seconds_max: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """Hits among the chunks asked for; None before there were any."""
        asked = self.hits + sum(self.misses.values())
        return self.hits / asked if asked else None

    @property
    def guard_recomputes(self) -> int:
        """Chunks computed although they were stored, because that was measured to be faster."""
        return self.misses.get("slow", 0)


class Meter:
    """Adds up what `Metrics` shows. Safe to share between threads.

    Args:
        evictions: Of the store so far: only later ones are counted.
    """

    def __init__(self, evictions: int = 0) -> None:
        self._numbers: dict[str, Any] = {}
        self._misses: Counter[str] = Counter()
        self._longest = 0.0
        self._evictions_known = evictions
        self._lock = threading.Lock()

    def add(self, **numbers: float) -> None:
        """Adds to numbers of `Metrics`, by their names."""
        with self._lock:
            self._add(numbers)
        for name, amount in numbers.items():
            if amount:
                telemetry.count(name, amount)

    def missed(self, reason: str) -> None:
        """Counts a miss by its reason, details and all."""
        name = name_of(reason)
        with self._lock:
            self._misses[name] += 1
        telemetry.count("misses", 1, {"reason": name})

    def evicted(self, so_far: int) -> None:
        """Takes over the store's own count of its evictions."""
        with self._lock:
            new = max(0, so_far - self._evictions_known)
            self._evictions_known += new
        self.add(evictions=new)

    def first_token(self, seconds: float) -> None:
        """Notes how long a call took to its first token."""
        with self._lock:
            self._add({"first_tokens": 1, "first_token_seconds": seconds})
            self._longest = max(self._longest, seconds)
        telemetry.observe("first_token_seconds", seconds)

    def snapshot(self) -> Metrics:
        """The numbers as they are now, all of one moment."""
        with self._lock:
            return Metrics(
                **self._numbers,
                misses=dict(sorted(self._misses.items())),
                first_token_seconds_max=self._longest,
            )

    def _add(self, numbers: Mapping[str, float]) -> None:
        for name, amount in numbers.items():
            self._numbers[name] = self._numbers.get(name, 0) + amount
