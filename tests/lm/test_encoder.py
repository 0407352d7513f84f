"""The encoder is the model's decoder stack, to the bit, without the work that KV does not need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import ARCHITECTURES, PROSE, make_compressor
from torch import Tensor

from sac_rag.cached import CachedCompressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.sac import SAC
from sac_rag.lm.encoder import without_last_mlp
from sac_rag.lm.generator import Generator


def cached(stack: Any, generator: Generator) -> list[Tensor]:
    """Keys and values of every layer, of one text."""
    ids = torch.tensor([generator.tokenize(" ".join(PROSE))])
    with generator.running(), torch.no_grad():
        layers = stack(input_ids=ids, use_cache=True).past_key_values.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def parameters(generator: Generator) -> dict[str, Tensor]:
    """The model's own, adapters left out."""
    return {
        name.replace(".base_layer", ""): parameter.clone()
        for name, parameter in generator.model.named_parameters()
        if ".lora_" not in name
    }


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_encoder_caches_the_bits_of_the_whole_model(
    generator: Generator, make_generator: Any, attention: str
) -> None:
    other = make_generator(generator.model.config.model_type, attention)
    whole, short = cached(other.model, other), cached(other.encoder, other)
    assert len(whole) == len(short) == 2 * other.kv_shape[0]
    assert all(torch.equal(a, b) for a, b in zip(whole, short, strict=True))


def test_the_encoder_runs_every_mlp_but_the_last_and_the_model_still_runs_it(
    make_generator: Any,
) -> None:
    generator = make_generator("llama")
    ran: list[int] = []
    for number, layer in enumerate(generator.model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    cached(generator.encoder, generator)
    assert ran == [0, 1]
    cached(generator.model, generator)
    assert ran == [0, 1, 0, 1, 2]


def test_a_stack_whose_last_layer_has_no_mlp_is_left_whole(make_generator: Any) -> None:
    stack = make_generator("llama").model.base_model
    mlp = stack.layers[-1].mlp
    del stack.layers[-1].mlp
    assert without_last_mlp(stack) is stack
    stack.layers[-1].mlp = mlp
    assert without_last_mlp(stack) is not stack


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_lora_gives_the_same_anchors_but_for_rounding(
    make_generator: Any, architecture: str
) -> None:
    compressor = make_compressor(
        make_generator(architecture), "sac", lora_targets=("q_proj", "v_proj", "down_proj")
    )
    plain, merged = compressor.compress(PROSE[:3]), compressor.merged().compress(PROSE[:3])
    frozen = SAC(compressor.generator, CompressorConfig(sink=compressor.config.sink, ratio=3))
    without = frozen.compress(PROSE[:3])
    for one, other, base in zip(plain, merged, without, strict=True):
        assert relative(other.keys, one.keys) < 1e-5 > relative(other.values, one.values)
        # The last layer's values are far from the frozen model's: LoRA is in there.
        assert relative(base.values[-1], one.values[-1].to(base.dtype)) > 1e-2


def test_merging_leaves_the_models_weights_as_they_were_to_the_bit(make_generator: Any) -> None:
    generator = make_generator("llama")
    before = parameters(generator)
    compressor = make_compressor(generator, "sac")
    other = make_compressor(generator, "sac", lora_targets=("k_proj", "o_proj"))
    for each in (compressor, other):
        each.merged().compress(PROSE[:2])
    after = parameters(generator)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_merged_compressor_has_one_adapter_and_not_another_compressors(
    make_generator: Any,
) -> None:
    generator = make_generator("llama")
    alone = make_compressor(make_generator("llama"), "sac").merged().compress(PROSE[:2])
    compressor = make_compressor(generator, "sac")
    make_compressor(generator, "sac", lora_rank=2).compress(PROSE[:1])
    beside = compressor.merged().compress(PROSE[:2])
    assert all(a.bit_equal(b) for a, b in zip(alone, beside, strict=True))


def test_what_is_cached_is_merged_at_first_use_and_once(make_generator: Any) -> None:
    compressor = make_compressor(make_generator("llama"), "sac")
    merged = compressor.merged()
    assert merged is not compressor and merged.merged() is merged
    encoder = merged._merged_encoder
    assert encoder is merged.at_ratio(5)._merged_encoder
    assert encoder.cache_info().currsize == 0  # type: ignore[union-attr]
    cached = CachedCompressor(merged, {})
    cached.compress(PROSE[:2])
    assert cached.inner is merged
    assert encoder() is encoder()  # type: ignore[misc]
    (expected,) = merged.compress(PROSE[:1])
    assert cached.compress(PROSE[:1])[0].num_anchors == expected.num_anchors


def test_a_compressor_without_lora_is_merged_as_it_is(llama: Generator) -> None:
    full = make_compressor(llama, "full")
    assert full.merged() is full


def test_training_goes_on_unmerged_with_gradients(make_generator: Any) -> None:
    compressor = make_compressor(make_generator("llama"), "sac")
    compressor.merged().compress(PROSE[:1])
    tokens = torch.tensor(compressor.tokenize(PROSE[0]))
    (kv,) = compressor.encode([tokens], [0])
    kv.values.sum().backward()
    gradients = [weight.grad for weight in compressor.weights.values() if weight.grad is not None]
    assert any(float(gradient.abs().sum()) > 0 for gradient in gradients)
