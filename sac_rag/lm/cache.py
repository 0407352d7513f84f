"""RoomyCache: an HF KV cache that is allocated once, with room for what will be read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Entries per head that a full layer is extended by: tokens that follow before it is copied again.
ROOM = 64


class RoomyCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache that writes new entries in place; HF's copies all entries at each pass.

    Args:
        layers: Keys and values of each layer, with room behind the entries.
            Shape of each: (rows, kv_heads, entries + room, head_dim)
        room: Slots per head behind the entries.
    """

    def __init__(self, layers: Iterable[tuple[Tensor, Tensor]], *, room: int = 0) -> None:
        super().__init__()
        self.layers = [_RoomyLayer(keys, values, keys.shape[2] - room) for keys, values in layers]


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose `keys` and `values` are views of larger tensors."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show(keys, values, length)

    def _show(self, keys: Tensor, values: Tensor, length: int) -> None:
        self._larger = keys, values
        self.keys, self.values = self._views = keys[:, :, :length], values[:, :, :length]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends entries; returns all. Shape of each: (rows, kv_heads, entries, head_dim)."""
        # Autograd needs what would be overwritten; and HF's own methods may have put other tensors.
        if torch.is_grad_enabled() or self.keys is not self._views[0]:
            appended: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            return appended
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        larger = self._larger
        if end > larger[0].shape[2]:
            more = (0, 0, 0, end + ROOM - larger[0].shape[2])
            larger = functional.pad(larger[0], more), functional.pad(larger[1], more)
        for tensor, states in zip(larger, (key_states, value_states), strict=True):
            tensor[:, :, begin:end] = states
        self._show(*larger, end)
        return self._views
