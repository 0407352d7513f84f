"""Where the tensors of an AnchorKV lie in its file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch

ALIGNMENT = 64
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INT8 = "int8"
_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
}


class TensorLayout:
    """Where the tensors of a value lie in its file, which dtype and shape determine.

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
        if dtype != INT8 and dtype not in FLOATS:
            raise ValueError(f"dtype must be {INT8} or one of {list(FLOATS)}, was: {dtype!r:.20}")
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
        if dtype == INT8:
            tensors["key_offsets"] = (torch.bfloat16, (layers, kv_heads, head_dim))
            tensors["key_scales"] = tensors["key_offsets"]
            tensors["value_scales"] = (torch.bfloat16, (entries,))
        tensors["positions"] = (torch.int32, (entries,))
        tensors["kv"] = (FLOATS.get(dtype, torch.int8), (entries, 2, head_dim))
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
        text += b" " * (-(8 + len(text) + offsets[-2]) % ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        self.tensors = {
            name: (kind, dimensions, len(self.header) + offset)
            for (name, (kind, dimensions)), offset in zip(tensors.items(), offsets, strict=False)
        }

    @property
    def pair(self) -> tuple[str, str]:
        """Names of the two tensors that are one in the file."""
        return ("key_codes", "value_codes") if self.dtype == INT8 else ("keys", "values")

    def nbytes(self, entries: int) -> int:
        """Bytes of the file up to the end of the first entries."""
        dtype, shape, offset = self.tensors["kv"]
        return offset + entries * math.prod(shape[1:]) * dtype.itemsize
