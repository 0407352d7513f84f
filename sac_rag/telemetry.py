"""Spans and metrics for OpenTelemetry, where opentelemetry-api is installed, else for nobody.

What goes out is counts, seconds and names of this package's own, never a text, a key or an id.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

from sac_rag import telemetry
from sac_rag.errors import name_of

# In seconds; OpenTelemetry's own are made for milliseconds.
_BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@cache
def is_installed() -> bool:
    """Whether there is an OpenTelemetry to report to."""
    return find_spec("opentelemetry") is not None and find_spec("opentelemetry.trace") is not None


def count(name: str, amount: float, attributes: Mapping[str, str] | None = None) -> None:
    """Adds to the counter `sac_rag.<name>`."""
    if is_installed():
        _counter(f"sac_rag.{name}").add(amount, dict(attributes or {}))


def observe(name: str, seconds: float) -> None:
    """Adds one value to the histogram `sac_rag.<name>`."""
    if is_installed():
        _histogram(f"sac_rag.{name}").record(seconds)


class Trace:
    """One call, to become the span `sac_rag.<name>` below the span that is open when it begins.

    Spans are made when the call has ended, from the seconds that its phases took: one that was open
    while a stream's caller works would be the parent of whatever that caller does.

    Attributes:
        started: When it began, on the clock of `time.perf_counter`.
    """

    def __init__(self, name: str) -> None:
        self._name = f"sac_rag.{name}"
        self.started = time.perf_counter()
        self._began = time.time_ns()
        self._parent: Any = None
        if is_installed():
            from opentelemetry import context

            self._parent = context.get_current()

    def end(
        self, phases: Mapping[str, float], attributes: Mapping[str, int], error: str | None = None
    ) -> None:
        """Reports the call.

        Args:
            phases: Seconds of each, in their order: child spans, laid end to end.
            attributes: Counts.
            error: The exception's type, if it ended by one.
        """
        if not is_installed():
            return
        from opentelemetry import trace

        tracer = trace.get_tracer("sac_rag")
        span = tracer.start_span(self._name, self._parent, start_time=self._began)
        if span.is_recording():
            inside = trace.set_span_in_context(span, self._parent)
            span.set_attributes({f"sac_rag.{name}": count for name, count in attributes.items()})
            if error is not None:
                span.set_attribute("error.type", error)
                span.set_status(trace.StatusCode.ERROR)
            at = self._began
            for name, seconds in phases.items():
                child = tracer.start_span(f"sac_rag.{name}", inside, start_time=at)
                at += int(seconds * 1e9)
                child.end(at)
        span.end()


@cache
def _meter() -> Any:
    from opentelemetry import metrics

    return metrics.get_meter("sac_rag")


@cache
def _counter(name: str) -> Any:
    return _meter().create_counter(name, unit="s" if name.endswith("_seconds") else "1")


@cache
def _histogram(name: str) -> Any:
    return _meter().create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=_BUCKETS)


@dataclass(frozen=True)
class Metrics:
    """Numbers of a pipeline's answers; all of them only grow. `asdict` makes it JSON.

    Where OpenTelemetry is installed it gets the same numbers under the same names, each behind
    `sac_rag.`: `sac_rag.errors` has the attribute "reason", and `sac_rag.first_token_seconds` is a
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
