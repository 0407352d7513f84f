"""The short form of `sac-rag bench serve`: no request of 32 clients fails."""

from __future__ import annotations

from typing import Any

from support.models import PROSE, make_compressor, passes_of

from sac_rag import Chunk, SacRAG
from sac_rag.benchmarks.serving import measure_serving
from sac_rag.cached import CachedCompressor
from sac_rag.lm.generator import Generator
from sac_rag.server.service import Service


def test_no_request_of_32_clients_fails_and_they_are_answered_together(
    llama: Generator, home: Any
) -> None:
    rag = SacRAG(CachedCompressor(make_compressor(llama, "sac"), {}))
    chunks = [Chunk(text, id=str(number), title="T") for number, text in enumerate(PROSE)]
    asked: list[int] = []
    with passes_of(llama) as passes:
        report = measure_serving(
            Service(rag, "tiny"),
            chunks,
            seconds=5,
            rounds=2,
            answer_tokens=6,
            on_progress=asked.append,
        )
    assert report.failed == {}
    assert report.clients == 32
    assert report.requests >= 2 * (32 + 1)
    assert sum(asked) > report.requests
    assert max(passes) == 16
    metrics = rag.metrics()
    assert (metrics.failed, metrics.misses) == (0, {})
    assert metrics.hits == 2 * metrics.questions
