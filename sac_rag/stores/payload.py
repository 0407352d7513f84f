"""The tensors of an AnchorKV to safetensors and back. Knows nothing of headers or checksums."""

from __future__ import annotations

import json
import math
import struct

import torch
from safetensors.torch import save
from torch import Tensor

from sac_rag.kv import AnchorKV
from sac_rag.quantize import QuantizedKV

_FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_INT8 = "int8"
_SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
}
_HEADER_LIMIT = 4096  # bytes; that of our six tensors has about 500


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
    if kv.dtype not in _FLOATS:
        raise ValueError(
            "keys and values must be float32, float16 or bfloat16 to be stored, "
            f"were: {kv.dtype}; convert them with kv.to(dtype=...)"
        )
    return _FLOATS[kv.dtype]


def to_bytes(kv: AnchorKV) -> bytes:
    """A safetensors file of what the value is kept as."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in kv.tensors().items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # safetensors refuses tensors that overlap
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return save(tensors)


def from_bytes(payload: memoryview, dtype: str, num_tokens: int) -> AnchorKV:
    """The value, its tensors views of the payload.

    safetensors' own `load` wants bytes and copies them, which takes longer than reading the file.

    Args:
        payload: Writable.
        dtype: As `stored_dtype` gave it.
        num_tokens: Source tokens in the chunk.

    Raises:
        ValueError: if these are not the bytes of such a value, whatever they are.
    """
    try:
        tensors = _tensors(payload)
        if dtype == _INT8:
            return QuantizedKV(tensors, num_tokens)
        return AnchorKV(**tensors, num_tokens=num_tokens)
    except (
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
        RuntimeError,
        TypeError,
        struct.error,
    ) as error:
        raise ValueError(str(error)) from error


def _tensors(payload: memoryview) -> dict[str, Tensor]:
    (length,) = struct.unpack_from("<Q", payload)
    if length > _HEADER_LIMIT:
        raise ValueError(f"a tensor header of {length} bytes")
    layout = json.loads(bytes(payload[8 : 8 + length]))
    tensors = {}
    for name, tensor in layout.items():
        dtype = _SAFETENSORS_DTYPES[tensor["dtype"]]
        begin, end = tensor["data_offsets"]
        count = math.prod(tensor["shape"])
        if begin % dtype.itemsize or begin < 0 or end - begin != count * dtype.itemsize:
            raise ValueError(f"{name} of shape {tensor['shape']} lies at {begin} to {end}")
        flat = torch.frombuffer(payload, dtype=dtype, count=count, offset=8 + length + begin)
        tensors[name] = flat.view(tensor["shape"])
    return tensors
