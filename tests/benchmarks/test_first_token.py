"""The benchmark measures what it says; no test here depends on how long anything takes."""

from __future__ import annotations

from typing import Any

import pytest
from support.models import PROSE, make_compressor

from sac_rag.benchmarks.first_token import cut, full_text_seconds
from sac_rag.cached import CachedCompressor
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.format import SPANS, PromptFormat

TEXTS = PROSE * 20


def test_chunks_have_exactly_the_tokens_asked_for(llama: Generator) -> None:
    chunks = cut(llama, TEXTS, 5, 50)
    assert [len(llama.tokenize(chunk)) for chunk in chunks] == [50] * 5


def test_too_little_prose_is_refused_with_the_numbers(llama: Generator) -> None:
    with pytest.raises(ValueError, match="100 chunks of 50 tokens were asked for, the texts gave"):
        cut(llama, PROSE[:2], 100, 50)


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
