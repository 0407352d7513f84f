"""Spans and metrics for OpenTelemetry, where opentelemetry-api is installed, else for nobody.

What goes out is counts, seconds and names of this package's own, never a text, a key or an id.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

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
