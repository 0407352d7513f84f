"""AnchorKV, the one value that flows. Knows nothing of text, models or stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AnchorKV:
    """What the generator attends to in place of a chunk of text.

    Keys are stored as computed at position 0 and are never stored moved; `rope.move` takes them
    to their place in a prompt.

    Attributes:
        keys: Rotated for positions counted from the chunk's first token.
            Shape: (layers, kv_heads, anchors, head_dim).
        values: Shape: (layers, kv_heads, anchors, head_dim).
        positions: Where in the chunk each anchor sits, in source tokens, int32.
            Shape: (anchors,), or (layers, kv_heads, anchors) where heads keep different tokens.
        num_tokens: Source tokens in the chunk, so that the next text knows where it starts.

    Raises:
        ValueError: if the shapes, dtypes or counts do not fit together.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    num_tokens: int

    def __post_init__(self) -> None:
        shape = self.shape
        if len(shape) != 4 or tuple(self.values.shape) != shape:
            raise ValueError(
                "keys and values must both have shape (layers, kv_heads, anchors, head_dim), "
                f"were: {shape} and {tuple(self.values.shape)}"
            )
        if not self.keys.is_floating_point() or self.keys.dtype != self.values.dtype:
            raise ValueError(
                "keys and values must share one floating dtype, "
                f"were: {self.keys.dtype} and {self.values.dtype}"
            )
        self._require_places()

    def _require_places(self) -> None:
        """Refuses positions or counts that do not fit the anchors."""
        shape = self.shape
        if tuple(self.positions.shape) not in {shape[2:3], shape[:3]}:
            raise ValueError(
                f"positions must have shape {shape[2:3]} or {shape[:3]}, "
                f"was: {tuple(self.positions.shape)}"
            )
        if self.positions.dtype != torch.int32:
            raise ValueError(f"positions must be int32, were: {self.positions.dtype}")
        if not 1 <= shape[2] <= self.num_tokens:
            raise ValueError(
                "a chunk must have at least 1 anchor and no more than it has tokens, "
                f"was: {shape[2]} anchors for {self.num_tokens} tokens"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of keys, and of values: (layers, kv_heads, anchors, head_dim)."""
        return tuple(self.keys.shape)

    @property
    def num_anchors(self) -> int:
        """Entries each head keeps for this chunk."""
        return self.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors it is kept as."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype shared by keys and values."""
        return self.keys.dtype

    def tensors(self) -> dict[str, Tensor]:
        """What it is kept as, by name."""
        return {"keys": self.keys, "values": self.values, "positions": self.positions}

    def map(self, change: Callable[[Tensor], Tensor]) -> AnchorKV:
        """The same value of other tensors: copies, or those on another device."""
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return AnchorKV(**changed, num_tokens=self.num_tokens)

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
            num_tokens=self.num_tokens,
        )

    def bit_equal(self, other: AnchorKV) -> bool:
        """Whether both hold the same bits in the same shapes and dtypes."""
        mine, theirs = self.tensors(), other.tensors()
        return (
            self.num_tokens == other.num_tokens
            and mine.keys() == theirs.keys()
            and all(
                tensor.shape == theirs[name].shape
                and tensor.dtype == theirs[name].dtype
                and torch.equal(_bytes_of(tensor), _bytes_of(theirs[name]))
                for name, tensor in mine.items()
            )
        )

    @classmethod
    def join(cls, segments: Sequence[AnchorKV]) -> AnchorKV:
        """Makes one value of a chunk's segments, each encoded at its own place in the chunk.

        The segments' keys must already be rotated for, and their positions counted from, the
        chunk's first token.
        """
        if not segments:
            raise ValueError("a chunk has at least one segment, got none")
        if len(segments) == 1:
            return segments[0]
        return cls(
            keys=torch.cat([s.keys for s in segments], dim=2),
            values=torch.cat([s.values for s in segments], dim=2),
            positions=torch.cat([s.positions for s in segments], dim=-1),
            num_tokens=sum(s.num_tokens for s in segments),
        )


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)
