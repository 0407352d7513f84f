"""Compressors lay segments out as their method says, and encode them in padded passes.

ROUNDING: float32 sums of one layer in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from torch import Tensor

from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.layout import Layout, after_sink, causal
from sac_rag.compressors.sac import SAC
from sac_rag.errors import PromptTooLongError
from sac_rag.lm.generator import Generator

ROUNDING = 1e-4


SINK = "<|im_start|>system\n"


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    """A compressor that no test changes."""
    return make_compressor(llama, "sac")


@pytest.fixture
def own(make_generator: Callable[..., Generator]) -> Compressor:
    """A compressor on a generator of this test's own, to be changed."""
    return make_compressor(make_generator("llama"), "sac")


@contextmanager
def passes_of(generator: Generator) -> Iterator[list[tuple[int, int]]]:
    """Notes (rows, slots) of every forward pass of the decoder stack."""
    passes: list[tuple[int, int]] = []
    handle = generator.model.base_model.register_forward_hook(
        lambda module, args, output: passes.append(tuple(output[0].shape[:2]))
    )
    try:
        yield passes
    finally:
        handle.remove()


def rows_of(mask: Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ("causal", ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]),
        ("anchors", ["x....", "xxxxx", "xxx..", "xxxx.", "xxxxx"]),
        ("full", ["xxxxx"] * 5),
    ],
)
def test_who_attends_to_whom(llama: Generator, attention: str, expected: list[str]) -> None:
    compressor = make_compressor(llama, "sac", ratio=3, attention=attention)
    layout = compressor.layout(torch.tensor([9, 8, 7, 6, 5]))
    assert layout.anchors.tolist() == [1, 4]
    assert rows_of(layout.attends_to) == expected
    assert layout.positions.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("attention", ["causal", "anchors", "full"])
def test_a_sink_attends_to_itself_and_all_attend_to_it(llama: Generator, attention: str) -> None:
    compressor = make_compressor(llama, "sac", ratio=3, attention=attention)
    layout = compressor.layout(torch.tensor([9, 8, 7, 6, 5]))
    behind = after_sink(layout, llama.embed([1, 2]))
    assert rows_of(behind.attends_to[:2]) == ["x......", "xx....."]
    assert behind.attends_to[2:, :2].all()
    assert torch.equal(behind.attends_to[2:, 2:], layout.attends_to)
    assert behind.positions.tolist() == [-2, -1, 0, 1, 2, 3, 4]
    assert behind.anchors.tolist() == [3, 6]
    assert torch.equal(behind.embeds, torch.cat([llama.embed([1, 2]), layout.embeds]))


def test_no_sink_changes_nothing(sac: Compressor) -> None:
    layout = sac.layout(torch.tensor([9, 8, 7]))
    behind = after_sink(layout, sac.generator.embed([]))
    assert torch.equal(behind.attends_to, layout.attends_to)
    assert torch.equal(behind.embeds, layout.embeds)


def test_the_anchor_embedding_is_added_at_the_anchors_and_nowhere_else(own: Compressor) -> None:
    tokens = torch.tensor([9, 8, 7, 6, 5])
    plain, marked = own.generator.embed(tokens), own.layout(tokens).embeds
    for slot in (0, 2, 3):
        assert torch.equal(marked[slot], plain[slot])
    for slot in (1, 4):
        assert torch.equal(marked[slot], plain[slot] + own.weights["anchor_embedding"])


def test_full_keeps_every_token_of_plain_reading(llama: Generator) -> None:
    layout = make_compressor(llama, "full").layout(torch.tensor([9, 8, 7]))
    assert torch.equal(layout.attends_to, causal(3, llama.device))
    assert layout.anchors.tolist() == layout.positions.tolist() == [0, 1, 2]
    assert torch.equal(layout.embeds, llama.embed([9, 8, 7]))


def test_an_untrained_compressor_keeps_the_frozen_models_own_kv(
    make_generator: Callable[..., Generator],
) -> None:
    generator = make_generator("llama")
    settings: dict[str, Any] = {"ratio": 3, "sink": "", "stored_dtype": "float32"}
    untrained = SAC(generator, CompressorConfig(attention="causal", **settings))
    ids = generator.tokenize(PROSE[0])
    (kv,) = untrained.compress_tokens([ids])
    with torch.no_grad():
        layers = generator.model(torch.tensor([ids]), use_cache=True).past_key_values.layers
    keys, values, _ = kv.by_head()
    for layer, plain in enumerate(layers):
        torch.testing.assert_close(keys[layer], plain.keys[0, :, 1::3], atol=ROUNDING, rtol=0)
        torch.testing.assert_close(values[layer], plain.values[0, :, 1::3], atol=ROUNDING, rtol=0)


def test_lora_is_on_while_encoding_and_off_afterwards(own: Compressor) -> None:
    ids = torch.tensor([own.generator.tokenize(PROSE[0])])
    with torch.no_grad():
        plain = own.generator.model(ids).logits
    (with_lora,) = own.compress([PROSE[0]])
    with torch.no_grad():
        assert torch.equal(own.generator.model(ids).logits, plain)
        for name, weight in own.weights.items():
            if "lora_B" in name:
                weight.zero_()
    (without,) = own.compress([PROSE[0]])
    assert (with_lora.keys - without.keys).abs().max() > 0.01


@pytest.mark.parametrize("stored_dtype", ["float16", "bfloat16"])
def test_what_is_stored_is_the_rounded_float32(
    llama: Generator, sac: Compressor, stored_dtype: Any
) -> None:
    rounded = make_compressor(llama, "sac", stored_dtype=stored_dtype).compress(PROSE[:3])
    for kv, exact in zip(rounded, sac.compress(PROSE[:3]), strict=True):
        assert kv.bit_equal(exact.to(dtype=getattr(torch, stored_dtype)))


class EverySecond(SAC):
    """A method that keeps as many tokens as it likes, whatever the ratio."""

    method: ClassVar[str] = "every-second"

    def layout(self, tokens: Tensor) -> Layout:
        return replace(super().layout(tokens), anchors=torch.arange(0, len(tokens), 2))


def test_int8_keeps_all_that_a_method_keeps(llama: Generator, sac: Compressor) -> None:
    config = replace(sac.config, method="every-second", ratio=5)
    ids = llama.tokenize(PROSE[0])
    exact, rounded = (
        EverySecond(llama, replace(config, stored_dtype=dtype)).compress_tokens([ids])[0]
        for dtype in ("float32", "int8")
    )
    assert torch.equal(rounded.positions, exact.positions)
    assert rounded.num_entries == 6 * len(range(0, len(ids), 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_encodes(dtype: torch.dtype) -> None:
    generator = Generator(make_model("llama").to(dtype), make_tokenizer())
    stored = str(dtype).removeprefix("torch.")
    for kv in make_compressor(generator, "sac", stored_dtype=stored).compress(PROSE[:3]):
        assert kv.dtype == dtype
        assert kv.keys.isfinite().all()


def test_trained_weights_are_kept_in_float32_whatever_the_model(own: Compressor) -> None:
    """Small steps of training would be lost in bfloat16, and bits of a checkpoint too."""
    generator = Generator(make_model("llama").to(torch.bfloat16), make_tokenizer())
    compressor = make_compressor(generator, "sac")
    assert {weight.dtype for weight in compressor.weights.values()} == {torch.float32}


def test_positions_count_source_tokens(sac: Compressor) -> None:
    (kv,) = sac.compress_tokens([list(range(3, 13))])
    _, _, positions = kv.by_head()
    assert positions.tolist() == [[[1, 4, 7]] * 2] * 3
    assert kv.num_tokens == 10


def test_results_come_in_the_order_of_the_texts(sac: Compressor) -> None:
    texts = sorted(PROSE, key=len)
    for text, kv in zip(texts, sac.compress(texts), strict=True):
        (alone,) = sac.compress([text])
        assert kv.num_tokens == len(sac.tokenize(text))
        torch.testing.assert_close(kv.keys, alone.keys, atol=ROUNDING, rtol=ROUNDING)


def test_nothing_is_compressed_to_nothing(sac: Compressor) -> None:
    with passes_of(sac.generator) as passes:
        assert sac.compress([]) == []
    assert passes == []


@pytest.mark.parametrize("text", ["", " ", "\n\t\u2003"])
def test_a_text_without_text_is_refused(sac: Compressor, text: str) -> None:
    with pytest.raises(ValueError, match="a chunk must have text"):
        sac.compress(["a", text])


def test_a_text_longer_than_the_model_is_refused_before_any_work(sac: Compressor) -> None:
    with (
        passes_of(sac.generator) as passes,
        pytest.raises(PromptTooLongError, match=r"chunk 1 has 8[0-9]{3} tokens, .* 8192 positions"),
    ):
        sac.compress(["short", "lighthouse " * 4200])
    assert passes == []


def test_many_short_segments_share_passes(sac: Compressor) -> None:
    sink = len(sac.generator.tokenize(SINK, special=True))
    a_pass = Compressor.batch_tokens // (sink + 20)
    chunks = [[3 + (i + j) % 500 for j in range(20)] for i in range(a_pass * 2 + 1)]
    with passes_of(sac.generator) as passes:
        sac.compress_tokens(chunks)
    assert passes == [(a_pass, sink + 20), (a_pass, sink + 20), (1, sink + 20)]


def test_no_pass_is_larger_than_its_bound_unless_one_segment_is(llama: Generator) -> None:
    compressor = make_compressor(llama, "sac", segment_tokens=Compressor.batch_tokens)
    lengths = [Compressor.batch_tokens, 900, 30, 700, 5, 1000, 1, 300]
    with passes_of(llama) as passes:
        compressor.compress_tokens([[7] * length for length in lengths])
    assert sum(rows for rows, _ in passes) == len(lengths)
    assert all(rows == 1 or rows * slots <= Compressor.batch_tokens for rows, slots in passes)
    assert len(passes) < len(lengths)
