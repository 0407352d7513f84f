"""AnchorKV in eight bits a number. Knows nothing of models, or of where the bits lie.

The keys of a channel lie around a mean of its own, and a few channels spread far wider than the
rest: each gets a scale and an offset. Values have no such channels: each token gets a scale.
`sac-rag bench dtypes` measures what this costs.

Tried for keys, and no better or worse: one scale a token; one for both channels that RoPE mixes;
RoPE undone before rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sac_rag.kv import AnchorKV

_LARGEST = 127  # -128 is left out: codes reach as far to either side
_TINY = torch.finfo(torch.bfloat16).tiny


class QuantizedKV(AnchorKV):
    """An AnchorKV kept in 8 bits a number.

    Keys and values are worked out whenever they are asked for, in float32. A code times its scale
    has 15 binary digits, so they are the same bits on every device.

    Args:
        tensors: What it is kept as, with (layers, kv_heads, anchors, head_dim) for the shape S:
            key_codes, value_codes: int8. Shape: S
            key_scales, key_offsets: bfloat16. Shape: S with one anchor
            value_scales: bfloat16. Shape: S with one head_dim
            positions: As AnchorKV has them.
        num_tokens: Source tokens in the chunk.

    Raises:
        ValueError: if names, shapes, dtypes or counts do not fit together.
    """

    _tensors: dict[str, Tensor]

    def __init__(self, tensors: Mapping[str, Tensor], num_tokens: int) -> None:
        _require_fitting(tensors)
        # Past the frozen class's own __setattr__, as its own __init__ does.
        object.__setattr__(self, "_tensors", dict(tensors))
        object.__setattr__(self, "positions", tensors["positions"])
        object.__setattr__(self, "num_tokens", num_tokens)
        self._require_places()

    @property
    def keys(self) -> Tensor:
        """Float32. Shape: (layers, kv_heads, anchors, head_dim)."""
        codes, scales, offsets = (self._tensors[f"key_{n}"] for n in ("codes", "scales", "offsets"))
        return codes.float().mul_(scales.float()).add_(offsets.float())

    @property
    def values(self) -> Tensor:
        """Float32. Shape: (layers, kv_heads, anchors, head_dim)."""
        codes, scales = self._tensors["value_codes"], self._tensors["value_scales"]
        return codes.float().mul_(scales.float())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of keys, and of values: (layers, kv_heads, anchors, head_dim)."""
        return tuple(self._tensors["key_codes"].shape)

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are worked out in."""
        return torch.float32

    def tensors(self) -> dict[str, Tensor]:
        """What it is kept as, by name."""
        return dict(self._tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedKV:
        """The same value of other tensors: copies, or those on another device."""
        changed = {name: change(tensor) for name, tensor in self._tensors.items()}
        return QuantizedKV(changed, self.num_tokens)


def quantize(kv: AnchorKV) -> QuantizedKV:
    """Rounds keys and values to 8 bits, each to half a step or less.

    Raises:
        ValueError: if they hold an infinity or NaN.
    """
    keys, values = kv.keys.detach().float(), kv.values.detach().float()
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ValueError(
            "keys and values must be finite to be stored in int8, were not; the model overflows: "
            "compute in bfloat16 or float32"
        )
    # Halved first: the sum of the two could be too large.
    offsets = (keys.amax(2, keepdim=True) / 2 + keys.amin(2, keepdim=True) / 2).bfloat16()
    key_codes, key_scales = _codes(keys - offsets.float(), over=2)
    value_codes, value_scales = _codes(values, over=3)
    tensors = {
        "key_codes": key_codes,
        "key_scales": key_scales,
        "key_offsets": offsets,
        "value_codes": value_codes,
        "value_scales": value_scales,
        "positions": kv.positions,
    }
    return QuantizedKV(tensors, kv.num_tokens)


def as_stored(kv: AnchorKV, dtype: str) -> AnchorKV:
    """What is kept of a value in a dtype: "int8", or the name of a floating one."""
    return quantize(kv) if dtype == "int8" else kv.to(dtype=getattr(torch, dtype))


def _codes(numbers: Tensor, over: int) -> tuple[Tensor, Tensor]:
    """Numbers as multiples of scales, one scale for all along a dimension."""
    scales = numbers.abs().amax(over, keepdim=True) / _LARGEST
    scales = scales.clamp_min(_TINY).bfloat16()
    # Where the scale was rounded down, the largest are cut off, by a quarter of a step at most.
    codes = (numbers / scales.float()).round_().clamp_(-_LARGEST, _LARGEST)
    return codes.to(torch.int8), scales


def _require_fitting(tensors: Mapping[str, Tensor]) -> None:
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    _, shape = found.get("key_codes", (None, ()))
    if len(shape) != 4:
        raise ValueError(
            "key_codes must have shape (layers, kv_heads, anchors, head_dim), "
            f"was: {found.get('key_codes')}"
        )
    codes = (torch.int8, shape)
    per_channel = (torch.bfloat16, (*shape[:2], 1, shape[3]))
    expected = {
        "key_codes": codes,
        "key_scales": per_channel,
        "key_offsets": per_channel,
        "value_codes": codes,
        "value_scales": (torch.bfloat16, (*shape[:3], 1)),
        "positions": found.get("positions"),
    }
    if found != expected:
        raise ValueError(f"expected {expected}, got {found}")
