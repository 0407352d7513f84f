"""The equivalences that the whole idea stands on, in float32.

TOLERANCE: logits of these models are of order 10; 1e-4 is rounding of a few float32 operations in
another order, three orders of magnitude below what one wrong position changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice, permutations
from typing import Any

import pytest
import torch
from support.models import ARCHITECTURES, PROSE, make_compressor
from support.slow_reading import SlowPart, SlowReader, read_slowly
from torch import Tensor

from sac_rag.compressors.base import Compressor
from sac_rag.compressors.full import read_plain
from sac_rag.kv import AnchorKV
from sac_rag.lm.attention import Masks
from sac_rag.lm.generator import Generator
from sac_rag.lm.rope import move
from sac_rag.prompts.assemble import Branches, Part, assemble
from sac_rag.prompts.generate import Decoding, Generation

TOLERANCE = 1e-4
METHODS = ("full", "sac", "learned", "shared", "icae", "x500")


@torch.no_grad()
def logits_of(
    generator: Generator,
    parts: Sequence[Part | Branches],
    cue: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Logits of every plain token of one prompt. Shape: (tokens, vocabulary)"""
    prompt = assemble([parts], generator, cue=cue, **options)
    logits: Tensor = generator.model(**prompt.inputs()).logits[0]
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


def is_ragged(*kvs: AnchorKV) -> bool:
    """Whether some head of each keeps another number of entries than some other."""
    return all(int(kv.counts.min()) < int(kv.counts.max()) for kv in kvs)


def compress_at(compressor: Compressor, ids: list[int]) -> Callable[[int], AnchorKV]:
    """Compresses a chunk where it will stand, so that nothing has to be moved."""
    return lambda start: compressor.compress_tokens([ids], start=start)[0]


# --- against plain reading


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
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
    expected = torch.cat([expected[: len(before)], expected[len(before) + len(chunk) :]])
    assert_close(got, expected)
    # The oracle of what follows is held to plain reading, too.
    with torch.no_grad():
        assert_close(read_slowly(generator, [before, kv, after]), expected)


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


# --- moving


@pytest.mark.parametrize("offset", [1, 510, 3000])
@pytest.mark.parametrize("method", METHODS)
def test_moving_a_chunk_equals_compressing_it_there(
    generator: Generator, method: str, offset: int
) -> None:
    compressor = make_compressor(generator, method)
    chunk = generator.tokenize(PROSE[2])
    (here,) = compressor.compress_tokens([chunk])
    (there,) = compressor.compress_tokens([chunk], start=offset)
    assert is_ragged(here) == (method == "shared")
    assert torch.equal(here.heads, there.heads)
    assert torch.equal(here.positions + offset, there.positions)
    # Angles of several thousand radians are themselves rounded to about 1e-4 by the model.
    torch.testing.assert_close(
        move(here.keys, offset, generator.frequencies), there.keys, atol=2e-3, rtol=1e-3
    )
    torch.testing.assert_close(here.values, there.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_chunks_in_any_order_equal_the_same_order_compressed_segment_by_segment(
    generator: Generator, method: str
) -> None:
    compressor = make_compressor(generator, method)
    before = generator.tokenize("<|im_start|>system\n", special=True)
    after = generator.tokenize("\nQuestion: what came in from the west?")
    chunks = [generator.tokenize(text) for text in PROSE]
    assert len(chunks) == 8
    cached = compressor.compress_tokens(chunks)
    for order in islice(permutations(range(8)), 5, 40320, 40320 // 2):
        got = logits_of(generator, [before, *(cached[i] for i in order), after], compressor.cue)
        in_place: list[SlowPart] = [compress_at(compressor, chunks[i]) for i in order]
        assert_close(got, read_slowly(generator, [before, *in_place, after], compressor.cue))


# --- one pass


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
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
    parts: list[Any] = [texts[0], kvs[0], texts[1], kvs[1], texts[2], kvs[2], texts[3]]
    assert_close(
        logits_of(generator, parts, compressor.cue), read_slowly(generator, parts, compressor.cue)
    )


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_chunks_behind_a_prefix_equal_reading_it_with_them(
    generator: Generator, method: str
) -> None:
    compressor = make_compressor(generator, method)
    before = generator.tokenize("<|im_start|>system\nBe brief.<|im_end|>\n", special=True)
    after = generator.tokenize("\nWhy?")
    kvs = compressor.compress(PROSE[5:7])
    for parts in ([*kvs, after], [after, kvs[1], after, kvs[0], after]):
        got = logits_of(generator, parts, compressor.cue, prefix=read_plain(generator, before))
        expected = read_slowly(generator, [before, *parts], compressor.cue)
        assert_close(got, expected[len(before) :])
        whole = logits_of(generator, [before, *parts], compressor.cue)
        assert_close(got, whole[len(before) :])
        elsewhere = logits_of(generator, [before, *parts], compressor.cue, first_position=7)
        assert_close(elsewhere, expected)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_branch_equals_the_prompt_with_that_branch_alone(
    generator: Generator, method: str
) -> None:
    compressor = make_compressor(generator, method)
    kvs = compressor.compress(PROSE[2:4])
    before, between = generator.tokenize("Read: "), generator.tokenize("\nand ")
    branches = [generator.tokenize(t) for t in ("What is slow?", "When?", "Who could read both?")]
    parts: list[Part] = [before, kvs[0], between, kvs[1]]
    got = logits_of(generator, [*parts, Branches(tuple(branches))], compressor.cue)
    of_branches = got[-sum(map(len, branches)) :].split([len(branch) for branch in branches])
    for branch, of_branch in zip(branches, of_branches, strict=True):
        expected = read_slowly(generator, [*parts, branch], compressor.cue)
        assert_close(of_branch, expected[-len(branch) :])


# --- batches and streams


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_its_rows_alone(generator: Generator, method: str) -> None:
    compressor = make_compressor(generator, method)
    before = generator.tokenize("<|im_start|>user\n", special=True)
    kvs = compressor.compress_tokens([generator.tokenize(text) for text in PROSE])
    rows: list[list[Part]] = [
        [before, kvs[0], generator.tokenize("\nWho?")],
        [before, *kvs[1:5], generator.tokenize("\nA much longer question than the others, why?")],
        [before, generator.tokenize("No chunk at all.")],
        [kvs[7], generator.tokenize("x")],
        # Every token of a chunk, and of one chunk what only some heads keep.
        [before, *make_compressor(generator, "full").compress(PROSE[6:7]), before],
        [before, *make_compressor(generator, "shared").compress(PROSE[4:5]), kvs[3], before],
    ]
    prompt = assemble(rows, generator, cue=compressor.cue)
    with torch.no_grad():
        together = generator.model(**prompt.inputs()).logits[:, -1]
        assert together.isfinite().all()
        for row, got in zip(rows, together, strict=True):
            assert (got - logits_of(generator, row, compressor.cue)[-1]).abs().max() <= TOLERANCE
            assert (got - read_slowly(generator, row, compressor.cue)[-1]).abs().max() <= TOLERANCE
    batched = Generation(
        generator, assemble(rows, generator, cue=compressor.cue), Decoding(max_new_tokens=6)
    )
    for _ in batched:
        pass
    for number, row in enumerate(rows):
        alone = Generation(
            generator, assemble([row], generator, cue=compressor.cue), Decoding(max_new_tokens=6)
        )
        pieces = [step[0] for step in alone]
        assert "".join(pieces) == alone.texts[0] == batched.texts[number]


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_an_answer_is_written_as_if_each_token_were_read_part_by_part(
    generator: Generator, method: str
) -> None:
    """An answer's tokens attend to all that the question's last one does, and to one another."""
    compressor = make_compressor(generator, method)
    kvs = compressor.compress(PROSE[:2])
    parts: list[Any] = [kvs[0], generator.tokenize(" and "), kvs[1], generator.tokenize("\nWho?")]
    prompt = assemble([parts], generator, cue=compressor.cue)
    generation = Generation(generator, prompt, Decoding(max_new_tokens=8))
    pieces = [piece for (piece,) in generation]
    reader = SlowReader(generator)
    written = [int(reader.read(parts, compressor.cue)[-1].argmax())]
    while len(written) < 8 and written[-1] not in generator.eos_ids:
        written.append(int(reader.write(written[-1]).argmax()))
    expected = generator.tokenizer.decode(written, skip_special_tokens=True)
    assert "".join(pieces) == generation.texts[0] == expected.lstrip()
    assert generation.num_tokens == [len(written)]


def test_a_padded_encoder_batch_equals_its_segments_alone(generator: Generator) -> None:
    for compressor in (
        make_compressor(generator, "sac", attention="full"),
        make_compressor(generator, "shared"),
    ):
        chunks = [generator.tokenize(text) for text in (PROSE[0] * 3, "Owls.", PROSE[5], "a")]
        for together, chunk in zip(compressor.compress_tokens(chunks), chunks, strict=True):
            (alone,) = compressor.compress_tokens([chunk])
            assert torch.equal(together.heads, alone.heads)
            assert torch.equal(together.positions, alone.positions)
            torch.testing.assert_close(together.keys, alone.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(together.values, alone.values, atol=1e-4, rtol=1e-4)


# --- segments


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_chunk_of_several_segments_keeps_each_segment_to_itself(
    generator: Generator, method: str
) -> None:
    compressor = make_compressor(generator, method, segment_tokens=8)
    chunk = generator.tokenize(PROSE[4])
    assert 16 < len(chunk) <= 24
    (whole,) = compressor.compress_tokens([chunk])
    pieces = [
        compressor.compress_tokens([chunk[begin : begin + 8]], start=begin)[0]
        for begin in (0, 8, 16)
    ]
    assert whole.num_tokens == len(chunk)
    assert whole.num_entries == sum(piece.num_entries for piece in pieces)
    entries = {
        (int(head), int(position)): (key, value)
        for piece in pieces
        for head, position, key, value in zip(
            piece.heads, piece.positions, piece.keys, piece.values, strict=True
        )
    }
    assert len(entries) == whole.num_entries
    for at, (head, position) in enumerate(zip(whole.heads, whole.positions, strict=True)):
        key, value = entries[int(head), int(position)]
        torch.testing.assert_close(whole.keys[at], key)
        torch.testing.assert_close(whole.values[at], value)
    # And it reads as its segments do, one after the other.
    before, after = generator.tokenize("Read: "), generator.tokenize("\nWhat was sold?")
    in_place: list[SlowPart] = [
        compress_at(compressor, chunk[begin : begin + 8]) for begin in (0, 8, 16)
    ]
    assert_close(
        logits_of(generator, [before, whole, after]),
        read_slowly(generator, [before, *in_place, after]),
    )


# --- budgets


@pytest.mark.parametrize("ratio", [5, 15])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_masking_what_a_head_does_not_keep_equals_dropping_it(
    make_generator: Any, architecture: str, attention: str, ratio: int
) -> None:
    generator = make_generator(architecture, attention)
    compressor = make_compressor(generator, "shared", ratio=ratio)
    chunks = [generator.tokenize(text) for text in PROSE[:3]]
    whole = compressor.at_ratio(1).compress_tokens(chunks)
    dropped = compressor.compress_tokens(chunks)
    assert is_ragged(*dropped)
    between = generator.tokenize(", and ")
    parts = [[between, a, b, between, c, between] for a, b, c in (whole, dropped)]
    masked = assemble([parts[0]], generator, cue=compressor.cue)
    layers, kv_heads, _ = generator.kv_shape
    turns = []
    for turn, before, after in zip((2, 3, 5), whole, dropped, strict=True):
        slots = torch.full((layers * kv_heads, before.num_tokens), -1)
        # The rank of each entry in its head: at ratio 1, where it stands in the cache.
        for head in range(layers * kv_heads):
            count = int((after.heads == head).sum())
            slots[head, :count] = turn
            assert torch.equal(
                after.positions[after.heads == head], before.positions[before.heads == head][:count]
            )
        turns.append(slots.view(layers, 1, kv_heads, -1))
    cue, n = [2], len(between)
    token_turns = torch.tensor([[1] * n + cue + [3] + [4] * n + [5] + [6] * n])
    masks = Masks(torch.cat(turns, dim=-1), token_turns, torch.tensor([6]), generator.dtype)
    expected = generator.model(**replace(masked, masks=masks).inputs()).logits[0]
    got = logits_of(generator, parts[1], compressor.cue)
    assert_close(got, expected)
    assert_close(got, read_slowly(generator, parts[1], compressor.cue))
    # It makes a difference.
    assert (logits_of(generator, parts[0], compressor.cue) - got).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_mask_for_each_head_equals_one_for_all_where_all_keep_as_much(
    make_generator: Any, architecture: str, attention: str
) -> None:
    generator = make_generator(architecture, attention)
    layers, kv_heads, _ = generator.kv_shape
    before, after = generator.tokenize("Read: "), generator.tokenize("\nWho?")
    for method in ("full", "sac", "learned"):
        compressor = make_compressor(generator, method)
        kvs = compressor.compress(PROSE[:3])
        rows: list[list[Part]] = [[before, kvs[0], after], [kvs[1], before, kvs[2], after]]
        usual = assemble(rows, generator, cue=compressor.cue)
        assert "entry_masks" not in usual.inputs()
        assert usual.inputs()["attention_mask"].shape[1] == 1
        expected = generator.model(**usual.inputs()).logits

        class OfEachHead:
            """The same mask, once for each layer and head."""

            def __len__(self) -> int:
                return layers

            def __getitem__(self, layer: int) -> Tensor:
                return usual.masks[0].expand(-1, kv_heads, -1, -1)  # noqa: B023

        again = assemble(rows, generator, cue=compressor.cue)
        inputs = again.inputs() | {"entry_masks": OfEachHead()}
        assert_close(generator.model(**inputs).logits, expected)


@torch.no_grad()
def test_entries_given_out_evenly_read_like_a_uniform_budget(generator: Generator) -> None:
    """Ragged by rule, and the same entries in the end: the usual mask is enough."""
    uniform, shared = (make_compressor(generator, m, ratio=2) for m in ("learned", "shared"))
    # All tokens count the same to all heads, except that later ones come first.
    alike = {
        n: w if "scorer" not in n else w.new_zeros(w.shape) for n, w in uniform.weights.items()
    }
    uniform.load_weights(alike)
    shared.load_weights({**alike, "budget": torch.zeros(3, 2)})
    ids = generator.tokenize(PROSE[0])[:18]
    (one,), (other,) = uniform.compress_tokens([ids]), shared.compress_tokens([ids])
    assert one.bit_equal(other)
    after = generator.tokenize("\nWho?")
    assert "entry_masks" not in assemble([[other, after]], generator).inputs()
    assert_close(logits_of(generator, [other, after]), read_slowly(generator, [one, after]))
