r"""AnchorKV to bytes and back. Knows nothing of where the bytes lie.

An entry is one line of JSON, to be read with `head -1`, and then the tensors as safetensors (see
payload.py):

    {"magic":"sac_rag.AnchorKV","format":3,"key":…,"fingerprint":…,"num_tokens":…,"dtype":…,
     "shape":[layers,kv_heads,entries,head_dim],"payload_bytes":…,"blocks":[…],"xxh3_128":…}
    <spaces to a multiple of 64 bytes>\n<safetensors>

"blocks" are checksums of the payload's blocks of equal size, so that the first blocks can be read
and verified alone; "xxh3_128" is the checksum of all the other fields.

What made the KV (weights, tokenizer, ratio) is told by its fingerprint, where that is known; the
key covers it and the text. An encrypted entry is another line, and behind it such an entry as the
cipher made it unreadable:

    {"magic":"sac_rag.AnchorKV","format":3,"key":…,"cipher":<id of the cipher's key>,
     "payload_bytes":…,"blocks":[…],"xxh3_128":…}<spaces>\n<nonce, ciphertext, tag>
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeGuard

import xxhash

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.stores.base import Wanted
from sac_rag.stores.payload import Layout, from_bytes, shape_of, stored_dtype, to_bytes

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

Bytes: TypeAlias = bytes | bytearray | memoryview

MAGIC = "sac_rag.AnchorKV"
FORMAT = 3

_HEADER_LIMIT = 4096  # bytes parsed before anything is verified; a header has at most 2700
_ALIGNMENT = 64
_SMALLEST_BLOCK = 64 * 1024
_MOST_BLOCKS = 64
_PLAIN: dict[str, type] = {
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


def is_key(key: object) -> TypeGuard[str]:
    """Whether this can name an entry: a lower-case hex digest of at most 64 characters."""
    return isinstance(key, str) and _DIGEST.fullmatch(key) is not None


def encode(key: str, kv: AnchorKV, cipher: Cipher | None = None, fingerprint: str = "") -> bytes:
    """The bytes of an entry.

    Args:
        key: A lower-case hex digest.
        kv: A QuantizedKV is stored in 8 bits a number.
        cipher: Encrypts all but key and length; None stores in plain.
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
    """The value of an entry, every bit of it verified.

    Its tensors are views of `data` if that is writable and not encrypted, else of one copy of it.

    Raises:
        CorruptEntryError: if these are not the bytes that `encode` made for this key, whatever they
            are; with reason "format" if they are of another format version, and with reason "key"
            if they are encrypted with another key than the cipher's, or with one and there is no
            cipher, or are not encrypted and should be.
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
    """The value's first entries, of which every bit is verified and little else is read.

    An encrypted entry is read whole.

    Args:
        key: A lower-case hex digest.
        first: Reads the entry's first bytes, as many as it is called with, into writable memory.
        nbytes: Of the whole entry.
        wanted: Called with the chunk's source tokens. All entries are read where it returns more.
        cipher: As `decode` takes it.

    Raises:
        CorruptEntryError: as `decode`, if what was read is not the beginning of an entry.
        ValueError: if fewer than 1 are wanted.
    """
    if cipher is not None:
        kv = decode(key, first(nbytes), cipher)
        return kv.first(min(wanted(kv.num_tokens), kv.num_entries))
    fields, start = _parse(first(min(nbytes, _HEADER_LIMIT)), nbytes)
    _require_cipher(fields, None)
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


def reencrypt(data: Bytes, old: Cipher | None, new: Cipher | None) -> bytes:
    """The same entry, encrypted with another key; None for in plain.

    Raises:
        CorruptEntryError: as `decode`, if the old cipher does not give what was encoded.
    """
    fields, payload = _decrypted(data, old)
    del fields["blocks"], fields["xxh3_128"]
    entry = _sealed(fields, bytes(payload))
    return entry if new is None else _encrypted(fields["key"], entry, new)


def _encrypted(key: str, entry: bytes, cipher: Cipher) -> bytes:
    fields = _complete({"key": key, "cipher": cipher.id}, len(entry) + cipher.overhead)
    payload = cipher.encrypt(entry, about=_spelt(fields))
    return _sealed(fields, payload)


def _decrypted(data: Bytes, cipher: Cipher | None) -> tuple[dict[str, Any], memoryview]:
    """Fields and tensors of an entry, which are those that were encoded."""
    fields, payload = _opened(data)
    _require_cipher(fields, cipher)
    if cipher is None:
        return fields, payload
    about = _complete({"key": fields["key"], "cipher": cipher.id}, fields["payload_bytes"])
    try:
        entry = cipher.decrypt(payload, about=_spelt(about))
    except ValueError as error:
        raise CorruptEntryError(f"the entry {error}") from error
    inner, payload = _opened(entry)
    if "cipher" in inner or inner["key"] != fields["key"]:
        _refuse("what was encrypted is not this entry")
    return inner, payload


def _require_cipher(fields: dict[str, Any], cipher: Cipher | None) -> None:
    own, given = fields.get("cipher"), None if cipher is None else cipher.id
    if own != given:
        # In plain where a cipher is given, anybody could have written it.
        _refuse(
            f"the entry is {_described(own)}, the cipher given is {given or 'none'}", reason="key"
        )


def _layout(key: str, fields: dict[str, Any]) -> Layout:
    """Where the tensors of an entry lie, if it is that of a key."""
    if fields["key"] != key:
        _refuse(f"this is the entry of key {fields['key']!r:.80}, not of {key!r:.80}")
    # Only an entry made on purpose is refused below: its checksum is right and the rest is not.
    try:
        layout = Layout(fields["dtype"], fields["shape"])
    except ValueError as error:
        raise CorruptEntryError(f"its tensors cannot be read: {error}") from error
    layers, kv_heads, entries, _ = layout.shape
    if entries > layers * kv_heads * fields["num_tokens"]:
        _refuse(f"{entries} entries of {fields['num_tokens']!s:.20} tokens are too many")
    if layout.nbytes(entries) != fields["payload_bytes"]:
        _refuse(f"its tensors take {layout.nbytes(entries)} bytes, not {fields['payload_bytes']}")
    return layout


def _value(fields: dict[str, Any], payload: memoryview, layout: Layout, entries: int) -> AnchorKV:
    try:
        return from_bytes(payload, layout, entries, fields["num_tokens"])
    except ValueError as error:
        raise CorruptEntryError(f"its tensors cannot be read: {error}") from error


def _opened(data: Bytes) -> tuple[dict[str, Any], memoryview]:
    """Fields and payload of an entry, encrypted or not, every bit as it was written."""
    view = memoryview(data).cast("B")
    fields, start = _parse(view[:_HEADER_LIMIT], len(view))
    _verify(fields, view[start:])
    return fields, view[start:]


def _parse(head: memoryview, total: int) -> tuple[dict[str, Any], int]:
    """Fields of the header line, every bit as it was written, and its length.

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
        # Asked first: another version may have other fields, and another checksum.
        _refuse(
            f"the entry is of format {version!s:.20}, this sac_rag reads format {FORMAT}",
            reason="format",
        )
    expected = _ENCRYPTED if "cipher" in fields else _PLAIN
    if (
        {name: type(value) for name, value in fields.items()} != expected
        or any(type(size) is not int for size in fields.get("shape", ()))
        or any(type(checksum) is not str for checksum in fields["blocks"])
    ):
        _refuse(f"the header line has other fields than those of format {FORMAT}")
    # Over the line as it is and not as it is parsed, so that its every bit is covered.
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
    """Refuses a payload, or the first blocks of one, unless every bit is as it was written."""
    found = _blocks(payload, fields["payload_bytes"])
    for number, (checksum, written) in enumerate(zip(found, fields["blocks"], strict=False)):
        if checksum != written:
            _refuse(f"checksum {written:.80} was written of block {number}, found {checksum}")


def _complete(fields: dict[str, Any], payload_bytes: int) -> dict[str, Any]:
    return {"magic": MAGIC, "format": FORMAT, **fields, "payload_bytes": payload_bytes}


def _sealed(fields: dict[str, Any], payload: bytes) -> bytes:
    fields = {**fields, "blocks": list(_blocks(memoryview(payload), len(payload)))}
    return _line(_spelt(fields)) + payload


def _line(spelt: bytes) -> bytes:
    """The header line of fields, with their checksum."""
    line = spelt[:-1] + f',"xxh3_128":"{_checksum(spelt)}"}}'.encode()
    return line.ljust(math.ceil((len(line) + 1) / _ALIGNMENT) * _ALIGNMENT - 1) + b"\n"


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


def _spelt(fields: dict[str, Any]) -> bytes:
    return _JSON.encode(fields).encode("ascii")


def _described(cipher: str | None) -> str:
    return "not encrypted" if cipher is None else f"encrypted with key {cipher:.80}"


def _refuse(detail: str, reason: str = "corrupt") -> NoReturn:
    raise CorruptEntryError(detail, reason)
