"""Numbers of a server in Prometheus's format: those of its pipelines, and its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as Counting
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sac_rag.pipeline import SacRAG
from sac_rag.telemetry import Metrics

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class ServerMetrics:
    """Counts and times of requests, beside those of the pipelines.

    The numbers of all namespaces are added: a namespace is a secret.

    Attributes:
        requests: Chat completions, by status.
        seconds: How long they took, streams to their end.
        queue: Requests that wait or are answered now.
    """

    def __init__(self, pipelines: Iterable[SacRAG], queue_limit: int) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Pipelines(list(pipelines)))
        self.requests = Counting(
            "sac_rag_requests", "Chat completions.", ["status"], registry=self._registry
        )
        self.seconds = Histogram(
            "sac_rag_request_seconds",
            "Seconds of chat completions, streams to their end.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.queue = Gauge(
            "sac_rag_queue", "Chat completions that wait or run.", registry=self._registry
        )
        limit = Gauge("sac_rag_queue_limit", "Most of them.", registry=self._registry)
        limit.set(queue_limit)

    def text(self) -> bytes:
        """All numbers, in Prometheus's text format."""
        return generate_latest(self._registry)


class _Pipelines(Collector):
    """The `telemetry.Metrics` of pipelines, added up, under the names that they have there."""

    def __init__(self, pipelines: list[SacRAG]) -> None:
        self._pipelines = pipelines

    def collect(self) -> Iterator[Metric]:
        """The numbers of this moment."""
        snapshots = [rag.metrics() for rag in self._pipelines]
        for field in fields(Metrics):
            name, values = f"sac_rag_{field.name}", [getattr(s, field.name) for s in snapshots]
            if field.name == "misses":
                family = CounterMetricFamily(
                    name, "Chunks not read from the store.", labels=["reason"]
                )
                reasons: Counter[str] = Counter()
                for misses in values:
                    reasons.update(misses)
                for reason, count in reasons.items():
                    family.add_metric([reason], count)
                yield family
            elif field.name.endswith("_max"):
                yield GaugeMetricFamily(name, "See sac_rag.telemetry.Metrics.", max(values))
            else:
                yield CounterMetricFamily(name, "See sac_rag.telemetry.Metrics.", sum(values))
