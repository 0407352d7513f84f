"""The equivalences that the whole idea stands on, in float32.

TOLERANCE: logits of these models are of order 10; 1e-4 is rounding of a few float32 operations in
another order, three orders of magnitude below what one wrong position changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, permutations
from typing import Any

import pytest
import torch
from conftest import PROSE, make_compressor
from torch import Tensor

from sac_rag.assemble import Part, assemble
from sac_rag.generate import Decoding, Generation
from sac_rag.generator import Generator
from sac_rag.kv import AnchorKV
from sac_rag.rope import move

TOLERANCE = 1e-4


@torch.no_grad()
def logits_of(generator: Generator, parts: Sequence[Part], cue: Tensor | None = None) -> Tensor:
    """Logits of every plain token of one prompt. Shape: (tokens, vocabulary)"""
    prompt = assemble([parts], generator, cue=cue)
    logits: Tensor = generator.model(
        inputs_embeds=prompt.embeds,
        position_ids=prompt.position_ids,
        attention_mask=generator.attention_mask(prompt.mask),
        past_key_values=prompt.cache,
    ).logits[0]
    return logits


@torch.no_grad()
def plain_logits(generator: Generator, ids: Sequence[int]) -> Tensor:
    """Logits of plain HF reading. Shape: (tokens, vocabulary)"""
    logits: Tensor = generator.model(torch.tensor([ids])).logits[0]
    return logits


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert expected.abs().max() > 1, "logits too small for the tolerance to mean anything"
    assert (got - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("prefix", ["", "<|im_start|>system\nBe brief.<|im_end|>\n"])
def test_full_behind_its_whole_prefix_equals_plain_reading(
    make_generator: Any, architecture: str, attention: str, prefix: str
) -> None:
    generator = make_generator(architecture, attention)
    full = make_compressor(generator, "full", sink=prefix)
    before = generator.tokenize(prefix, special=True)
    chunk, after = generator.tokenize(PROSE[0]), generator.tokenize(" Who counted ships?")
    (kv,) = full.compress_tokens([chunk], start=0)
    got = logits_of(generator, [before, kv, after])
    expected = plain_logits(generator, [*before, *chunk, *after])
    assert_close(got, torch.cat([expected[: len(before)], expected[len(before) + len(chunk) :]]))


@pytest.mark.parametrize("offset", [1, 510, 3000])
@pytest.mark.parametrize("method", ["full", "sac", "learned"])
def test_moving_a_chunk_equals_compressing_it_there(
    generator: Generator, method: str, offset: int
) -> None:
    compressor = make_compressor(generator, method)
    chunk = generator.tokenize(PROSE[2])
    (here,) = compressor.compress_tokens([chunk])
    (there,) = compressor.compress_tokens([chunk], start=offset)
    # Angles of several thousand radians are themselves rounded to about 1e-4 by the model.
    torch.testing.assert_close(
        move(here.keys, offset, generator.frequencies), there.keys, atol=2e-3, rtol=1e-3
    )
    torch.testing.assert_close(here.values, there.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(here.positions + offset, there.positions)


@pytest.mark.parametrize("method", ["full", "sac", "learned"])
def test_chunks_in_any_order_equal_the_same_order_compressed_segment_by_segment(
    generator: Generator, method: str
) -> None:
    compressor = make_compressor(generator, method)
    before = generator.tokenize("<|im_start|>system\n", special=True)
    after = generator.tokenize("\nQuestion: what came in from the west?")
    chunks = [generator.tokenize(text) for text in PROSE]
    assert len(chunks) == 8
    cached = compressor.compress_tokens(chunks)
    for order in islice(permutations(range(8)), 0, 40320, 40320 // 24):
        got = logits_of(generator, [before, *(cached[i] for i in order), after], compressor.cue)
        expected = segment_by_segment(compressor, before, [chunks[i] for i in order], after)
        assert (got[-1] - expected).abs().max() <= TOLERANCE


def segment_by_segment(
    compressor: Any, before: list[int], chunks: list[list[int]], after: list[int]
) -> Tensor:
    """Last logits, each chunk encoded at its own place, one HF pass a part, nothing moved."""
    generator = compressor.generator
    position = len(before)
    with torch.no_grad():
        cache = generator.model(torch.tensor([before])).past_key_values
        for chunk in chunks:
            (kv,) = compressor.compress_tokens([chunk], start=position)
            for layer in range(len(cache.layers)):
                cache.update(kv.keys[layer][None], kv.values[layer][None], layer)
            position += len(chunk)
            if compressor.cue is not None:
                feed(generator, cache, compressor.cue[None], position - 1)
        return feed(generator, cache, generator.embed(after), position)[-1]


def feed(generator: Generator, cache: Any, embeds: Tensor, position: int) -> Tensor:
    entries = cache.get_seq_length()
    tokens = len(embeds)
    mask = torch.ones(1, 1, tokens, entries + tokens, dtype=torch.bool).tril(entries)
    logits: Tensor = generator.model(
        inputs_embeds=embeds[None],
        position_ids=torch.arange(position, position + tokens)[None],
        attention_mask=generator.attention_mask(mask),
        past_key_values=cache,
    ).logits[0]
    return logits


@pytest.mark.parametrize("method", ["full", "sac", "learned"])
def test_one_pass_over_an_interleaved_prompt_equals_feeding_it_part_by_part(
    generator: Generator, method: str
) -> None:
    compressor = make_compressor(generator, method)
    texts = [
        generator.tokenize(t, special=True)
        for t in (
            "<|im_start|>user\nFirst: ",
            "\nSecond, after the first: ",
            "\nThird: ",
            "\nWhich?",
        )
    ]
    kvs = compressor.compress_tokens([generator.tokenize(PROSE[i]) for i in (4, 1, 6)])
    parts = [texts[0], kvs[0], texts[1], kvs[1], texts[2], kvs[2], texts[3]]
    got = logits_of(generator, parts, compressor.cue)
    expected = []
    from transformers import DynamicCache

    cache, position = DynamicCache(), 0
    with torch.no_grad():
        for part in parts:
            if isinstance(part, AnchorKV):
                keys = move(part.keys, position, generator.frequencies)
                for layer in range(len(keys)):
                    cache.update(keys[layer][None], part.values[layer][None], layer)
                position += part.num_tokens
                if compressor.cue is not None:
                    expected.append(feed(generator, cache, compressor.cue[None], position - 1))
            else:
                expected.append(feed(generator, cache, generator.embed(part), position))
                position += len(part)
    assert_close(got, torch.cat(expected))


@pytest.mark.parametrize("method", ["full", "sac", "learned"])
def test_a_batch_equals_its_rows_alone(generator: Generator, method: str) -> None:
    compressor = make_compressor(generator, method)
    before = generator.tokenize("<|im_start|>user\n", special=True)
    kvs = compressor.compress_tokens([generator.tokenize(text) for text in PROSE])
    rows: list[list[Part]] = [
        [before, kvs[0], generator.tokenize("\nWho?")],
        [before, *kvs[1:5], generator.tokenize("\nA much longer question than the others, why?")],
        [before, generator.tokenize("No chunk at all.")],
        [kvs[7], generator.tokenize("x")],
    ]
    prompt = assemble(rows, generator, cue=compressor.cue)
    with torch.no_grad():
        together = generator.model(
            inputs_embeds=prompt.embeds,
            position_ids=prompt.position_ids,
            attention_mask=generator.attention_mask(prompt.mask),
            past_key_values=prompt.cache,
        ).logits[:, -1]
    assert together.isfinite().all()
    for row, got in zip(rows, together, strict=True):
        assert (got - logits_of(generator, row, compressor.cue)[-1]).abs().max() <= TOLERANCE
    batched = Generation(
        generator, assemble(rows, generator, cue=compressor.cue), Decoding(max_new_tokens=16)
    )
    for _ in batched:
        pass
    for number, row in enumerate(rows):
        alone = Generation(
            generator, assemble([row], generator, cue=compressor.cue), Decoding(max_new_tokens=16)
        )
        pieces = [step[0] for step in alone]
        assert "".join(pieces) == alone.texts[0] == batched.texts[number]


def test_a_padded_encoder_batch_equals_its_segments_alone(generator: Generator) -> None:
    compressor = make_compressor(generator, "sac", attention="full")
    chunks = [generator.tokenize(text) for text in (PROSE[0] * 3, "Owls.", PROSE[5], "a")]
    for together, chunk in zip(compressor.compress_tokens(chunks), chunks, strict=True):
        (alone,) = compressor.compress_tokens([chunk])
        torch.testing.assert_close(together.keys, alone.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.values, alone.values, atol=1e-4, rtol=1e-4)
        assert torch.equal(together.positions, alone.positions)


def test_greedy_decoding_equals_hf_generate(generator: Generator) -> None:
    full = make_compressor(generator, "full", sink="<|im_start|>user\n")
    before = generator.tokenize("<|im_start|>user\n", special=True)
    chunk, after = generator.tokenize(PROSE[3]), generator.tokenize("\nWhat is slow?")
    generation = Generation(
        generator,
        assemble([[before, *full.compress_tokens([chunk]), after]], generator),
        Decoding(max_new_tokens=24),
    )
    for _ in generation:
        pass
    ids = torch.tensor([[*before, *chunk, *after]])
    expected = generator.model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    written = generator.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert generation.texts[0] == written.lstrip()
    assert generation.num_tokens[0] == expected.shape[1] - ids.shape[1]


def test_a_chunk_of_several_segments_keeps_each_segment_to_itself(generator: Generator) -> None:
    compressor = make_compressor(generator, "sac", segment_tokens=8)
    chunk = generator.tokenize(PROSE[4])
    assert 16 < len(chunk) <= 24
    (whole,) = compressor.compress_tokens([chunk])
    pieces = [
        compressor.compress_tokens([chunk[begin : begin + 8]], start=begin)[0]
        for begin in (0, 8, 16)
    ]
    assert whole.num_tokens == len(chunk)
    assert whole.num_anchors == sum(piece.num_anchors for piece in pieces)
    torch.testing.assert_close(whole.keys, torch.cat([p.keys for p in pieces], dim=2))
    assert torch.equal(whole.positions, torch.cat([p.positions for p in pieces]))
