"""Entries as the format describes them, made without the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV, QuantizedKV, quantize
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.entry import decode, decode_first

KEY = "ab" * 32
OTHER = "cd" * 32
FINGERPRINT = "ef" * 16
DATA = Path(__file__).parents[1] / "data"
CIPHER = Cipher(bytes(range(32)))
OTHER_CIPHER = Cipher(bytes(32))


def make_kv(
    dtype: torch.dtype = torch.bfloat16,
    counts: tuple[int, ...] = (5, 0, 4, 3, 2, 6),
    layers: int = 2,
    head_dim: int = 8,
    num_tokens: int = 20,
) -> AnchorKV:
    """Numbers that no other version of torch draws differently, and entries of all heads mixed."""
    entries = sum(counts)
    order = torch.arange(entries) * 7 % entries
    assert len(order.unique()) == entries
    numbers = torch.arange(2 * entries * head_dim).reshape(2, entries, head_dim)
    numbers = (numbers * 7919 % 1009 - 500) / 128
    heads = torch.arange(len(counts), dtype=torch.int16).repeat_interleave(torch.tensor(counts))
    return AnchorKV(
        keys=numbers[0].to(dtype),
        values=numbers[1].to(dtype),
        positions=(order * 3 % num_tokens).int(),
        heads=heads[order],
        num_layers=layers,
        num_kv_heads=len(counts) // layers,
        num_tokens=num_tokens,
    )


def make_small(dtype: torch.dtype = torch.float16) -> AnchorKV:
    return make_kv(dtype, counts=(2, 0), layers=1, head_dim=4)


KV = make_kv()
KINDS: dict[str, AnchorKV] = {
    "float32": make_kv(torch.float32),
    "float16": make_kv(torch.float16),
    "bfloat16": KV,
    "int8": quantize(KV),
}
# Of five blocks, the last of them not full.
LARGE = make_kv(counts=(300, 0, 500, 700, 200, 401), head_dim=32, num_tokens=1000)
BLOCK = 64 * 1024


def sealed(payload: bytes, **changes: Any) -> bytes:
    """An entry as the format describes it, with right checksums over whatever it says."""
    fields = {
        "magic": "sac_rag.AnchorKV",
        "format": 3,
        "key": KEY,
        "fingerprint": FINGERPRINT,
        "num_tokens": 20,
        "dtype": "bfloat16",
        "shape": [2, 3, 20, 8],
        "payload_bytes": len(payload),
        "blocks": blocks_of(payload),
        **changes,
    }
    return with_checksum(fields, payload)


def blocks_of(payload: bytes) -> list[str]:
    blocks = [payload[begin : begin + BLOCK] for begin in range(0, len(payload), BLOCK)]
    return [xxhash.xxh3_128_hexdigest(block) for block in blocks]


def with_checksum(fields: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(fields, separators=(",", ":"))
    line = f'{text[:-1]},"xxh3_128":"{xxhash.xxh3_128_hexdigest(text.encode())}"}}'
    return line.ljust(-(len(line) + 1) % 64 + len(line)).encode() + b"\n" + payload


def tensors_of(value: AnchorKV, **changes: torch.Tensor) -> bytes:
    """The safetensors file: what is small by item size, then keys and values side by side."""
    names = ("key_codes", "value_codes") if isinstance(value, QuantizedKV) else ("keys", "values")
    tensors = value.tensors()
    pair = torch.stack([tensors.pop(name) for name in names], dim=1)
    small = sorted(tensors, key=lambda name: (tensors[name].itemsize, name))
    return safetensors_file({**{name: tensors[name] for name in small}, "kv": pair, **changes})


def safetensors_file(tensors: dict[str, torch.Tensor]) -> bytes:
    """With the last tensor at a multiple of 64 bytes, which safetensors' own `save` cannot do."""
    dtypes = {torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.bfloat16: "BF16"}
    dtypes |= {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}
    layout, data, begin = {}, b"", 0
    for name, tensor in tensors.items():
        begin = len(data)
        data += tensor.contiguous().view(torch.uint8).numpy().tobytes()
        layout[name] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + begin) % 64)
    return len(text).to_bytes(8, "little") + text + data


def header_of(data: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(data.partition(b"\n")[0])
    return fields


def reads(data: bytes | bytearray, key: str = KEY, cipher: Cipher | None = None) -> bool:
    """Whether bytes are taken for an entry; anything but a CorruptEntryError passes through."""
    try:
        decode(key, data, cipher)
    except CorruptEntryError:
        return False
    return True


def why_refused(data: bytes, key: str = KEY, cipher: Cipher | None = None) -> str:
    with pytest.raises(CorruptEntryError) as error:
        decode(key, data, cipher)
    return error.value.reason


def read_first(
    data: bytes | bytearray, entries: int, cipher: Cipher | None = None, key: str = KEY
) -> tuple[AnchorKV, int]:
    """The first entries of an entry's value, and how many bytes were read for them."""
    most = 0

    def first(nbytes: int) -> memoryview:
        nonlocal most
        most = max(most, nbytes)
        return memoryview(bytearray(data[:nbytes]))

    return decode_first(key, first, len(data), lambda _: entries, cipher), most
