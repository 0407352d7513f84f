"""Moves rotated keys to another position. Knows nothing of chunks, prompts or stores.

RoPE turns each pair of key components by an angle proportional to the key's position, and attention
sees only differences of positions. So a key computed at one place becomes the key of another place
by one more rotation, exactly up to rounding, wherever the frequencies are fixed numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sac_rag.errors import UnsupportedModelError

# Types whose frequencies do not depend on the length of the input. YaRN also scales cos and sin,
# but that factor is already in the key; turning it further needs none.
MOVABLE_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def require_movable(config: Any) -> None:
    """Refuses, by name, models whose keys a rotation cannot move.

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
    """The rotary frequencies that the loaded model itself uses, in radians per token.

    Returns:
        Shape: (rotated_dims / 2,)

    Raises:
        UnsupportedModelError: if the model is refused by `require_movable`, or keeps its
            frequencies anywhere but in one `rotary_emb` of its decoder.
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
    """Turns keys as if their tokens stood `offset` positions further on.

    The angle is taken in float64 and the rotation done in float32 whatever the keys' dtype, so that
    a moved key is as exact as its stored bits.

    Args:
        keys: Shape: (..., anchors, head_dim)
        offset: Positions to move by, one for all, or one for each anchor. Shape: () or (anchors,)
        frequencies: Shape: (rotated_dims / 2,), where rotated_dims <= head_dim

    Returns:
        The moved keys, in the keys' own dtype. Shape: (..., anchors, head_dim)
    """
    offset = torch.as_tensor(offset, device=keys.device)
    angles = offset.double()[..., None] * frequencies.to(keys.device).double()
    cos, sin = angles.cos().float(), angles.sin().float()
    half = frequencies.shape[0]
    widths = [half, half, keys.shape[-1] - 2 * half]
    first, second, unrotated = torch.split(keys, widths, dim=-1)
    first, second = first.float(), second.float()
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(part.to(keys.dtype) for part in turned), unrotated], dim=-1)


@torch.no_grad()
def relocation_error(model: Any, frequencies: Tensor, offset: int) -> float:
    """How far moved keys and values are from those the model computes at that place itself.

    Reads a few fixed tokens at position 0 and again at `offset`.

    Returns:
        The largest relative error (Frobenius norm) over keys and values of all layers: rounding
        only where the model can be moved, about 1 where it cannot.
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
