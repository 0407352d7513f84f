r"""AnchorKV to bytes and back. Knows nothing of where the bytes lie.

An entry is one line of JSON, to be read with `head -1`, and then the tensors as safetensors:

    {"magic":"sac_rag.AnchorKV","format":1,"key":…,"num_tokens":…,"dtype":…,"shape":[…],
     "payload_bytes":…,"xxh3_128":…}<spaces to a multiple of 64 bytes>\n<safetensors>

What made the KV (weights, tokenizer, ratio, text) is not written down: the key covers it all.
"""

from __future__ import annotations

import json
import math
import re
import struct
from typing import Any, NoReturn, TypeGuard

import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from sac_rag.errors import CorruptEntry
from sac_rag.kv import AnchorKV

MAGIC = "sac_rag.AnchorKV"
FORMAT = 1

_HEADER_LIMIT = 4096  # bytes parsed before anything is verified; a header of ours has about 300
_ALIGNMENT = 64
_FIELD_TYPES: dict[str, type] = {
    "magic": str,
    "format": int,
    "key": str,
    "num_tokens": int,
    "dtype": str,
    "shape": list,
    "payload_bytes": int,
    "xxh3_128": str,
}
_FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
}
_KEY = re.compile("[0-9a-f]{1,64}")


def is_key(key: object) -> TypeGuard[str]:
    """Whether this can name an entry: a lower-case hex digest of at most 64 characters."""
    return isinstance(key, str) and _KEY.fullmatch(key) is not None


def encode(key: str, kv: AnchorKV) -> bytes:
    """The bytes of an entry.

    Raises:
        TypeError: if kv is not an AnchorKV.
        ValueError: if the key is not a hex digest, or the dtype is not one of float32, float16
            and bfloat16.
    """
    if not is_key(key):
        raise ValueError(
            f"a key must be a lower-case hex digest of at most 64 characters, was: {key!r:.100}"
        )
    if not isinstance(kv, AnchorKV):
        raise TypeError(f"a store holds AnchorKVs, got: {type(kv).__name__}")
    if kv.dtype not in _FLOATS:
        raise ValueError(
            "keys and values must be float32, float16 or bfloat16 to be stored, "
            f"were: {kv.dtype}; convert them with kv.to(dtype=...)"
        )
    keys, values, positions = (
        tensor.detach().cpu().contiguous() for tensor in (kv.keys, kv.values, kv.positions)
    )
    if keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
        values = values.clone()  # safetensors refuses tensors that overlap
    payload = save({"keys": keys, "values": values, "positions": positions})
    fields = {
        "magic": MAGIC,
        "format": FORMAT,
        "key": key,
        "num_tokens": kv.num_tokens,
        "dtype": _FLOATS[kv.dtype],
        "shape": list(kv.keys.shape),
        "payload_bytes": len(payload),
    }
    return _header({**fields, "xxh3_128": _checksum(fields, payload)}) + payload


def decode(key: str, data: bytes | bytearray | memoryview) -> AnchorKV:
    """The value of an entry, every bit of it verified.

    Its tensors are views of `data` if that is writable, and of one copy of it if not.

    Raises:
        CorruptEntry: if these are not the bytes that `encode` made for this key, whatever they
            are; with reason "format" if they are of another format version.
    """
    view = memoryview(data).cast("B")
    header = bytes(view[:_HEADER_LIMIT])
    header = header[: header.find(b"\n") + 1]
    fields = _parse_header(header, len(view))
    payload = view[len(header) :]
    if fields["payload_bytes"] != len(payload):
        _refuse(f"{fields['payload_bytes']} bytes of tensors were written, found {len(payload)}")
    found = _checksum({k: v for k, v in fields.items() if k != "xxh3_128"}, payload)
    if fields["xxh3_128"] != found:
        _refuse(f"checksum {fields['xxh3_128']} was written, found {found}")
    if fields["key"] != key:
        _refuse(f"this is the entry of key {fields['key']!r:.80}, not of {key!r:.80}")
    if payload.readonly:
        payload = memoryview(bytearray(payload))
    try:
        tensors = _parse_tensors(payload)
        kv = AnchorKV(**tensors, num_tokens=fields["num_tokens"])
    except (
        AttributeError,
        LookupError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        # Only an entry made on purpose gets here: its checksum is right and its tensors are not.
        raise CorruptEntry(f"its tensors cannot be read: {error}") from error
    if _FLOATS.get(kv.dtype) != fields["dtype"] or list(kv.keys.shape) != fields["shape"]:
        _refuse(
            f"the header says {fields['dtype']} of shape {fields['shape']}, "
            f"the tensors are {kv.dtype} of shape {list(kv.keys.shape)}"
        )
    return kv


def _header(fields: dict[str, Any]) -> bytes:
    line = json.dumps(fields, separators=(",", ":")).encode("ascii")
    return line.ljust(math.ceil((len(line) + 1) / _ALIGNMENT) * _ALIGNMENT - 1) + b"\n"


def _checksum(fields: dict[str, Any], payload: bytes | memoryview) -> str:
    # xxh3 and not sha256: a checksum without a secret finds accidents and stops no attacker,
    # whichever it is, and this one is ten times faster (21 against 1.7 GB/s when it was chosen).
    digest = xxhash.xxh3_128(json.dumps(fields, separators=(",", ":")).encode("ascii"))
    digest.update(payload)
    return digest.hexdigest()


def _parse_header(header: bytes, total: int) -> dict[str, Any]:
    if not header:
        _refuse(f"no header line at the start of {total} bytes")
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CorruptEntry(f"the header line is not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("magic") != MAGIC:
        _refuse(f"the header line does not say {MAGIC!r}")
    version = fields.get("format")
    if type(version) is int and version != FORMAT:
        # Asked first: another version may have other fields, and another checksum.
        _refuse(
            f"the entry is of format {version!s:.20}, this sac_rag reads format {FORMAT}",
            reason="format",
        )
    if {name: type(value) for name, value in fields.items()} != _FIELD_TYPES or any(
        type(size) is not int for size in fields["shape"]
    ):
        _refuse("the header line has other fields than those of format 1")
    if _header(fields) != header:
        # One spelling only, so that the checksum of the fields is one of the line's every bit.
        _refuse("the header line is not spelt as it is written")
    return fields


def _parse_tensors(payload: memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of it.

    Its own `load` wants bytes and copies them, which takes longer than reading the file.
    """
    (length,) = struct.unpack_from("<Q", payload)
    if length > _HEADER_LIMIT:
        raise ValueError(f"a tensor header of {length} bytes")
    layout = json.loads(bytes(payload[8 : 8 + length]))
    if set(layout) != {"keys", "values", "positions"}:
        raise ValueError(f"expected keys, values and positions, found {len(layout)} other names")
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


def _refuse(detail: str, reason: str = "corrupt") -> NoReturn:
    raise CorruptEntry(detail, reason)
