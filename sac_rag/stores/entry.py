r"""AnchorKV to bytes and back.

An entry is one line of JSON, readable with `head -1`, and then the tensors as safetensors:

    {"magic":"sac_rag.AnchorKV","format":3,"key":…,"fingerprint":…,"num_tokens":…,"dtype":…,
     "shape":[layers,kv_heads,entries,head_dim],"payload_bytes":…,"blocks":[…],"xxh3_128":…}
    <spaces to a multiple of 64 bytes>\n<safetensors>

"blocks" are checksums of the payload's blocks of equal size, so that the first blocks can be read
and verified alone; "xxh3_128" is the checksum of all the other fields. The last tensor, "kv", holds
the key and the value of each KV entry side by side, in order of importance: the first bytes of the
file are the same chunk at a higher ratio.

The fingerprint, where it is known, identifies what made the KV (weights, tokenizer, ratio); the key
covers it and the text. An encrypted entry is another line, followed by such an entry, encrypted:

    {"magic":"sac_rag.AnchorKV","format":3,"key":…,"cipher":<id of the cipher's key>,
     "payload_bytes":…,"blocks":[…],"xxh3_128":…}<spaces>\n<nonce, ciphertext, tag>
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeGuard

import torch
import xxhash
from torch import Tensor

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV, QuantizedKV
from sac_rag.stores.base import Wanted
from sac_rag.stores.layout import ALIGNMENT, FLOATS, INT8, TensorLayout

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

Bytes: TypeAlias = bytes | bytearray | memoryview

MAGIC = "sac_rag.AnchorKV"
FORMAT = 3

HEADER_LIMIT = 4096  # bytes parsed before anything is verified; a header has at most 2700
_SMALLEST_BLOCK = 64 * 1024
_MOST_BLOCKS = 64
_UNENCRYPTED: dict[str, type] = {
    "magic": str,
    "format": int,
    "key": str,
    "fingerprint": str,
    "num_tokens": int,
    "dtype": str,
    "shape": list,
    "payload_bytes": int,
    "blocks": list,
    "xxh3_128": str,
}
_ENCRYPTED: dict[str, type] = {
    "magic": str,
    "format": int,
    "key": str,
    "cipher": str,
    "payload_bytes": int,
    "blocks": list,
    "xxh3_128": str,
}
_DIGEST = re.compile("[0-9a-f]{1,64}")
_JSON = json.JSONEncoder(separators=(",", ":"))  # json.dumps would make one each time
_PER_CHANNEL = frozenset({"key_offsets", "key_scales"})  # the other tensors are of entries


def is_key(key: object) -> TypeGuard[str]:
    """Whether this can name an entry: a lower-case hex digest of at most 64 characters."""
    return isinstance(key, str) and _DIGEST.fullmatch(key) is not None


def encode(key: str, kv: AnchorKV, cipher: Cipher | None = None, fingerprint: str = "") -> bytes:
    """The bytes of an entry.

    Args:
        key: A lower-case hex digest.
        kv: A QuantizedKV is stored in 8 bits per number.
        cipher: Encrypts all but key and length; None stores unencrypted.
        fingerprint: Of what made the value, a lower-case hex digest; "" if it is not known.

    Raises:
        TypeError: if kv is not an AnchorKV.
        ValueError: if key or fingerprint is not a hex digest, or the dtype is not one of float32,
            float16 and bfloat16.
    """
    for name, digest in (("key", key), ("fingerprint", fingerprint or "0")):
        if not is_key(digest):
            raise ValueError(
                f"a {name} must be a lower-case hex digest of at most 64 characters, "
                f"was: {digest!r:.100}"
            )
    payload = to_bytes(kv)
    fields = {
        "key": key,
        "fingerprint": fingerprint,
        "num_tokens": kv.num_tokens,
        "dtype": stored_dtype(kv),
        "shape": list(shape_of(kv)),
    }
    entry = _sealed(_complete(fields, len(payload)), payload)
    return entry if cipher is None else _encrypted(key, entry, cipher)


def decode(key: str, data: Bytes, cipher: Cipher | None = None) -> AnchorKV:
    """The value of an entry, verified to the last bit.

    Its tensors are views of `data` if that is writable and not encrypted, else of one copy of it.

    Raises:
        CorruptEntryError: if these are not the bytes that `encode` made for this key, whatever they
            are; with reason "format" if they are of another format version, and with reason
            "secret" if they are encrypted with another key than the cipher's, encrypted where there
            is no cipher, or unencrypted where there is one.
    """
    fields, payload = _decrypted(data, cipher)
    layout = _layout(key, fields)
    if payload.readonly:
        payload = memoryview(bytearray(payload))
    return _value(fields, payload, layout, layout.shape[2])


def decode_first(
    key: str,
    first: Callable[[int], memoryview],
    nbytes: int,
    wanted: Wanted,
    cipher: Cipher | None = None,
) -> AnchorKV:
    """The value's first entries, verified to the last bit; little else is read.

    An encrypted entry is read whole, once its header is right.

    Args:
        key: A lower-case hex digest.
        first: Reads the first n bytes of the entry into writable memory.
        nbytes: Of the whole entry.
        wanted: Called with the chunk's source tokens. All entries are read where it returns more.
        cipher: As `decode` takes it.

    Raises:
        CorruptEntryError: as `decode`, if what was read is not the beginning of an entry.
        ValueError: if fewer than 1 are wanted.
    """
    fields, start = _parse(first(min(nbytes, HEADER_LIMIT)), nbytes)
    _require_cipher(fields, cipher)
    if cipher is not None:
        kv = decode(key, first(nbytes), cipher)
        return kv.first(min(wanted(kv.num_tokens), kv.num_entries))
    layout = _layout(key, fields)
    entries = min(wanted(fields["num_tokens"]), layout.shape[2])
    if entries < 1:
        raise ValueError(f"at least 1 entry must be wanted, was: {entries}")
    block = _block_bytes(fields["payload_bytes"])
    end = min(math.ceil(layout.nbytes(entries) / block) * block, fields["payload_bytes"])
    payload = first(start + end)[start:]
    if len(payload) != end:
        _refuse(f"its file ends {end - len(payload)} bytes too early")
    _verify(fields, payload)
    return _value(fields, payload, layout, entries)


def cipher_in_header(head: memoryview, nbytes: int) -> str:
    """Id of the key that an entry is encrypted with; "" for none.

    Takes the first HEADER_LIMIT of its bytes. Raises CorruptEntryError if they are no header.
    """
    fields, _ = _parse(head, nbytes)
    return str(fields.get("cipher", ""))


def described_by(
    key: str, data: memoryview, nbytes: int, cipher: Cipher | None
) -> tuple[int, tuple[int, ...], str]:
    """Source tokens, shape and fingerprint of an entry, out of its header.

    Takes its first HEADER_LIMIT bytes, or all of an encrypted one. Raises what `decode` raises.
    """
    fields, _ = _parse(data[:HEADER_LIMIT], nbytes)
    _require_cipher(fields, cipher)
    if cipher is not None:
        fields, _ = _decrypted(data, cipher)
    return fields["num_tokens"], _layout(key, fields).shape, fields["fingerprint"]


def reencrypt(data: Bytes, old: Cipher | None, new: Cipher | None) -> bytes:
    """The same entry, encrypted with another key; None for unencrypted.

    Raises:
        CorruptEntryError: as `decode`, if the old cipher does not give what was encoded.
    """
    fields, payload = _decrypted(data, old)
    del fields["blocks"], fields["xxh3_128"]
    entry = _sealed(fields, bytes(payload))
    return entry if new is None else _encrypted(fields["key"], entry, new)


def stored_dtype(kv: AnchorKV) -> str:
    """Dtype in which keys and values are stored: "float32", "float16", "bfloat16" or "int8".

    Raises:
        TypeError: if kv is not an AnchorKV.
        ValueError: if it is of another dtype.
    """
    if not isinstance(kv, AnchorKV):
        raise TypeError(f"a store holds AnchorKVs, got: {type(kv).__name__}")
    if isinstance(kv, QuantizedKV):
        return INT8
    for name, dtype in FLOATS.items():
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
    """A safetensors file of the value.

    Raises:
        TypeError, ValueError: if it cannot be stored, see `stored_dtype`.
    """
    layout = TensorLayout(stored_dtype(kv), shape_of(kv))
    tensors = {name: tensor.detach().cpu() for name, tensor in kv.tensors().items()}
    tensors["kv"] = torch.stack([tensors[name] for name in layout.pair], dim=1)
    return b"".join([layout.header, *(_bytes_of(tensors[name]) for name in layout.tensors)])


def from_bytes(
    payload: memoryview, layout: TensorLayout, entries: int, num_tokens: int
) -> AnchorKV:
    """The first entries of a value, their tensors views of the payload.

    safetensors' own `load` wants bytes and copies them, which takes longer than reading the file.

    Args:
        payload: The file, at least up to the end of these entries; writable.
        layout: Of the whole file.
        entries: How many of them to read.
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
    if layout.dtype == INT8:
        return QuantizedKV(tensors, num_tokens)
    num_layers, num_kv_heads, _, _ = layout.shape
    return AnchorKV(
        **tensors, num_layers=num_layers, num_kv_heads=num_kv_heads, num_tokens=num_tokens
    )


def _encrypted(key: str, entry: bytes, cipher: Cipher) -> bytes:
    fields = _complete({"key": key, "cipher": cipher.id}, len(entry) + cipher.overhead)
    payload = cipher.encrypt(entry, about=_to_json(fields))
    return _sealed(fields, payload)


def _decrypted(data: Bytes, cipher: Cipher | None) -> tuple[dict[str, Any], memoryview]:
    """Fields and tensors of an entry as they were encoded."""
    fields, payload = _opened(data)
    _require_cipher(fields, cipher)
    if cipher is None:
        return fields, payload
    about = _complete({"key": fields["key"], "cipher": cipher.id}, fields["payload_bytes"])
    try:
        entry = cipher.decrypt(payload, about=_to_json(about))
    except ValueError as error:
        raise CorruptEntryError(f"the entry {error}") from error
    inner, payload = _opened(entry)
    if "cipher" in inner or inner["key"] != fields["key"]:
        _refuse("what was encrypted is not this entry")
    return inner, payload


def _require_cipher(fields: dict[str, Any], cipher: Cipher | None) -> None:
    recorded, expected = fields.get("cipher"), None if cipher is None else cipher.id
    if recorded != expected:
        # Where a cipher is given, anybody could have written an unencrypted entry.
        _refuse(
            f"the entry is {_described(recorded)}, the cipher given is {expected or 'none'}",
            reason="secret",
        )


def _layout(key: str, fields: dict[str, Any]) -> TensorLayout:
    """Where the tensors of an entry lie; refuses an entry of another key."""
    if fields["key"] != key:
        _refuse(f"this is the entry of key {fields['key']!r:.80}, not of {key!r:.80}")
    # Only forged entries are refused below: their checksum is right and the rest is not.
    try:
        layout = TensorLayout(fields["dtype"], fields["shape"])
    except ValueError as error:
        raise CorruptEntryError(f"its tensors cannot be read: {error}") from error
    layers, kv_heads, entries, _ = layout.shape
    if entries > layers * kv_heads * fields["num_tokens"]:
        _refuse(f"{entries} entries of {fields['num_tokens']!s:.20} tokens are too many")
    if layout.nbytes(entries) != fields["payload_bytes"]:
        _refuse(f"its tensors take {layout.nbytes(entries)} bytes, not {fields['payload_bytes']}")
    return layout


def _value(
    fields: dict[str, Any], payload: memoryview, layout: TensorLayout, entries: int
) -> AnchorKV:
    try:
        return from_bytes(payload, layout, entries, fields["num_tokens"])
    except ValueError as error:
        raise CorruptEntryError(f"its tensors cannot be read: {error}") from error


def _opened(data: Bytes) -> tuple[dict[str, Any], memoryview]:
    """Fields and payload of an entry, encrypted or not, verified to the last bit."""
    view = memoryview(data).cast("B")
    fields, start = _parse(view[:HEADER_LIMIT], len(view))
    _verify(fields, view[start:])
    return fields, view[start:]


def _parse(head: memoryview, total: int) -> tuple[dict[str, Any], int]:
    """Fields of the header line, verified to the last bit, and its length.

    Args:
        head: The beginning of an entry.
        total: Bytes of the whole entry.
    """
    line = bytes(head)
    line = line[: line.find(b"\n") + 1]
    if not line:
        _refuse(f"no header line at the start of {total} bytes")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptEntryError(f"the header line is not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("magic") != MAGIC:
        _refuse(f"the header line does not say {MAGIC!r}")
    version = fields.get("format")
    if type(version) is int and version != FORMAT:
        # Checked first: another version may have other fields, and another checksum.
        _refuse(
            f"the entry is of format {version!s:.20}, this sac_rag reads format {FORMAT}",
            reason="format",
        )
    expected = _ENCRYPTED if "cipher" in fields else _UNENCRYPTED
    if (
        {name: type(value) for name, value in fields.items()} != expected
        or any(type(size) is not int for size in fields.get("shape", ()))
        or any(type(checksum) is not str for checksum in fields["blocks"])
    ):
        _refuse(f"the header line has other fields than those of format {FORMAT}")
    # Over the line as written and not as parsed, so that every bit of it is covered.
    sealed = _line(line.rpartition(b',"xxh3_128"')[0] + b"}")
    if line != sealed:
        _refuse(f"checksum {fields['xxh3_128']:.80} was written, the header line has another")
    nbytes = total - len(line)
    if fields["payload_bytes"] != nbytes:
        _refuse(f"{fields['payload_bytes']} bytes were written behind it, found {nbytes}")
    if len(fields["blocks"]) != math.ceil(nbytes / _block_bytes(nbytes)):
        _refuse(f"{len(fields['blocks'])} checksums are not those of {nbytes} bytes")
    return fields, len(line)


def _verify(fields: dict[str, Any], payload: memoryview) -> None:
    """Refuses a payload, or the first blocks of one, if any bit of it has changed."""
    checksums = _blocks(payload, fields["payload_bytes"])
    for number, (checksum, written) in enumerate(zip(checksums, fields["blocks"], strict=False)):
        if checksum != written:
            _refuse(f"checksum {written:.80} was written of block {number}, found {checksum}")


def _complete(fields: dict[str, Any], payload_bytes: int) -> dict[str, Any]:
    return {"magic": MAGIC, "format": FORMAT, **fields, "payload_bytes": payload_bytes}


def _sealed(fields: dict[str, Any], payload: bytes) -> bytes:
    fields = {**fields, "blocks": list(_blocks(memoryview(payload), len(payload)))}
    return _line(_to_json(fields)) + payload


def _line(text: bytes) -> bytes:
    """The header line of fields, with their checksum."""
    line = text[:-1] + f',"xxh3_128":"{_checksum(text)}"}}'.encode()
    return line.ljust(math.ceil((len(line) + 1) / ALIGNMENT) * ALIGNMENT - 1) + b"\n"


def _blocks(payload: memoryview, payload_bytes: int) -> Iterator[str]:
    """Checksums of the blocks of a payload, or of the first ones."""
    size = _block_bytes(payload_bytes)
    for begin in range(0, len(payload), size):
        yield _checksum(payload[begin : begin + size])


def _block_bytes(payload_bytes: int) -> int:
    """The least power of two that makes 64 blocks or fewer, at least 64 KiB."""
    return max(_SMALLEST_BLOCK, 1 << ((payload_bytes - 1) // _MOST_BLOCKS).bit_length())


def _checksum(data: bytes | memoryview) -> str:
    # xxh3 and not sha256: a checksum without a secret finds accidents and stops no attacker,
    # whichever it is, and this one is ten times faster (21 against 1.7 GB/s when it was chosen).
    return xxhash.xxh3_128_hexdigest(data)


def _to_json(fields: dict[str, Any]) -> bytes:
    return _JSON.encode(fields).encode("ascii")


def _described(cipher: str | None) -> str:
    return "not encrypted" if cipher is None else f"encrypted with key {cipher:.80}"


def _refuse(detail: str, reason: str = "corrupt") -> NoReturn:
    raise CorruptEntryError(detail, reason)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
