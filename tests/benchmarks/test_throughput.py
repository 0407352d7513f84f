"""The benchmark measures what it says; no test here depends on how long anything takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import PROSE, passes_of

from sac_rag.benchmarks.throughput import measure, plain_prefill
from sac_rag.lm.generator import Generator

TEXTS = PROSE * 20


def test_both_sides_read_the_same_tokens_in_passes_of_the_same_size(make_generator: Any) -> None:
    generator = make_generator("llama")
    with passes_of(generator) as passes:
        rows = list(
            measure(generator, TEXTS, chunks=6, chunk_tokens=40, batch_tokens=200, repeats=2)
        )
    assert [row.method for row in rows] == ["full", "sac, LoRA apart", "sac"]
    assert len({row.source_tokens for row in rows}) == 1
    assert 6 * 20 <= rows[0].source_tokens <= 6 * 40
    assert [row.ratio for row in rows] == [1, 5, 5]
    for row in rows:
        assert row.batch_tokens == 200
        assert 0 < row.padding < 0.5
        assert min(row.plain_tokens_per_s, row.tokens_per_s, row.relative) > 0
        assert (row.stored_tokens_per_s is None) == (row.method == "sac, LoRA apart")
    assert max(passes) * 20 <= 200


def test_a_plain_prefill_reads_every_row_once(llama: Generator) -> None:
    seen: list[torch.Size] = []
    handle = llama.model.base_model.register_forward_hook(
        lambda module, args, output: seen.append(output[0].shape[:2])
    )
    plain_prefill(llama, [[[1, 2, 3], [4]], [[5, 6]]])
    handle.remove()
    assert seen == [(2, 3), (1, 2)]


def test_too_little_prose_is_refused(llama: Generator) -> None:
    with pytest.raises(ValueError, match="chunks of 256 tokens were asked for"):
        next(measure(llama, PROSE[:2]))
