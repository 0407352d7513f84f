"""QuantizedKV: half the bytes, half a step away, and the same bits wherever it is read."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import PROSE, make_compressor

from sac_rag.cached import CachedCompressor
from sac_rag.kv import AnchorKV, QuantizedKV, quantize
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.assemble import assemble
from sac_rag.stores import AnchorStore, DiskStore, MemoryStore

KEY = "ab" * 32


def make_kv(seed: int = 0, dtype: torch.dtype = torch.float32, anchors: int = 40) -> AnchorKV:
    """Channels of means and spreads of their own, entries of sizes of their own.

    Heads keep different numbers of tokens, `anchors` on the average; the second one keeps none.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    counts = torch.tensor([2 * anchors, 0, anchors, anchors + 1, anchors, anchors - 1])
    entries = 6 * anchors
    heads = torch.arange(6).repeat_interleave(counts)[torch.randperm(entries, generator=random)]
    keys = normal(entries, 8) * normal(6, 8).exp()[heads] + 10 * normal(6, 8)[heads]
    values = normal(entries, 8) * normal(entries, 1).exp()
    return AnchorKV(
        keys=keys.to(dtype),
        values=values.to(dtype),
        positions=torch.randint(5 * anchors, (entries,), generator=random, dtype=torch.int32),
        heads=heads.short(),
        num_layers=2,
        num_kv_heads=3,
        num_tokens=5 * anchors,
    )


def half_a_step_off(exact: torch.Tensor, rounded: torch.Tensor, scales: torch.Tensor) -> bool:
    """At most, or the last bits of float32 off where an offset is far larger than the steps."""
    bound = scales.float() / 2 + exact.abs() * 2**-22
    return bool(((exact - rounded).abs() <= bound).all())


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]),
    st.sampled_from([0.0, 1.0, 1000.0]),
    st.integers(1, 20),
)
def test_every_number_is_rounded_by_half_a_step_at_most(
    seed: int, size: float, mean: float, anchors: int
) -> None:
    drawn = make_kv(seed, anchors=anchors)
    kv = replace(drawn, keys=(drawn.keys + mean) * size, values=drawn.values * size)
    quantized = quantize(kv)
    tensors = quantized.tensors()
    scales = tensors["key_scales"].flatten(0, 1)[kv.heads.long()]
    assert half_a_step_off(kv.keys, quantized.keys, scales)
    assert half_a_step_off(kv.values, quantized.values, tensors["value_scales"][:, None])


def test_equal_numbers_stay_exact_to_the_precision_of_their_offset() -> None:
    kv = replace(make_kv(), keys=torch.full((240, 8), 1.5), values=torch.zeros(240, 8))
    assert torch.equal(quantize(kv).keys, kv.keys)
    assert torch.equal(quantize(kv).values, kv.values)


def test_it_is_an_anchor_kv_of_float32_in_half_the_bytes_of_bfloat16() -> None:
    kv = make_kv(dtype=torch.bfloat16, anchors=200)
    quantized = quantize(kv)
    assert isinstance(quantized, AnchorKV)
    assert quantized.dtype == quantized.keys.dtype == quantized.values.dtype == torch.float32
    assert quantized.keys.shape == quantized.values.shape == kv.keys.shape
    assert quantized.kv_shape == kv.kv_shape == (2, 3, 8)
    assert (quantized.num_entries, quantized.num_tokens) == (1200, 1000)
    assert torch.equal(quantized.positions, kv.positions)
    assert torch.equal(quantized.heads, kv.heads)
    assert quantized.nbytes == sum(t.nbytes for t in quantized.tensors().values())
    codes = 2 * 1200 * 8
    assert codes < quantized.nbytes < 0.68 * kv.nbytes  # 8 numbers are few for a scale and a place


def test_quantizing_is_repeatable_and_what_is_quantized_is_worked_out_to_the_same_bits() -> None:
    quantized, again = quantize(make_kv()), quantize(make_kv())
    assert quantized.bit_equal(again)
    assert torch.equal(quantized.keys, again.keys)
    assert not quantized.bit_equal(quantize(make_kv(1)))
    assert not quantized.bit_equal(make_kv())


def test_it_cannot_be_changed_and_hands_out_copies() -> None:
    quantized = quantize(make_kv())
    with pytest.raises(FrozenInstanceError):
        quantized.num_tokens = 7  # type: ignore[misc]
    quantized.tensors().clear()
    quantized.keys.zero_()
    assert quantized.bit_equal(quantize(make_kv()))


def test_another_dtype_is_a_plain_value_and_another_device_is_not() -> None:
    quantized = quantize(make_kv())
    assert type(quantized.to(dtype=torch.bfloat16)) is AnchorKV
    assert quantized.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    moved = quantized.to("cpu")
    assert type(moved) is QuantizedKV
    assert moved.bit_equal(quantized)
    there = quantized.to("meta")
    assert type(there) is QuantizedKV
    assert there.keys.device.type == "meta"


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_what_is_not_finite_is_refused(bad: float, name: str) -> None:
    kv = make_kv()
    getattr(kv, name)[0, 0] = bad
    with pytest.raises(ValueError, match="must be finite to be kept"):
        quantize(kv)


@pytest.mark.parametrize(
    ("changes", "num_tokens", "message"),
    [
        ({"key_codes": torch.zeros(240, 8)}, 200, "expected .* got"),
        ({"key_codes": torch.zeros(6, 40, 8).char()}, 200, "key_codes must have shape"),
        ({"key_scales": torch.zeros(6, 8).bfloat16()}, 200, "key_codes must have shape"),
        ({"value_codes": torch.zeros(239, 8).char()}, 200, "expected .* got"),
        ({"key_scales": torch.zeros(2, 3, 7).bfloat16()}, 200, "expected .* got"),
        ({"key_offsets": torch.zeros(2, 3, 8)}, 200, "expected .* got"),
        ({"value_scales": torch.zeros(239).bfloat16()}, 200, "expected .* got"),
        ({"more": torch.zeros(1)}, 200, "expected .* got"),
        ({"positions": torch.zeros(239).int()}, 200, "positions must be"),
        (
            {"positions": torch.zeros(239).int(), "heads": torch.zeros(239).short()},
            200,
            "positions must be",
        ),
        ({"heads": torch.full((240,), 6).short()}, 200, "heads must be from 0 to 5"),
        ({}, 39, "at most one per token and head"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    changes: dict[str, Any], num_tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedKV({**quantize(make_kv()).tensors(), **changes}, num_tokens)


@pytest.mark.parametrize("name", sorted(quantize(make_kv()).tensors()))
def test_every_tensor_is_needed(name: str) -> None:
    tensors = quantize(make_kv()).tensors()
    del tensors[name]
    with pytest.raises(ValueError, match=r"key_codes|expected"):
        QuantizedKV(tensors, 200)


def test_the_first_entries_of_what_is_quantized_are_worked_out_to_the_same_bits() -> None:
    quantized = quantize(make_kv())
    part = quantized.first(7)
    assert type(part) is QuantizedKV
    assert torch.equal(part.keys, quantized.keys[:7])
    assert torch.equal(part.values, quantized.values[:7])
    assert torch.equal(part.heads, quantized.heads[:7])
    assert (part.kv_shape, part.num_tokens) == (quantized.kv_shape, 200)
    assert quantized.first(240).bit_equal(quantized)
    for entries in (0, 241):
        with pytest.raises(ValueError, match=f"from 1 to 240, was: {entries}"):
            quantized.first(entries)


def test_every_store_gives_back_the_codes_themselves(store: AnchorStore) -> None:
    quantized = quantize(make_kv())
    store[KEY] = quantized
    loaded = store[KEY]
    assert type(loaded) is QuantizedKV
    assert loaded.bit_equal(quantized)


def test_memory_counts_the_codes_and_keeps_no_batch_alive() -> None:
    store, quantized = MemoryStore(), quantize(make_kv())
    batch = torch.zeros(64, 240, 8, dtype=torch.int8)
    batch[3] = quantized.tensors()["key_codes"]
    store[KEY] = QuantizedKV({**quantized.tensors(), "key_codes": batch[3]}, quantized.num_tokens)
    assert store[KEY].bit_equal(quantized)
    assert store.nbytes == quantized.nbytes
    codes = store[KEY].tensors()["key_codes"]
    assert codes.untyped_storage().nbytes() == codes.nbytes


def test_a_compressor_hands_over_what_a_store_would_read(llama: Generator, disk: DiskStore) -> None:
    compressor = CachedCompressor(make_compressor(llama, "sac", stored_dtype="int8"), disk)
    texts = [*PROSE[:3], " ".join(PROSE)]
    computed, read = compressor.compress(texts), compressor.compress(texts)
    assert all(type(kv) is QuantizedKV for kv in (*computed, *read))
    assert all(a.bit_equal(b) for a, b in zip(computed, read, strict=True))
    assert len(disk) == len(texts)


def test_a_chunk_of_several_segments_is_quantized_as_a_whole(llama: Generator) -> None:
    text = " ".join(PROSE)
    settings = {"segment_tokens": 40}
    (exact,) = make_compressor(llama, "sac", **settings).compress([text])
    compressor = make_compressor(llama, "sac", stored_dtype="int8", **settings)
    (rounded,) = compressor.compress([text])
    assert exact.num_tokens > 80
    assert rounded.bit_equal(quantize(exact))


def test_it_reads_like_the_value_it_was_made_of(llama: Generator) -> None:
    compressor = make_compressor(llama, "full")
    (exact,) = compressor.compress([PROSE[0]])
    question = llama.tokenize(PROSE[1])

    def logits(kv: AnchorKV) -> torch.Tensor:
        prompt = assemble([[llama.tokenize("a"), kv, question]], llama)
        with llama.running() as model, torch.inference_mode():
            out: torch.Tensor = model(**prompt.inputs()).logits
        return out[0, -len(question) :]

    plain, rounded = logits(exact), logits(quantize(exact))
    assert not torch.equal(plain, rounded)
    # Rounding alone: without any anchors the logits are another text's.
    without = logits(replace(exact, keys=exact.keys * 0, values=exact.values * 0))
    assert (plain - rounded).norm() < 0.05 * (plain - without).norm()


def test_answers_report_the_bytes_that_were_stored(llama: Generator, disk: DiskStore) -> None:
    reports = {}
    for stored in ("float32", "int8"):
        compressor = make_compressor(llama, "sac", stored_dtype=stored)
        rag = SacRAG(CachedCompressor(compressor, disk))
        rag.precompress([PROSE[0]])
        answer = rag.answer("How many ships?", [PROSE[0]])
        assert answer.chunks[0].status == "hit"
        reports[stored] = answer.usage.kv_bytes
        assert reports[stored] == disk[rag.compressor.key(PROSE[0])].nbytes
    assert reports["int8"] < 0.5 * reports["float32"]
