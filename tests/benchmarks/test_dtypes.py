"""bench dtypes and bench store: what fewer bits cost, and what a store takes to read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import PROSE, make_compressor

from sac_rag.benchmarks.dtypes import measure
from sac_rag.benchmarks.store import chunk, measure_prefetch, measure_reads
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.evaluation.questions import QAExample, Question
from sac_rag.evaluation.sample import draw
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG

EXAMPLES = [
    QAExample((Chunk(PROSE[0]),), (Question("a", "How many ships?", ("seven ships",)),)),
    QAExample((Chunk(PROSE[1]),), (Question("b", "What conducts better?", ("silver",)),)),
]


@pytest.mark.parametrize("method", ["sac", "full", "shared"])
def test_fewer_bits_are_fewer_bytes_and_more_error(llama: Generator, method: str) -> None:
    compressor = make_compressor(llama, method)
    rag = SacRAG(CachedCompressor(compressor, {}))
    done: list[int] = []
    rows = measure(rag, draw(EXAMPLES), max_new_tokens=4, on_progress=done.append)
    exact, bfloat16, float16, int8 = rows
    assert [row.stored_dtype for row in rows] == ["float32", "bfloat16", "float16", "int8"]
    assert done == [1, 1]
    assert (exact.logit_rms, exact.logit_max, exact.kl) == (0, 0, 0)
    assert (exact.same_tokens, exact.same_answers, exact.f1_change) == (1, 1, 0)
    assert 0 < float16.logit_rms < bfloat16.logit_rms < int8.logit_rms
    assert abs(float16.entry_bytes - bfloat16.entry_bytes) < 8  # the longer word
    assert int8.entry_bytes < bfloat16.entry_bytes < exact.entry_bytes
    for row in rows:
        assert row.n == 2
        assert row.logit_rms <= row.logit_max
        assert row.kl >= -1e-6
        assert 0 <= row.f1 <= 1
        assert row.f1_change_interval[0] <= row.f1_change <= row.f1_change_interval[1]


def test_reading_is_timed_for_the_entry_and_for_its_bare_bytes(tmp_path: Path) -> None:
    plain, int8 = measure_reads(tmp_path, kv=chunk((2, 2, 40, 8)), repeats=3)
    assert (plain.stored_dtype, int8.stored_dtype) == ("bfloat16", "int8")
    assert int8.nbytes < plain.nbytes
    for row in (plain, int8):
        seconds = (row.store_s, row.safetensors_s, row.unused_s, row.read_s, row.mapped_s)
        assert min(seconds) > 0
        assert row.ratio == row.store_s / row.safetensors_s


def test_encrypted_reading_is_timed_too(tmp_path: Path) -> None:
    rows = measure_reads(tmp_path, kv=chunk((2, 2, 6, 8)), encrypted=True, repeats=1)
    assert all(row.encrypted and row.store_s > 0 for row in rows)


def test_reading_is_timed_with_and_without_a_prefetch(tmp_path: Path) -> None:
    speed = measure_prefetch(tmp_path, ahead_s=0.01, repeats=1)
    assert min(speed.warm_ms, speed.cold_ms, speed.prefetched_ms) > 0
