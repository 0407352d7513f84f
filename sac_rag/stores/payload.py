"""The tensors of an AnchorKV to safetensors and back. Knows nothing of headers or checksums.

The last tensor, "kv", holds the key and the value of each entry side by side, in order of
importance. The first bytes of the file are therefore the same chunk at a higher ratio.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sac_rag.kv import AnchorKV, QuantizedKV

_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INT8 = "int8"
_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
}
_PER_CHANNEL = frozenset({"key_offsets", "key_scales"})  # the other tensors are of entries
_ALIGNMENT = 64


class Layout:
    """Where the tensors of a value lie in its file. Dtype and shape determine every byte of it.

    Args:
        dtype: As `stored_dtype` gives it.
        shape: (layers, kv_heads, entries, head_dim).

    Attributes:
        header: The beginning of the safetensors file, up to the first tensor.
        tensors: Dtype, shape and offset of each tensor, in the file's order.

    Raises:
        ValueError: if there is no such dtype, or no value has such a shape.
    """

    def __init__(self, dtype: str, shape: Sequence[int]) -> None:
        if dtype != _INT8 and dtype not in _FLOATS:
            raise ValueError(f"dtype must be {_INT8} or one of {list(_FLOATS)}, was: {dtype!r:.20}")
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(
                "shape must be (layers, kv_heads, entries, head_dim), each at least 1, "
                f"was: {shape!r:.80}"
            )
        self.dtype, self.shape = dtype, tuple(shape)
        layers, kv_heads, entries, head_dim = shape
        # By item size, so that each is aligned if the last one is.
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        tensors["heads"] = (torch.int16, (entries,))
        if dtype == _INT8:
            tensors["key_offsets"] = (torch.bfloat16, (layers, kv_heads, head_dim))
            tensors["key_scales"] = tensors["key_offsets"]
            tensors["value_scales"] = (torch.bfloat16, (entries,))
        tensors["positions"] = (torch.int32, (entries,))
        tensors["kv"] = (_FLOATS.get(dtype, torch.int8), (entries, 2, head_dim))
        described: dict[str, dict[str, object]] = {}
        offsets = [0]
        for name, (kind, dimensions) in tensors.items():
            offsets.append(offsets[-1] + math.prod(dimensions) * kind.itemsize)
            described[name] = {
                "dtype": _SAFETENSORS_DTYPES[kind],
                "shape": dimensions,
                "data_offsets": offsets[-2:],
            }
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text) + offsets[-2]) % _ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        self.tensors = {
            name: (kind, dimensions, len(self.header) + offset)
            for (name, (kind, dimensions)), offset in zip(tensors.items(), offsets, strict=False)
        }

    @property
    def pair(self) -> tuple[str, str]:
        """Names of the two tensors that are one in the file."""
        return ("key_codes", "value_codes") if self.dtype == _INT8 else ("keys", "values")

    def nbytes(self, entries: int) -> int:
        """Bytes of the file up to the end of the first entries."""
        dtype, shape, offset = self.tensors["kv"]
        return offset + entries * math.prod(shape[1:]) * dtype.itemsize


def stored_dtype(kv: AnchorKV) -> str:
    """What keys and values are kept in: "float32", "float16", "bfloat16" or "int8".

    Raises:
        TypeError: if kv is not an AnchorKV.
        ValueError: if it is of another dtype.
    """
    if not isinstance(kv, AnchorKV):
        raise TypeError(f"a store holds AnchorKVs, got: {type(kv).__name__}")
    if isinstance(kv, QuantizedKV):
        return _INT8
    for name, dtype in _FLOATS.items():
        if dtype == kv.dtype:
            return name
    raise ValueError(
        "keys and values must be float32, float16 or bfloat16 to be stored, "
        f"were: {kv.dtype}; convert them with kv.to(dtype=...)"
    )


def shape_of(kv: AnchorKV) -> tuple[int, int, int, int]:
    """(layers, kv_heads, entries, head_dim)."""
    return kv.num_layers, kv.num_kv_heads, kv.num_entries, kv.head_dim


def to_bytes(kv: AnchorKV) -> bytes:
    """A safetensors file of what the value is kept as.

    Raises:
        TypeError, ValueError: if it cannot be stored, see `stored_dtype`.
    """
    layout = Layout(stored_dtype(kv), shape_of(kv))
    tensors = {name: tensor.detach().cpu() for name, tensor in kv.tensors().items()}
    tensors["kv"] = torch.stack([tensors[name] for name in layout.pair], dim=1)
    return b"".join([layout.header, *(_bytes_of(tensors[name]) for name in layout.tensors)])


def from_bytes(payload: memoryview, layout: Layout, entries: int, num_tokens: int) -> AnchorKV:
    """The first entries of a value, their tensors views of the payload.

    safetensors' own `load` wants bytes and copies them, which takes longer than reading the file.

    Args:
        payload: The file, at least up to the end of these entries; writable.
        layout: Of the whole file.
        entries: How many of them to take.
        num_tokens: Source tokens in the chunk.

    Raises:
        ValueError: if these are not the bytes of such a value, whatever they are.
    """
    if payload[: len(layout.header)] != layout.header:
        raise ValueError("the tensors do not lie where the header says")
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape, offset) in layout.tensors.items():
        rows = shape[0] if name in _PER_CHANNEL else entries
        count = rows * math.prod(shape[1:])
        flat = torch.frombuffer(payload, dtype=dtype, count=count, offset=offset)
        tensors[name] = flat.view(rows, *shape[1:])
    tensors.update(zip(layout.pair, tensors.pop("kv").unbind(1), strict=True))
    if layout.dtype == _INT8:
        return QuantizedKV(tensors, num_tokens)
    num_layers, num_kv_heads, _, _ = layout.shape
    return AnchorKV(
        **tensors, num_layers=num_layers, num_kv_heads=num_kv_heads, num_tokens=num_tokens
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
