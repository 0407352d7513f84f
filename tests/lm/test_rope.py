"""Keys move exactly where frequencies are fixed, and models where they are not are refused.

EXACT: rounding of one float32 rotation of numbers of order 1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.models import ARCHITECTURES, make_model
from torch import Tensor
from torch.autograd import backward
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from sac_rag.errors import UnsupportedModelError
from sac_rag.lm.rope import frequencies_of, move, relocation_error, require_movable

EXACT = 1e-5
FREQUENCIES = 10000.0 ** -(torch.arange(8) / 8)

TINY = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 256,
    },
}


def config_with(rope_type: str) -> LlamaConfig:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]}
    return LlamaConfig(**TINY, rope_parameters=rope)


def tiny_model(name: str, **changes: Any) -> Any:
    """A model of another architecture than those of support.models, as loud as those."""
    config = getattr(transformers, f"{name}Config")(**{**TINY, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.15)
    return model


def some_keys(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3", "yarn"])
def test_fixed_frequencies_are_accepted(rope_type: str) -> None:
    require_movable(config_with(rope_type))


@pytest.mark.parametrize(
    "config", [Qwen2Config(), MistralConfig(sliding_window=None)], ids=lambda c: c.model_type
)
def test_a_window_that_is_not_used_is_accepted(config: PretrainedConfig) -> None:
    require_movable(config)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused_by_name(rope_type: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"llama: .*'{rope_type}' changes its frequencies"
    ):
        require_movable(config_with(rope_type))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(sliding_window=4096), "mistral: .* sliding window of 4096"),
        (
            Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1),
            r"qwen2: .* layers of type \['sliding_attention'\]",
        ),
        (Gemma3TextConfig(), r"gemma3_text: .* layers of type \['sliding_attention'\]"),
        (
            Gemma3TextConfig(num_hidden_layers=2, layer_types=["full_attention"] * 2),
            "gemma3_text: .* one rotary position embedding",
        ),
        (Qwen3NextConfig(), r"qwen3_next: .* layers of type \['linear_attention'\]"),
        (GPT2Config(), "gpt2: .* one rotary position embedding"),
    ],
    ids=["mistral", "qwen2", "gemma3", "gemma3_two_ropes", "qwen3_next", "gpt2"],
)
def test_layers_that_do_not_attend_everywhere_are_refused_by_name(
    config: PretrainedConfig, message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        require_movable(config)


def test_a_refusal_names_what_can_be_used_instead() -> None:
    with pytest.raises(UnsupportedModelError, match=r"use a Llama, Qwen2, .* or Qwen3"):
        require_movable(MistralConfig(sliding_window=4096))


def test_frequencies_are_the_models_own() -> None:
    model = make_model("llama3")
    assert torch.equal(frequencies_of(model), model.model.rotary_emb.inv_freq)


def test_a_model_that_hides_its_frequencies_is_refused() -> None:
    model = make_model("llama")
    del model.model.rotary_emb
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: .*rotary_emb\.inv_freq"):
        frequencies_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_moving_by_nothing_changes_nothing(dtype: torch.dtype) -> None:
    keys = some_keys(dtype)
    moved = move(keys, 0, FREQUENCIES)
    assert moved.dtype == dtype
    assert torch.equal(moved, keys)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (510, 17), (3000, 2500), (40, -40)])
def test_two_moves_equal_their_sum(first: int, second: int) -> None:
    twice = move(move(some_keys(), first, FREQUENCIES), second, FREQUENCIES)
    torch.testing.assert_close(
        twice, move(some_keys(), first + second, FREQUENCIES), atol=EXACT, rtol=0
    )


def test_a_move_equals_the_rotation_of_complex_numbers() -> None:
    keys = some_keys()
    turned = torch.complex(keys[..., :8].double(), keys[..., 8:].double()) * torch.polar(
        torch.ones(8, dtype=torch.float64), 1234 * FREQUENCIES.double()
    )
    expected = torch.cat([turned.real, turned.imag], dim=-1).float()
    torch.testing.assert_close(move(keys, 1234, FREQUENCIES), expected, atol=EXACT, rtol=0)


def test_each_anchor_may_have_its_own_offset() -> None:
    offsets = [0, 3, 500, 7, 12]
    moved = move(some_keys(), torch.tensor(offsets), FREQUENCIES)
    for anchor, offset in enumerate(offsets):
        alone = move(some_keys()[:, :, [anchor]], offset, FREQUENCIES)
        assert torch.equal(moved[:, :, [anchor]], alone)


def test_components_that_are_not_rotated_stay_as_they_are() -> None:
    keys = some_keys()
    moved = move(keys, 777, FREQUENCIES[:3])
    assert torch.equal(moved[..., 6:], keys[..., 6:])
    assert not torch.equal(moved[..., :6], keys[..., :6])


def test_moving_leaves_the_stored_keys_alone() -> None:
    keys = some_keys()
    move(keys, 99, FREQUENCIES)
    assert torch.equal(keys, some_keys())


def test_gradients_turn_back() -> None:
    keys = some_keys().requires_grad_()
    weights = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
    backward((move(keys, 321, FREQUENCIES) * weights).sum())
    assert keys.grad is not None
    torch.testing.assert_close(keys.grad, move(weights, -321, FREQUENCIES), atol=EXACT, rtol=0)


def test_a_rounded_key_is_rotated_before_it_is_rounded_again() -> None:
    keys = some_keys(torch.bfloat16)
    expected = move(keys.float(), 4000, FREQUENCIES).bfloat16()
    assert torch.equal(move(keys, 4000, FREQUENCIES), expected)


@pytest.mark.parametrize("offset", [1, 509, 3000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moved_keys_are_those_that_the_model_computes_there(architecture: str, offset: int) -> None:
    model = make_model(architecture).eval()
    assert relocation_error(model, frequencies_of(model), offset) < 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {"rope_parameters": config_with("yarn").rope_parameters}),
        ("Llama", {"rope_parameters": config_with("linear").rope_parameters}),
        ("Mistral", {"sliding_window": None}),
        ("Phi", {"hidden_size": 64}),  # rotates half of each head
        ("Gemma", {}),
        ("Olmo2", {}),
    ],
    ids=["yarn", "linear", "mistral", "phi", "gemma", "olmo2"],
)
def test_moving_is_exact_on_other_models_of_the_same_convention(
    name: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(name, **changes)
    assert relocation_error(model, frequencies_of(model), 1777) < 1e-3


@pytest.mark.parametrize("name", ["Cohere", "Glm", "SmolLM3"])
def test_another_convention_shows_as_a_large_error(name: str) -> None:
    """Neighbours rotated as pairs (Cohere, GLM), layers that are not rotated at all (SmolLM3)."""
    model = tiny_model(name)
    assert relocation_error(model, frequencies_of(model), 509) > 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda f: f * 1.1,
        lambda f: f.flip(0),
        lambda f: f * 0,
        lambda f: -f,
        lambda f: f[:4],
    ],
    ids=["ten percent off", "reversed", "not moved", "backwards", "half of them"],
)
def test_wrong_frequencies_show_as_a_large_error(wrong: Any) -> None:
    model = make_model("llama").eval()
    assert relocation_error(model, wrong(frequencies_of(model)), 509) > 0.1
