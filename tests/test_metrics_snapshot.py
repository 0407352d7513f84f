"""What a pipeline did is counted, once each, and told to OpenTelemetry where it is installed."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest
from opentelemetry import metrics as otel_metrics
from opentelemetry import trace as otel_trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.models import PROSE, make_compressor

from sac_rag import SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors.base import Compressor
from sac_rag.errors import ChunkMissError, CorruptEntryError, PromptTooLongError
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import MemoryStore
from sac_rag.telemetry import Metrics

QUESTION = "Who counted the ships?"
EXPORTER = InMemorySpanExporter()
READER = InMemoryMetricReader()


@pytest.fixture(scope="module", autouse=True)
def _opentelemetry() -> None:
    """A process has one provider of each, for good."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(EXPORTER))
    otel_trace.set_tracer_provider(provider)
    otel_metrics.set_meter_provider(MeterProvider([READER]))


@pytest.fixture
def spans() -> Iterator[Callable[[], dict[str, ReadableSpan]]]:
    """Gives the spans that have ended since the test began, by name."""
    EXPORTER.clear()
    yield lambda: {span.name: span for span in EXPORTER.get_finished_spans()}
    EXPORTER.clear()


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    return make_compressor(llama, "sac")


@pytest.fixture
def make_rag(sac: Compressor) -> Callable[..., SacRAG]:
    def make(store: Any = None, **options: Any) -> SacRAG:
        cached = CachedCompressor(sac, {} if store is None else store)
        return SacRAG(cached, **{"decoding": Decoding(max_new_tokens=4), **options})

    return make


class Full(dict[str, AnchorKV]):
    """A store on a full disk."""

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")


class Rotten(dict[str, AnchorKV]):
    """A store whose entries are of another compressor, or of nobody's."""

    reasons = ("fingerprint: config.ratio was 5, is 3", "corrupt", "fingerprint: more, differently")

    def __getitem__(self, key: str) -> AnchorKV:
        raise CorruptEntryError("see the reason", self.reasons[int(key, 16) % 3])


def told() -> dict[str, Any]:
    """What OpenTelemetry has been told so far: names to numbers, maps and histograms."""
    data = READER.get_metrics_data()
    numbers: dict[str, Any] = {}
    for resource in data.resource_metrics if data is not None else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    value = point.value if hasattr(point, "value") else (point.count, point.sum)
                    attributes = dict(point.attributes or {})
                    if attributes:
                        numbers.setdefault(metric.name, {})[attributes["reason"]] = value
                    else:
                        numbers[metric.name] = value
    return numbers


# --- the snapshot


def test_a_new_pipeline_has_done_nothing(make_rag: Callable[..., SacRAG]) -> None:
    assert make_rag().metrics() == Metrics()
    assert Metrics().hit_rate is None


def test_everything_is_counted_once(make_rag: Callable[..., SacRAG]) -> None:
    rag = make_rag()
    first = rag.answer(QUESTION, PROSE[:3])
    second, third = rag.batch([(QUESTION, PROSE[:4]), ("And?", [PROSE[0], ""])])
    usages = [answer.usage for answer in (first, second, third)]
    stored = {text: rag.compressor.store[rag.compressor.key(text)] for text in PROSE[:4]}
    now = rag.metrics()
    assert now.questions == 3
    assert now.hits == 4  # three of the batch's first row, one of its second
    assert now.misses == {"absent": 4}
    assert now.hit_rate == 0.5
    assert now.loads == 3  # one text is in both rows
    assert now.load_bytes == sum(stored[text].nbytes for text in PROSE[:3])
    assert now.computed_chunks == 4
    assert now.computed_tokens == sum(kv.num_tokens for kv in stored.values())
    assert now.generated_tokens == sum(usage.generated_tokens for usage in usages) == 12
    assert now.prompt_tokens == sum(usage.plain_tokens for usage in usages)
    assert now.reused_tokens == sum(usage.plain_tokens_reused for usage in usages) > 0
    assert now.first_tokens == 2
    times = [answer.timings.time_to_first_token_s for answer in (first, second)]
    assert now.first_token_seconds == pytest.approx(sum(times))
    assert now.first_token_seconds_max == max(times)
    assert now.load_seconds == pytest.approx(first.timings.load_s + second.timings.load_s)
    assert now.compute_seconds == pytest.approx(
        first.timings.compress_s + second.timings.compress_s
    )
    assert (now.failed, now.store_failures, now.evictions, now.guard_recomputes) == (0, 0, 0, 0)


def test_a_snapshot_does_not_change_and_is_json(make_rag: Callable[..., SacRAG]) -> None:
    rag = make_rag()
    rag.answer(QUESTION, PROSE[:1])
    before = rag.metrics()
    recorded = json.dumps(asdict(before))
    rag.answer(QUESTION, PROSE[:2])
    assert json.dumps(asdict(before)) == recorded
    assert all(type(value) in (int, float, dict) for value in json.loads(recorded).values())
    with pytest.raises(FrozenInstanceError):
        before.hits = 3  # type: ignore[misc]


def test_misses_are_counted_by_the_names_of_their_reasons(make_rag: Callable[..., SacRAG]) -> None:
    rag = make_rag(Rotten())
    statuses = [chunk.status for chunk in rag.answer(QUESTION, PROSE).chunks]
    expected = {"corrupt": statuses.count("corrupt")}
    expected["fingerprint"] = 8 - expected["corrupt"]
    assert rag.metrics().misses == expected
    assert all(expected.values())


def test_failed_writes_and_evictions_are_counted(make_rag: Callable[..., SacRAG]) -> None:
    full = make_rag(Full())
    full.answer(QUESTION, PROSE)
    assert full.metrics().store_failures == 8
    rag = make_rag()
    rag.precompress(PROSE)
    sizes = [kv.nbytes for kv in rag.compressor.store.values()]
    store = MemoryStore(max_bytes=sum(sizes[:3]))
    make_rag(store).precompress(PROSE[:4])  # what was evicted before a pipeline is not its
    before = store.evictions
    small = make_rag(store)
    small.answer(QUESTION, PROSE[4:])
    assert small.metrics().evictions == store.evictions - before > 0


def test_calls_that_raise_are_counted_and_what_they_loaded_too(
    make_rag: Callable[..., SacRAG],
) -> None:
    rag = make_rag(on_miss="raise")
    with pytest.raises(ChunkMissError):
        rag.answer(QUESTION, PROSE)
    with pytest.raises(ValueError):
        rag.answer("", PROSE)
    with pytest.raises(PromptTooLongError):
        rag.answer("why " * 9000, [])
    assert (rag.metrics().failed, rag.metrics().questions) == (3, 0)


def test_a_stream_that_was_left_is_counted_as_far_as_it_came(
    make_rag: Callable[..., SacRAG],
) -> None:
    rag = make_rag(decoding=Decoding(max_new_tokens=64))
    stream = rag.stream(QUESTION, PROSE)
    assert rag.metrics().first_tokens == 0
    next(stream)
    written = stream.answer.usage.generated_tokens
    del stream
    now = rag.metrics()
    assert (now.questions, now.first_tokens, now.generated_tokens) == (1, 1, written)
    assert written < 64


def test_threads_lose_no_count(make_rag: Callable[..., SacRAG]) -> None:
    rag = make_rag()
    rag.precompress(PROSE)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: rag.answer(f"Question {i}?", PROSE[:2]), range(24)))
    now = rag.metrics()
    assert (now.questions, now.hits, now.loads, now.first_tokens) == (24, 48, 48, 24)
    assert now.generated_tokens == 96


def test_counting_costs_next_to_nothing(make_rag: Callable[..., SacRAG]) -> None:
    """A snapshot takes microseconds: a dashboard may ask for it every second."""
    import time

    rag = make_rag()
    rag.answer(QUESTION, PROSE)
    started = time.thread_time()  # its own work, however busy the machine is
    for _ in range(1000):
        rag.metrics()
    assert time.thread_time() - started < 1.0


def test_the_log_names_no_text(
    make_rag: Callable[..., SacRAG], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="sac_rag"):
        make_rag(Full()).answer(QUESTION, [Chunk(PROSE[0], id="secret.txt", title="Secret")])
    assert "was not stored" in caplog.text
    assert not any(word in caplog.text for word in ("lighthouse", "ships", "ecret"))


# --- OpenTelemetry


def test_an_answer_is_a_span_with_its_phases_as_children(
    make_rag: Callable[..., SacRAG], spans: Callable[[], dict[str, ReadableSpan]]
) -> None:
    rag = make_rag()
    with otel_trace.get_tracer("the caller's").start_as_current_span("request") as request:
        answer = rag.answer(QUESTION, PROSE)
    ended = spans()
    phases = ["load", "compress", "relocate", "prefill", "decode"]
    root = ended["sac_rag.answer"]
    assert set(ended) == {"request", "sac_rag.answer", *(f"sac_rag.{name}" for name in phases)}
    assert root.parent is not None and root.parent.span_id == request.get_span_context().span_id
    end = root.start_time
    for name in phases:
        child = ended[f"sac_rag.{name}"]
        assert child.parent is not None and root.context is not None
        assert child.parent.span_id == root.context.span_id
        assert child.start_time == end and child.end_time is not None
        seconds = getattr(answer.timings, f"{name}_s")
        assert (child.end_time - child.start_time) / 1e9 == pytest.approx(seconds, abs=1e-6)
        end = child.end_time
    assert root.status.is_ok or root.status.status_code is otel_trace.StatusCode.UNSET
    assert dict(root.attributes or {}) == {
        "sac_rag.questions": 1,
        "sac_rag.chunks": 8,
        "sac_rag.hits": 0,
        "sac_rag.anchors": answer.usage.anchors_computed,
        "sac_rag.source_tokens": answer.usage.source_tokens,
        "sac_rag.prompt_tokens": answer.usage.plain_tokens,
        "sac_rag.reused_tokens": answer.usage.plain_tokens_reused,
        "sac_rag.generated_tokens": 4,
    }


def test_a_span_that_is_open_for_a_streams_caller_is_the_callers_own(
    make_rag: Callable[..., SacRAG], spans: Callable[[], dict[str, ReadableSpan]]
) -> None:
    stream = make_rag().stream(QUESTION, PROSE)
    with otel_trace.get_tracer("the caller's").start_as_current_span("work on a piece"):
        next(stream)
    for _ in stream:
        pass
    assert spans()["work on a piece"].parent is None
    assert spans()["sac_rag.answer"].parent is None


def test_a_call_that_raises_is_a_span_with_the_errors_type(
    make_rag: Callable[..., SacRAG], spans: Callable[[], dict[str, ReadableSpan]]
) -> None:
    with pytest.raises(ChunkMissError):
        make_rag(on_miss="raise").answer(QUESTION, PROSE)
    span = spans()["sac_rag.answer"]
    assert span.status.status_code is otel_trace.StatusCode.ERROR
    assert dict(span.attributes or {}) == {"error.type": "ChunkMissError"}


def test_no_text_key_or_id_leaves_the_process(
    make_rag: Callable[..., SacRAG], spans: Callable[[], dict[str, ReadableSpan]]
) -> None:
    rag = make_rag()
    rag.answer(QUESTION, [Chunk(text, id="secret.txt", title="Secret") for text in PROSE])
    with pytest.raises(TypeError):
        rag.answer(QUESTION, [PROSE])  # type: ignore[list-item]
    everything = "".join(span.to_json() for span in spans().values()) + repr(told())
    assert "sac_rag.answer" in everything
    secrets = [*QUESTION.split(), "lighthouse", "ecret", *map(rag.compressor.key, PROSE)]
    assert not [secret for secret in secrets if secret in everything]


def test_metrics_have_the_names_and_numbers_of_the_snapshot(
    make_rag: Callable[..., SacRAG],
) -> None:
    before = told()
    rag = make_rag(Rotten())
    rag.answer(QUESTION, PROSE)
    other = make_rag()
    other.batch([(QUESTION, PROSE), (QUESTION, PROSE[:2])])
    other.answer(QUESTION, PROSE)
    after = told()
    one, two = asdict(rag.metrics()), asdict(other.metrics())
    for name in sorted(one.keys() - {"misses", "first_tokens", "first_token_seconds_max"}):
        together = one[name] + two[name]
        was, now = before.get(f"sac_rag.{name}", 0), after.get(f"sac_rag.{name}", 0)
        if name == "first_token_seconds":
            assert now[0] - (was or (0, 0))[0] == one["first_tokens"] + two["first_tokens"]
            was, now = (was or (0, 0))[1], now[1]
        assert now - was == pytest.approx(together), name
    for reason in ("corrupt", "fingerprint", "absent"):
        was = before.get("sac_rag.misses", {}).get(reason, 0)
        expected = one["misses"].get(reason, 0) + two["misses"].get(reason, 0)
        assert after["sac_rag.misses"][reason] - was == expected > 0


def test_without_an_sdk_opentelemetry_gets_nothing_and_nothing_is_missing() -> None:
    script = """
import sys
from sac_rag.telemetry import Meter, Trace
meter = Meter()
meter.add(hits=3)
meter.missed("corrupt")
meter.first_token(0.5)
Trace("answer").end({"load": 1.0}, {"hits": 3})
print(meter.snapshot().hits, [name for name in sys.modules if "opentelemetry.sdk" in name])
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (process.stdout.split(), process.stderr) == (["3", "[]"], "")
