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
_PER_CHANNEL = frozenset({"key_scales", "key_offsets"})  # the other tensors are of entries


class QuantizedKV(AnchorKV):
    """An AnchorKV kept in 8 bits a number.

    Keys and values are worked out whenever they are asked for, in float32. A code times its scale
    has 15 binary digits, so they are the same bits on every device.

    Args:
        tensors: What it is kept as:
            key_codes, value_codes: int8. Shape: (entries, head_dim)
            value_scales: bfloat16. Shape: (entries,)
            key_scales, key_offsets: bfloat16. Shape: (layers, kv_heads, head_dim)
            positions, heads: As AnchorKV has them.
        num_tokens: Source tokens in the chunk.

    Raises:
        ValueError: if names, shapes, dtypes or counts do not fit together.
    """

    _tensors: dict[str, Tensor]

    def __init__(self, tensors: Mapping[str, Tensor], num_tokens: int) -> None:
        num_layers, num_kv_heads = _require_fitting(tensors)
        # Past the frozen class's own __setattr__, as its own __init__ does.
        for name, value in (
            ("_tensors", dict(tensors)),
            ("positions", tensors["positions"]),
            ("heads", tensors["heads"]),
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("num_tokens", num_tokens),
        ):
            object.__setattr__(self, name, value)
        self._require_places(len(tensors["key_codes"]))

    @property
    def keys(self) -> Tensor:
        """Float32. Shape: (entries, head_dim)."""
        codes, scales, offsets = (self._tensors[f"key_{n}"] for n in ("codes", "scales", "offsets"))
        heads = self.heads.int()
        scale = scales.flatten(0, 1).float().index_select(0, heads)
        return codes.float().mul_(scale).add_(offsets.flatten(0, 1).float().index_select(0, heads))

    @property
    def values(self) -> Tensor:
        """Float32. Shape: (entries, head_dim)."""
        codes, scales = self._tensors["value_codes"], self._tensors["value_scales"]
        return codes.float().mul_(scales.float()[:, None])

    @property
    def head_dim(self) -> int:
        """Width of a key, and of a value."""
        return self._tensors["key_codes"].shape[-1]

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

    def first(self, entries: int) -> QuantizedKV:
        """The first entries alone, as views: the same chunk at a higher ratio.

        Raises:
            ValueError: if there are not so many.
        """
        if not 1 <= entries <= self.num_entries:
            raise ValueError(f"entries must be from 1 to {self.num_entries}, was: {entries}")
        cut = {
            name: tensor if name in _PER_CHANNEL else tensor[:entries]
            for name, tensor in self._tensors.items()
        }
        return QuantizedKV(cut, self.num_tokens)


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
    heads = kv.heads.long()
    highest, lowest = (_of_channels(keys, heads, kv, reduce) for reduce in ("amax", "amin"))
    # Halved first: the sum of the two could be too large.
    offsets = (highest / 2 + lowest / 2).bfloat16()
    centred = keys - offsets.float()[heads]
    key_scales = _scales(_of_channels(centred.abs(), heads, kv, "amax"))
    value_scales = _scales(values.abs().amax(1))
    by_head = (kv.num_layers, kv.num_kv_heads, kv.head_dim)
    tensors = {
        "key_codes": _codes(centred, key_scales[heads]),
        "key_scales": key_scales.view(by_head),
        "key_offsets": offsets.view(by_head),
        "value_codes": _codes(values, value_scales[:, None]),
        "value_scales": value_scales,
        "positions": kv.positions,
        "heads": kv.heads,
    }
    return QuantizedKV(tensors, kv.num_tokens)


def as_stored(kv: AnchorKV, dtype: str) -> AnchorKV:
    """What is kept of a value in a dtype: "int8", or the name of a floating one."""
    return quantize(kv) if dtype == "int8" else kv.to(dtype=getattr(torch, dtype))


def _of_channels(numbers: Tensor, heads: Tensor, kv: AnchorKV, reduce: str) -> Tensor:
    """The largest or smallest number of each head's channels, 0 for a head without entries.

    Returns:
        Shape: (layers * kv_heads, head_dim)
    """
    none = numbers.new_zeros(kv.num_layers * kv.num_kv_heads, kv.head_dim)
    return none.scatter_reduce(
        0, heads[:, None].expand_as(numbers), numbers, reduce, include_self=False
    )


def _scales(largest: Tensor) -> Tensor:
    return (largest / _LARGEST).clamp_min(_TINY).bfloat16()


def _codes(numbers: Tensor, scales: Tensor) -> Tensor:
    """Numbers as multiples of their scales."""
    # Where the scale was rounded down, the largest are cut off, by a quarter of a step at most.
    return (numbers / scales.float()).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)


def _require_fitting(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Layers and KV heads of tensors that fit together."""
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    _, codes = found.get("key_codes", (None, ()))
    _, channels = found.get("key_scales", (None, ()))
    if len(codes) != 2 or len(channels) != 3:
        raise ValueError(
            "key_codes must have shape (entries, head_dim) and key_scales (layers, kv_heads, "
            f"head_dim), were: {codes} and {channels}"
        )
    per_channel = (torch.bfloat16, (*channels[:2], codes[1]))
    expected = {
        "key_codes": (torch.int8, codes),
        "key_scales": per_channel,
        "key_offsets": per_channel,
        "value_codes": (torch.int8, codes),
        "value_scales": (torch.bfloat16, codes[:1]),
        "positions": found.get("positions"),
        "heads": found.get("heads"),
    }
    if found != expected:
        raise ValueError(f"expected {expected}, got {found}")
    return channels[0], channels[1]
