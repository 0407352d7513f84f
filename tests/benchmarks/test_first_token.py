"""The benchmark measures what it says; no test here depends on how long anything takes."""

from __future__ import annotations

from typing import Any

import pytest
from support.models import PROSE, make_compressor

from sac_rag.benchmarks.first_token import cut, full_text_seconds, measure
from sac_rag.cached import CachedCompressor
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.format import SPANS, PromptFormat

TEXTS = PROSE * 20


def test_every_combination_is_measured_over_the_same_chunks(llama: Generator, home: Any) -> None:
    rows = list(measure(llama, TEXTS, ks=(1, 3), ratios=(1, 5), chunk_tokens=50, repeats=1))
    assert [(row.ratio, row.store, row.k) for row in rows] == [
        (ratio, store, k) for ratio in (1, 5) for store in ("disk", "memory") for k in (1, 3)
    ]
    for row in rows:
        assert row.source_tokens == 50 * row.k
        assert row.kv_entries == 50 // row.ratio * row.k
        assert row.kv_bytes > 0
        assert min(row.ttft_s, row.token_s, row.floor_s, row.full_text_s) > 0
        assert (row.dtype, row.budget) == ("float32", "uniform")


def test_budgets_are_timed_by_turns_with_heads_alike(llama: Generator, home: Any) -> None:
    rows = list(
        measure(
            llama,
            TEXTS,
            ks=(2,),
            ratios=(5,),
            compressor=make_compressor(llama, "shared"),
            stores=("memory",),
            chunk_tokens=50,
            repeats=1,
        )
    )
    assert [row.budget for row in rows] == ["shared", "uniform"]
    assert rows[0].kv_entries == rows[1].kv_entries == 20


def test_chunks_have_exactly_the_tokens_asked_for(llama: Generator) -> None:
    chunks = cut(llama, TEXTS, 5, 50)
    assert [len(llama.tokenize(chunk)) for chunk in chunks] == [50] * 5


def test_too_little_prose_is_refused_with_the_numbers(llama: Generator) -> None:
    with pytest.raises(ValueError, match="100 chunks of 50 tokens were asked for, the texts gave"):
        cut(llama, PROSE[:2], 100, 50)


def test_an_unknown_store_is_refused(llama: Generator) -> None:
    with pytest.raises(ValueError, match="floppy"):
        next(measure(llama, TEXTS, stores=("floppy",)))


@pytest.mark.parametrize("prompt_format", [PromptFormat(), SPANS], ids=["chat", "plain"])
@pytest.mark.parametrize("chunks", [[], list(PROSE[:2])])
def test_reading_the_text_reads_all_of_it_but_the_prefix_that_answers_reuse_too(
    llama: Generator, home: Any, prompt_format: PromptFormat, chunks: list[str]
) -> None:
    rag = SacRAG(CachedCompressor(make_compressor(llama, "full"), {}), prompt_format=prompt_format)
    reused = [rag.answer("Who?", chunks).usage.plain_tokens_reused for _ in range(2)][1]
    passes: list[int] = []
    handle = llama.model.base_model.register_forward_hook(
        lambda module, args, output: passes.append(output[0].shape[1])
    )
    full_text_seconds(rag, "Who?", chunks)
    handle.remove()
    assert reused > 0
    assert passes == [len(rag.prompt_ids("Who?", chunks)) - reused]
