"""Cache layers with room for tokens to come: one is written, and nothing before it copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Entries that a buffer is extended by when it is full.
ROOM = 64


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of the HF KV cache whose keys and values are the filled part of larger buffers.

    Args:
        keys: Shape: (rows, kv_heads, entries, head_dim)
        values: Shape: (rows, kv_heads, entries, head_dim)
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = [keys, values]
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Appends entries; returns all keys and all values."""
        filled = self.keys.shape[2]
        end = filled + keys.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = [_enlarged(t, end + ROOM) for t in (self.keys, self.values)]
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, filled:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


def cache_of(layers: Any) -> DynamicCache:
    """An HF KV cache of pairs of keys and values, one pair per layer."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer(keys, values) for keys, values in layers]
    return cache


def _enlarged(tensor: Tensor, entries: int) -> Tensor:
    rows, heads, filled, width = tensor.shape
    buffer: Tensor = tensor.new_empty(rows, heads, entries, width)
    buffer[:, :, :filled] = tensor
    return buffer
