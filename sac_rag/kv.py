"""AnchorKV, the compressed form of a chunk, and QuantizedKV, the same in 8 bits per number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_LARGEST_HEAD = torch.iinfo(torch.int16).max
_LARGEST_CODE = 127  # -128 is not used: codes are symmetric around 0
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny
_PER_CHANNEL = frozenset({"key_scales", "key_offsets"})  # all other tensors have one row per entry


@dataclass(frozen=True, eq=False)
class AnchorKV:
    """What the generator attends to in place of a chunk of text.

    Each entry is the key and the value that one KV head of one layer keeps of one token; heads may
    keep different tokens, and different numbers of them. Entries are in order of importance where
    the compressor ranks them: the first ones are then the same chunk at a higher ratio.

    Keys are those computed at position 0; `rope.move` moves them to their place in a prompt, and
    moved keys are never stored.

    Attributes:
        keys: Rotated for positions counted from the chunk's first token.
            Shape: (entries, head_dim).
        values: Shape: (entries, head_dim).
        positions: Where in the chunk each entry's token sits, in source tokens, int32.
            Shape: (entries,).
        heads: Which head each entry belongs to, layer * kv_heads + head, int16. Shape: (entries,).
        num_layers: Layers of the generator.
        num_kv_heads: KV heads of each layer.
        num_tokens: Source tokens in the chunk, which determine where the next text starts.

    Raises:
        ValueError: if the shapes, dtypes or counts do not fit together.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    heads: Tensor
    num_layers: int
    num_kv_heads: int
    num_tokens: int

    def __post_init__(self) -> None:
        keys, values = self.keys, self.values
        if keys.ndim != 2 or values.shape != keys.shape:
            raise ValueError(
                "keys and values must both have shape (entries, head_dim), "
                f"were: {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        if not keys.is_floating_point() or keys.dtype != values.dtype:
            raise ValueError(
                "keys and values must share one floating dtype, "
                f"were: {keys.dtype} and {values.dtype}"
            )
        self._require_places(len(keys))

    def _require_places(self, num_entries: int) -> None:
        """Raises ValueError if positions, heads or counts do not fit the entries."""
        entries = (num_entries,)
        for name, tensor, dtype in (
            ("positions", self.positions, torch.int32),
            ("heads", self.heads, torch.int16),
        ):
            if tuple(tensor.shape) != entries or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} must be {dtype} of shape {entries}, "
                    f"were: {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        heads = self.num_layers * self.num_kv_heads
        if self.num_layers < 1 or self.num_kv_heads < 1 or heads > _LARGEST_HEAD + 1:
            raise ValueError(
                f"a generator must have from 1 to {_LARGEST_HEAD + 1} KV heads in all, "
                f"were: {self.num_layers} layers of {self.num_kv_heads}"
            )
        if not 1 <= self.num_entries <= heads * self.num_tokens:
            raise ValueError(
                "a chunk must have at least 1 entry and at most one per token and head, "
                f"were: {self.num_entries} for {self.num_tokens} tokens and {heads} heads"
            )
        # On other devices the host would have to wait, and untrusted values are never made there.
        if self.heads.device.type == "cpu":
            least, most = map(int, torch.aminmax(self.heads))
            if least < 0 or most >= heads:
                raise ValueError(f"heads must be from 0 to {heads - 1}, were: {least} to {most}")

    @property
    def num_entries(self) -> int:
        """Entries of all layers and heads together."""
        return len(self.positions)

    @property
    def num_anchors(self) -> int:
        """Entries per layer and KV head: their mean, rounded, at least 1."""
        return max(1, round(self.num_entries / (self.num_layers * self.num_kv_heads)))

    @property
    def ratio(self) -> float:
        """Source tokens per entry, mean over layers and heads."""
        return self.num_tokens * self.num_layers * self.num_kv_heads / self.num_entries

    @property
    def head_dim(self) -> int:
        """Width of keys and values."""
        return self.keys.shape[-1]

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(layers, kv_heads, head_dim), equal to that of the generator."""
        return self.num_layers, self.num_kv_heads, self.head_dim

    @property
    def counts(self) -> Tensor:
        """Entries of each head, int64. Shape: (layers, kv_heads)."""
        heads = self.num_layers * self.num_kv_heads
        counted = torch.bincount(self.heads.long(), minlength=heads)
        return counted.view(self.num_layers, self.num_kv_heads)

    @property
    def nbytes(self) -> int:
        """Bytes of `tensors()`."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype shared by keys and values."""
        return self.keys.dtype

    @property
    def is_finite(self) -> bool:
        """Whether no key and no value is an infinity or NaN."""
        numbers = (tensor for tensor in self.tensors().values() if tensor.is_floating_point())
        # A finite sum, which takes a twentieth of the time, has finite terms.
        return all(
            bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
            for tensor in numbers
        )

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name; the first dimension of each is that of entries."""
        return {
            "keys": self.keys,
            "values": self.values,
            "positions": self.positions,
            "heads": self.heads,
        }

    def map(self, change: Callable[[Tensor], Tensor]) -> AnchorKV:
        """The same value with changed tensors: copies, or tensors on another device."""
        changed: dict[str, Any] = {name: change(t) for name, t in self.tensors().items()}
        return replace(self, **changed)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AnchorKV:
        """The same value on another device or in another floating dtype."""
        moved = self if device is None else self.map(lambda tensor: tensor.to(device))
        if dtype is None:
            return moved
        return AnchorKV(
            keys=moved.keys.to(dtype),
            values=moved.values.to(dtype),
            positions=moved.positions,
            heads=moved.heads,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            num_tokens=self.num_tokens,
        )

    def first(self, entries: int) -> AnchorKV:
        """The first entries, as views: the same chunk at a higher ratio.

        Raises:
            ValueError: if there are fewer.
        """
        if not 1 <= entries <= self.num_entries:
            raise ValueError(f"entries must be from 1 to {self.num_entries}, was: {entries}")
        return self if entries == self.num_entries else self.map(lambda tensor: tensor[:entries])

    def by_head(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions with a dimension for heads, entries in text order.

        Returns:
            Keys and values, Shape: (layers, kv_heads, anchors, head_dim); positions, Shape:
            (layers, kv_heads, anchors)

        Raises:
            ValueError: if heads keep different numbers of entries.
        """
        counts = self.counts
        if not bool((counts == counts[0, 0]).all()):
            raise ValueError(
                "every head must have the same number of entries to be a row of one tensor, "
                f"were: {int(counts.min())} to {int(counts.max())}"
            )
        by_position = self.positions.argsort(stable=True)
        order = by_position[self.heads[by_position].argsort(stable=True)]
        heads = (self.num_layers, self.num_kv_heads, -1)
        return (
            self.keys[order].view(*heads, self.head_dim),
            self.values[order].view(*heads, self.head_dim),
            self.positions[order].view(heads),
        )

    def bit_equal(self, other: AnchorKV) -> bool:
        """Whether both hold the same bits in the same order, shapes and dtypes."""
        mine, theirs = self.tensors(), other.tensors()
        return (
            (self.num_layers, self.num_kv_heads, self.num_tokens)
            == (other.num_layers, other.num_kv_heads, other.num_tokens)
            and mine.keys() == theirs.keys()
            and all(
                tensor.shape == theirs[name].shape
                and tensor.dtype == theirs[name].dtype
                and torch.equal(_bytes_of(tensor), _bytes_of(theirs[name]))
                for name, tensor in mine.items()
            )
        )

    @classmethod
    def uniform(cls, keys: Tensor, values: Tensor, positions: Tensor, num_tokens: int) -> AnchorKV:
        """Makes an AnchorKV in which every head keeps the same number of tokens.

        Args:
            keys: Shape: (layers, kv_heads, anchors, head_dim).
            values: Shape: (layers, kv_heads, anchors, head_dim).
            positions: Shape: (anchors,), or (layers, kv_heads, anchors).
            num_tokens: Source tokens in the chunk.

        Raises:
            ValueError: if the shapes, dtypes or counts do not fit together.
        """
        if keys.ndim != 4 or values.shape != keys.shape:
            raise ValueError(
                "keys and values must both have shape (layers, kv_heads, anchors, head_dim), "
                f"were: {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        layers, kv_heads, anchors, _ = keys.shape
        if tuple(positions.shape) not in {(anchors,), (layers, kv_heads, anchors)}:
            raise ValueError(
                f"positions must have shape {(anchors,)} or {(layers, kv_heads, anchors)}, "
                f"was: {tuple(positions.shape)}"
            )
        heads = torch.arange(layers * kv_heads, dtype=torch.int16, device=keys.device)
        return cls(
            keys=keys.permute(2, 0, 1, 3).flatten(0, 2),
            values=values.permute(2, 0, 1, 3).flatten(0, 2),
            positions=positions.expand(layers, kv_heads, anchors).permute(2, 0, 1).flatten(),
            heads=heads.repeat(anchors),
            num_layers=layers,
            num_kv_heads=kv_heads,
            num_tokens=num_tokens,
        )

    @classmethod
    def join(cls, segments: Sequence[AnchorKV], order: Tensor | None = None) -> AnchorKV:
        """Concatenates a chunk's segments, each encoded at its place in the chunk.

        The segments' keys must already be rotated for, and their positions counted from, the
        chunk's first token.

        Args:
            segments: In the chunk's order.
            order: Indices of entries, counted through all segments, in order of importance.
                Default: the entries of the first segment, then those of the second, and so on.
                Shape: (entries,)

        Raises:
            ValueError: if there are no segments.
        """
        if not segments:
            raise ValueError("a chunk has at least one segment, got none")
        if len(segments) == 1:
            return segments[0]
        joined: dict[str, Any] = {
            name: torch.cat([segment.tensors()[name] for segment in segments])
            for name in segments[0].tensors()
        }
        if order is not None:
            joined = {name: tensor[order] for name, tensor in joined.items()}
        num_tokens = sum(segment.num_tokens for segment in segments)
        return replace(segments[0], **joined, num_tokens=num_tokens)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)


class QuantizedKV(AnchorKV):
    """An AnchorKV with keys and values in 8 bits per number.

    Each access of `keys` or `values` computes them in float32. A code times its scale has 15 binary
    digits, so the result has the same bits on every device.

    Args:
        tensors: The stored tensors:
            key_codes, value_codes: int8. Shape: (entries, head_dim)
            value_scales: bfloat16. Shape: (entries,)
            key_scales, key_offsets: bfloat16. Shape: (layers, kv_heads, head_dim)
            positions, heads: Those of AnchorKV.
        num_tokens: Source tokens in the chunk.

    Raises:
        ValueError: if names, shapes, dtypes or counts do not fit together.
    """

    _tensors: dict[str, Tensor]

    def __init__(self, tensors: Mapping[str, Tensor], num_tokens: int) -> None:
        num_layers, num_kv_heads = _require_fitting(tensors)
        # The dataclass is frozen; its generated __init__ sets attributes in the same way.
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
        """Width of keys and values."""
        return self._tensors["key_codes"].shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that keys and values are computed in."""
        return torch.float32

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return dict(self._tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedKV:
        """The same value with changed tensors: copies, or tensors on another device."""
        changed = {name: change(tensor) for name, tensor in self._tensors.items()}
        return QuantizedKV(changed, self.num_tokens)

    def first(self, entries: int) -> QuantizedKV:
        """The first entries, as views: the same chunk at a higher ratio.

        Raises:
            ValueError: if there are fewer.
        """
        if not 1 <= entries <= self.num_entries:
            raise ValueError(f"entries must be from 1 to {self.num_entries}, was: {entries}")
        cut = {
            name: tensor if name in _PER_CHANNEL else tensor[:entries]
            for name, tensor in self._tensors.items()
        }
        return QuantizedKV(cut, self.num_tokens)


def quantize(kv: AnchorKV) -> QuantizedKV:
    """Rounds keys and values to 8 bits, with an error of at most half a step.

    Raises:
        ValueError: if they hold an infinity or NaN.
    """
    keys, values = require_finite(kv).keys.detach().float(), kv.values.detach().float()
    heads = kv.heads.long()
    highest, lowest = (_of_channels(keys, heads, kv, reduce) for reduce in ("amax", "amin"))
    # Halved before they are added: their sum may overflow.
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


def require_finite(kv: AnchorKV) -> AnchorKV:
    """The AnchorKV itself.

    Raises:
        ValueError: if its keys or values hold an infinity or NaN: every answer from it would be
            nonsense.
    """
    if not kv.is_finite:
        raise ValueError(
            f"keys and values must be finite to be kept, were not, in {kv.dtype}; the model "
            "overflows, or its weights are damaged: compute and store in bfloat16 or float32"
        )
    return kv


def as_stored(kv: AnchorKV, dtype: str) -> AnchorKV:
    """The value that a store returns: in "int8", or in a floating dtype given by name."""
    return quantize(kv) if dtype == "int8" else kv.to(dtype=getattr(torch, dtype))


def _of_channels(numbers: Tensor, heads: Tensor, kv: AnchorKV, reduce: str) -> Tensor:
    """The largest or smallest number per head and channel, 0 for a head without entries.

    Returns:
        Shape: (layers * kv_heads, head_dim)
    """
    none = numbers.new_zeros(kv.num_layers * kv.num_kv_heads, kv.head_dim)
    return none.scatter_reduce(
        0, heads[:, None].expand_as(numbers), numbers, reduce, include_self=False
    )


def _scales(largest: Tensor) -> Tensor:
    return (largest / _LARGEST_CODE).clamp_min(_SMALLEST_SCALE).bfloat16()


def _codes(numbers: Tensor, scales: Tensor) -> Tensor:
    """Numbers as multiples of their scales."""
    # Where the scale was rounded down, the largest are clamped, by a quarter of a step at most.
    return (numbers / scales.float()).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)


def _require_fitting(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Checks names, dtypes and shapes; returns layers and KV heads."""
    got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    _, codes = got.get("key_codes", (None, ()))
    _, channels = got.get("key_scales", (None, ()))
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
        "positions": got.get("positions"),
        "heads": got.get("heads"),
    }
    if got != expected:
        raise ValueError(f"expected {expected}, got {got}")
    return channels[0], channels[1]
