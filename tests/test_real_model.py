"""The real default model: what holds on tiny models holds on it, and it answers from chunks."""

from __future__ import annotations

from itertools import islice, permutations
from typing import Any

import pytest
import torch
from support.models import logits_of, make_compressor
from support.slow_reading import read_slowly

from sac_rag.cached import CachedCompressor
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.assemble import assemble
from sac_rag.prompts.format import PromptFormat
from sac_rag.prompts.generate import Decoding, Generation

pytestmark = pytest.mark.real_model

FACTS = (
    "The harbour of Port Ellery was dredged in 1931 by the engineer Mabel Strand.",
    "Its lighthouse is painted in red and white bands and stands 41 metres tall.",
    "The annual herring festival takes place on the second Sunday of August.",
    "The town's only railway line closed in 1964 and became a cycling path.",
    "Port Ellery is twinned with the Norwegian town of Flekkefjord.",
    "Its library keeps the diary of the shipwright Josias Penn.",
    "The ferry to Gull Island leaves every two hours and takes forty minutes.",
    "The local cheese is wrapped in nettle leaves and aged in slate cellars.",
)


@pytest.fixture(scope="module")
def smollm() -> Generator:
    return Generator.from_pretrained("smollm2-135m", dtype="float32")


def test_relocation_is_proved_on_it(smollm: Generator) -> None:
    rag = SacRAG(CachedCompressor(make_compressor(smollm, "full"), {}))
    assert rag.self_check() < 1e-3


def test_moved_chunks_read_like_chunks_computed_in_place(smollm: Generator) -> None:
    full = make_compressor(smollm, "full")
    before = smollm.tokenize("<|im_start|>user\n", special=True)
    after = smollm.tokenize(
        "How tall is the lighthouse?<|im_end|>\n<|im_start|>assistant\n", special=True
    )
    chunks = [smollm.tokenize(text + "\n") for text in FACTS]
    cached = full.compress_tokens(chunks)
    for order in islice(permutations(range(8)), 7, 40320, 20160):
        moved = assemble([[before, *(cached[i] for i in order), after]], smollm)
        # The oracle computes every chunk at its place, so that nothing is moved at all.
        placed, position = [], len(before)
        for i in order:
            placed += full.compress_tokens([chunks[i]], start=position)
            position += len(chunks[i])
        in_place = assemble([[before, *(cached[i] for i in order), after]], smollm)
        keys = torch.cat([kv.by_head()[0] for kv in placed], dim=2)
        values = torch.cat([kv.by_head()[1] for kv in placed], dim=2)
        for layer, expected in enumerate(in_place.cache.layers):
            expected.keys, expected.values = keys[layer][None], values[layer][None]
        texts = []
        for prompt in (moved, in_place):
            generation = Generation(smollm, prompt, Decoding(max_new_tokens=12))
            for _ in generation:
                pass
            texts += generation.texts
        assert texts[0] == texts[1]
        assert texts[0].strip()


@torch.no_grad()
def test_what_each_head_keeps_of_its_own_reads_like_all_entries_with_the_rest_masked(
    smollm: Generator,
) -> None:
    compressor = make_compressor(smollm, "shared", lora_targets=(), ratio=5)
    kvs = compressor.compress(FACTS[:3])
    assert all(int(kv.counts.min()) < int(kv.counts.max()) for kv in kvs)
    question = smollm.tokenize("\nHow tall is the lighthouse?")
    parts: list[Any] = [smollm.tokenize("Read: "), *kvs, question]
    got = logits_of(smollm, assemble([parts], smollm, cue=compressor.cue))[0]
    expected = read_slowly(smollm, parts, compressor.cue)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_one_chunk_behind_its_whole_prefix_gives_the_text_of_plain_generate(
    smollm: Generator,
) -> None:
    prefix = "<|im_start|>system\nAnswer from the text.<|im_end|>\n<|im_start|>user\n"
    full = make_compressor(smollm, "full", sink=prefix)
    before = smollm.tokenize(prefix, special=True)
    chunk = smollm.tokenize(" ".join(FACTS))
    after = smollm.tokenize(
        "\nHow tall is the lighthouse?<|im_end|>\n<|im_start|>assistant\n", special=True
    )
    generation = Generation(
        smollm,
        assemble([[before, *full.compress_tokens([chunk]), after]], smollm),
        Decoding(max_new_tokens=24),
    )
    for _ in generation:
        pass
    ids = torch.tensor([[*before, *chunk, *after]])
    expected = smollm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=2
    )
    written = smollm.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert generation.texts[0] == written.lstrip()
    assert "41" in written


def test_it_answers_from_cached_chunks_alone_streamed_and_batched(smollm: Generator) -> None:
    rag = SacRAG(
        CachedCompressor(make_compressor(smollm, "full"), {}),
        prompt_format=PromptFormat(chunk="{chunk}"),
        decoding=Decoding(max_new_tokens=32),
    )
    question, chunks = "How tall is the lighthouse?", [FACTS[1]]
    first = rag.answer(question, chunks)
    assert "41" in first.text
    assert [chunk.status for chunk in first.chunks] == ["absent"]
    again = rag.answer(question, chunks)
    assert [chunk.status for chunk in again.chunks] == ["hit"]
    assert again.text == first.text == "".join(rag.stream(question, chunks))
    assert again.usage.anchors_computed == 0
    batched = rag.batch(
        [(question, chunks), ("When is the festival?", list(FACTS[:4])), ("Hi.", [])]
    )
    assert batched[0].text == first.text


def test_bfloat16_and_float16_answer_too(smollm: Generator) -> None:
    for dtype in ("bfloat16", "float16"):
        rag = SacRAG.from_pretrained(
            "smollm2-135m", dtype=dtype, decoding=Decoding(max_new_tokens=24)
        )
        assert "41" in rag.answer("How tall is the lighthouse?", [FACTS[1]]).text
