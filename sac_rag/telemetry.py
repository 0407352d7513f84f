"""Counts and times of answers: numbers in the process, metrics and spans for OpenTelemetry.

OpenTelemetry's API does nothing without an SDK in the process. What is reported is counts, seconds
and names defined in this package, never a text, a key or an id.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sac_rag import forks
from sac_rag.errors import name_of

# In seconds; OpenTelemetry's defaults are made for milliseconds.
_BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Metrics:
    """Numbers of a pipeline's answers; none of them decreases. `asdict` makes them JSON.

    OpenTelemetry gets the same numbers under the same names with the prefix `sac_rag.`:
    `sac_rag.misses` has the attribute "reason", and `sac_rag.first_token_seconds` is a
    histogram, with count, sum and maximum.

    Attributes:
        questions: Questions and turns of chats; each row of a batch is one.
        failed: Calls that raised.
        hits: Chunks that were read from the store.
        misses: Chunks that were not, by the name of the reason (see `errors.REASONS`).
        loads: Entries read; fewer than hits where a batch has a chunk twice.
        load_seconds: Spent reading the store, misses included.
        load_bytes: Of keys and values read.
        computed_chunks: Chunks compressed because they were missing or slow to load.
        computed_tokens: Their source tokens.
        compute_seconds: Spent compressing and storing them.
        store_failures: Writes that failed; answers do not depend on them.
        evictions: Entries that the store evicted because it was full, in precompression too.
        prompt_tokens: Tokens of plain text in prompts.
        reused_tokens: Those of the shared prefix that an earlier call has read.
        generated_tokens: Tokens of answers, their end tokens included.
        first_tokens: Calls that generated a first token; a batch is one call.
        first_token_seconds: Time to the first token, summed over these calls.
        first_token_seconds_max: The longest of them.
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
        """Stored chunks that were computed again because that was measured to be faster."""
        return self.misses.get("slow", 0)


class Meter:
    """Adds up `Metrics`, and reports to OpenTelemetry. Safe to share between threads.

    Args:
        evictions: Of the store so far; only later ones are counted.
    """

    def __init__(self, evictions: int = 0) -> None:
        self._numbers: dict[str, Any] = {}
        self._misses: Counter[str] = Counter()
        self._longest = 0.0
        self._evictions_known = evictions
        self._lock = forks.lock(self, "_lock")

    def add(self, **numbers: float) -> None:
        """Adds to numbers of `Metrics`, by name."""
        with self._lock:
            self._add(numbers)
        for name, amount in numbers.items():
            if amount:
                count(name, amount)

    def missed(self, reason: str) -> None:
        """Counts a miss by the name of its reason, which may have details behind it."""
        name = name_of(reason)
        with self._lock:
            self._misses[name] += 1
        count("misses", 1, {"reason": name})

    def evicted(self, so_far: int) -> None:
        """Updates the evictions from the store's total."""
        with self._lock:
            new = max(0, so_far - self._evictions_known)
            self._evictions_known += new
        self.add(evictions=new)

    def first_token(self, seconds: float) -> None:
        """Records the time to the first token of a call."""
        with self._lock:
            self._add({"first_tokens": 1, "first_token_seconds": seconds})
            self._longest = max(self._longest, seconds)
        observe("first_token_seconds", seconds)

    def snapshot(self) -> Metrics:
        """The numbers at one moment."""
        with self._lock:
            return Metrics(
                **self._numbers,
                misses=dict(sorted(self._misses.items())),
                first_token_seconds_max=self._longest,
            )

    def _add(self, numbers: Mapping[str, float]) -> None:
        for name, amount in numbers.items():
            self._numbers[name] = self._numbers.get(name, 0) + amount


class Trace:
    """One call, reported as the span `sac_rag.<name>` below the span that is open at its start.

    Spans are made when the call has ended, from the seconds that its phases took: a span that is
    open while a stream's caller works would be the parent of whatever that caller does.

    Attributes:
        started: When the call began, on the clock of `time.perf_counter`.
    """

    def __init__(self, name: str) -> None:
        self._name = f"sac_rag.{name}"
        self.started = time.perf_counter()
        self._began = time.time_ns()
        from opentelemetry import context  # not at the top: importing sac_rag costs nothing

        self._parent = context.get_current()

    def end(
        self, phases: Mapping[str, float], attributes: Mapping[str, int], error: str | None = None
    ) -> None:
        """Reports the call.

        Args:
            phases: Seconds of each phase, in order: child spans, end to end.
            attributes: Counts.
            error: Type of the exception that ended it, if one did.
        """
        from opentelemetry import trace

        tracer = trace.get_tracer("sac_rag")
        span = tracer.start_span(self._name, self._parent, start_time=self._began)
        if span.is_recording():
            inside = trace.set_span_in_context(span, self._parent)
            span.set_attributes({f"sac_rag.{name}": number for name, number in attributes.items()})
            if error is not None:
                span.set_attribute("error.type", error)
                span.set_status(trace.StatusCode.ERROR)
            at = self._began
            for name, seconds in phases.items():
                child = tracer.start_span(f"sac_rag.{name}", inside, start_time=at)
                at += int(seconds * 1e9)
                child.end(at)
        span.end()


def count(name: str, amount: float, attributes: Mapping[str, str] | None = None) -> None:
    """Adds to the counter `sac_rag.<name>`."""
    _counter(f"sac_rag.{name}").add(amount, dict(attributes or {}))


def observe(name: str, seconds: float) -> None:
    """Adds one value to the histogram `sac_rag.<name>`."""
    _histogram(f"sac_rag.{name}").record(seconds)


@cache
def _otel_meter() -> Any:
    from opentelemetry import metrics

    return metrics.get_meter("sac_rag")


@cache
def _counter(name: str) -> Any:
    return _otel_meter().create_counter(name, unit="s" if name.endswith("_seconds") else "1")


@cache
def _histogram(name: str) -> Any:
    return _otel_meter().create_histogram(
        name, unit="s", explicit_bucket_boundaries_advisory=_BUCKETS
    )
