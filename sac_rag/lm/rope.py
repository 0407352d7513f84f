"""Moves rotated keys to another position.

RoPE rotates each pair of key components by an angle proportional to the key's position, and
attention depends only on differences of positions. One more rotation therefore turns the key of one
position into the key of another, exactly up to rounding, if the frequencies are constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sac_rag.errors import UnsupportedModelError

# Types whose frequencies do not depend on the length of the input. YaRN also scales cos and sin,
# but that factor is in the key already; rotating it further needs none.
MOVABLE_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def require_movable(config: Any) -> None:
    """Raises UnsupportedModelError for models whose keys a rotation cannot move.

    Args:
        config: The HF config of a causal LM.

    Raises:
        UnsupportedModelError: for RoPE whose frequencies change with the input's length (dynamic
            NTK, longrope), several RoPEs in one model, sliding windows, and layers that keep no KV.
    """
    name = getattr(config, "model_type", type(config).__name__)
    remedy = "use a Llama, Qwen2, Qwen2.5 or Qwen3 type of model, or on_miss='text' elsewhere"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types - {"full_attention"}:
        raise UnsupportedModelError(
            f"{name}: every layer must attend to all positions, but the model has layers of type "
            f"{sorted(layer_types - {'full_attention'})}; {remedy}"
        )
    if not layer_types and getattr(config, "sliding_window", None):
        raise UnsupportedModelError(
            f"{name}: every layer must attend to all positions, but the model has a sliding window "
            f"of {config.sliding_window}; {remedy}"
        )
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModelError(
            f"{name}: the model must have one rotary position embedding, its config has "
            f"rope_parameters={rope!r}; {remedy}"
        )
    rope_type = rope.get("rope_type", "default")
    if rope_type not in MOVABLE_ROPE_TYPES:
        raise UnsupportedModelError(
            f"{name}: keys can be moved for RoPE types {', '.join(MOVABLE_ROPE_TYPES)}, "
            f"but this model's {rope_type!r} changes its frequencies with the length; {remedy}"
        )


def frequencies_of(model: Any) -> Tensor:
    """The rotary frequencies that a loaded model uses, in radians per token.

    Returns:
        Shape: (rotated_dims / 2,)

    Raises:
        UnsupportedModelError: if `require_movable` refuses the model, or its decoder has no single
            `rotary_emb` with the frequencies.
    """
    require_movable(model.config)
    rotary = getattr(getattr(model, "base_model", model), "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    if not isinstance(frequencies, Tensor):
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected the decoder to have rotary_emb.inv_freq, found none"
        )
    return frequencies.detach()


def move(keys: Tensor, offset: int | Tensor, frequencies: Tensor) -> Tensor:
    """Rotates keys to the positions `offset` further.

    Angles are computed in float64 and the rotation in float32, whatever the keys' dtype, so that a
    moved key is as exact as its stored bits.

    Args:
        keys: Shape: (..., anchors, head_dim)
        offset: Positions to move by, one for all or one per anchor. Shape: () or (anchors,)
        frequencies: Shape: (rotated_dims / 2,), where rotated_dims <= head_dim

    Returns:
        The moved keys, in the dtype of `keys`. Shape: (..., anchors, head_dim)
    """
    offset = torch.as_tensor(offset, device=keys.device)
    angles = offset.double()[..., None] * frequencies.to(keys.device).double()
    cos, sin = angles.cos().float(), angles.sin().float()
    half = frequencies.shape[0]
    widths = [half, half, keys.shape[-1] - 2 * half]
    first, second, unrotated = torch.split(keys, widths, dim=-1)
    first, second = first.float(), second.float()
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(part.to(keys.dtype) for part in rotated), unrotated], dim=-1)


@torch.no_grad()
def relocation_error(model: Any, frequencies: Tensor, offset: int) -> float:
    """Error of moved keys and values against those that the model computes at the position.

    Reads a few fixed tokens at position 0 and again at `offset`.

    Returns:
        The largest relative error (Frobenius norm) over keys and values of all layers: rounding if
        the model's keys can be moved, about 1 otherwise.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(24, device=model.device) * 7919 + 13) % vocabulary
    positions = torch.arange(24, device=model.device)

    def read(at: int) -> Any:
        return model.base_model(
            input_ids=ids[None], position_ids=positions[None] + at, use_cache=True
        ).past_key_values

    def relative(got: Tensor, expected: Tensor) -> float:
        difference = (got.float() - expected.float()).norm()
        return float(difference / expected.float().norm().clamp_min(1e-12))

    errors = []
    for here, there in zip(read(0).layers, read(offset).layers, strict=True):
        errors.append(relative(move(here.keys, offset, frequencies), there.keys))
        errors.append(relative(here.values, there.values))
    return float(torch.tensor(errors).max())  # NaN if any is, which Python's max would lose
