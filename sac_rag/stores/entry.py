r"""AnchorKV to bytes and back. Knows nothing of where the bytes lie.

An entry is one line of JSON, to be read with `head -1`, and then the tensors as safetensors:

    {"magic":"sac_rag.AnchorKV","format":2,"key":…,"fingerprint":…,"num_tokens":…,"dtype":…,
     "shape":[…],"payload_bytes":…,"xxh3_128":…}<spaces to a multiple of 64 bytes>\n<safetensors>

What made the KV (weights, tokenizer, ratio) is told by its fingerprint, where that is known; the
key covers it and the text. An encrypted entry is another line, and behind it such an entry as the
cipher made it unreadable:

    {"magic":"sac_rag.AnchorKV","format":2,"key":…,"cipher":<id of the cipher's key>,
     "payload_bytes":…,"xxh3_128":…}<spaces>\n<nonce, ciphertext, tag>
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeGuard

import xxhash

from sac_rag.errors import CorruptEntry
from sac_rag.kv import AnchorKV
from sac_rag.stores.payload import from_bytes, stored_dtype, to_bytes

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

Bytes: TypeAlias = bytes | bytearray | memoryview

MAGIC = "sac_rag.AnchorKV"
FORMAT = 2

_HEADER_LIMIT = 4096  # bytes parsed before anything is verified; a header of ours has about 350
_ALIGNMENT = 64
_PLAIN: dict[str, type] = {
    "magic": str,
    "format": int,
    "key": str,
    "fingerprint": str,
    "num_tokens": int,
    "dtype": str,
    "shape": list,
    "payload_bytes": int,
    "xxh3_128": str,
}
_ENCRYPTED: dict[str, type] = {
    "magic": str,
    "format": int,
    "key": str,
    "cipher": str,
    "payload_bytes": int,
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
    dtype = stored_dtype(kv)
    fields = {
        "key": key,
        "fingerprint": fingerprint,
        "num_tokens": kv.num_tokens,
        "dtype": dtype,
        "shape": list(kv.shape),
    }
    payload = to_bytes(kv)
    entry = _sealed(_complete(fields, len(payload)), payload)
    return entry if cipher is None else _encrypted(key, entry, cipher)


def decode(key: str, data: Bytes, cipher: Cipher | None = None) -> AnchorKV:
    """The value of an entry, every bit of it verified.

    Its tensors are views of `data` if that is writable and not encrypted, else of one copy of it.

    Raises:
        CorruptEntry: if these are not the bytes that `encode` made for this key, whatever they
            are; with reason "format" if they are of another format version, and with reason "key"
            if they are encrypted with another key than the cipher's, or with one and there is no
            cipher, or are not encrypted and should be.
    """
    fields, payload = _decrypted(data, cipher)
    if fields["key"] != key:
        _refuse(f"this is the entry of key {fields['key']!r:.80}, not of {key!r:.80}")
    if payload.readonly:
        payload = memoryview(bytearray(payload))
    try:
        kv = from_bytes(payload, fields["dtype"], fields["num_tokens"])
    except ValueError as error:
        # Only an entry made on purpose gets here: its checksum is right and its tensors are not.
        raise CorruptEntry(f"its tensors cannot be read: {error}") from error
    found = (stored_dtype(kv), list(kv.shape))
    if found != (fields["dtype"], fields["shape"]):
        _refuse(
            f"the header says {fields['dtype']} of shape {fields['shape']}, "
            f"the tensors are {found[0]} of shape {found[1]}"
        )
    return kv


def reencrypt(data: Bytes, old: Cipher | None, new: Cipher | None) -> bytes:
    """The same entry, encrypted with another key; None for in plain.

    Raises:
        CorruptEntry: as `decode`, if the old cipher does not give what was encoded.
    """
    fields, payload = _decrypted(data, old)
    entry = _header(fields) + payload
    return entry if new is None else _encrypted(fields["key"], entry, new)


def _encrypted(key: str, entry: bytes, cipher: Cipher) -> bytes:
    fields = _complete({"key": key, "cipher": cipher.id}, len(entry) + cipher.overhead)
    payload = cipher.encrypt(entry, about=_spelt(fields))
    return _sealed(fields, payload)


def _decrypted(data: Bytes, cipher: Cipher | None) -> tuple[dict[str, Any], memoryview]:
    """Fields and tensors of an entry, which are those that were encoded."""
    fields, payload = _opened(data)
    own, given = fields.get("cipher"), None if cipher is None else cipher.id
    if own != given:
        # In plain where a cipher is given, anybody could have written it.
        _refuse(
            f"the entry is {_described(own)}, the cipher given is {given or 'none'}", reason="key"
        )
    if cipher is None:
        return fields, payload
    try:
        entry = cipher.decrypt(payload, about=_spelt(_without_checksum(fields)))
    except ValueError as error:
        raise CorruptEntry(f"the entry {error}") from error
    inner, payload = _opened(entry)
    if "cipher" in inner or inner["key"] != fields["key"]:
        _refuse("what was encrypted is not this entry")
    return inner, payload


def _opened(data: Bytes) -> tuple[dict[str, Any], memoryview]:
    """Fields and payload of an entry, encrypted or not, every bit as it was written."""
    view = memoryview(data).cast("B")
    line = bytes(view[:_HEADER_LIMIT])
    line = line[: line.find(b"\n") + 1]
    fields = _parse(line, len(view))
    payload = view[len(line) :]
    if fields["payload_bytes"] != len(payload):
        _refuse(f"{fields['payload_bytes']} bytes were written behind it, found {len(payload)}")
    found = _checksum(_without_checksum(fields), payload)
    if fields["xxh3_128"] != found:
        _refuse(f"checksum {fields['xxh3_128']:.80} was written, found {found}")
    return fields, payload


def _parse(line: bytes, total: int) -> dict[str, Any]:
    if not line:
        _refuse(f"no header line at the start of {total} bytes")
    try:
        fields = json.loads(line)
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
    expected = _ENCRYPTED if "cipher" in fields else _PLAIN
    if {name: type(value) for name, value in fields.items()} != expected or any(
        type(size) is not int for size in fields.get("shape", ())
    ):
        _refuse(f"the header line has other fields than those of format {FORMAT}")
    if _header(fields) != line:
        # One spelling only, so that the checksum of the fields is one of the line's every bit.
        _refuse("the header line is not spelt as it is written")
    return fields


def _complete(fields: dict[str, Any], payload_bytes: int) -> dict[str, Any]:
    return {"magic": MAGIC, "format": FORMAT, **fields, "payload_bytes": payload_bytes}


def _without_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "xxh3_128"}


def _sealed(fields: dict[str, Any], payload: bytes) -> bytes:
    return _header({**fields, "xxh3_128": _checksum(fields, payload)}) + payload


def _header(fields: dict[str, Any]) -> bytes:
    line = _spelt(fields)
    return line.ljust(math.ceil((len(line) + 1) / _ALIGNMENT) * _ALIGNMENT - 1) + b"\n"


def _checksum(fields: dict[str, Any], payload: bytes | memoryview) -> str:
    # xxh3 and not sha256: a checksum without a secret finds accidents and stops no attacker,
    # whichever it is, and this one is ten times faster (21 against 1.7 GB/s when it was chosen).
    digest = xxhash.xxh3_128(_spelt(fields))
    digest.update(payload)
    return digest.hexdigest()


def _spelt(fields: dict[str, Any]) -> bytes:
    return _JSON.encode(fields).encode("ascii")


def _described(cipher: str | None) -> str:
    return "not encrypted" if cipher is None else f"encrypted with key {cipher:.80}"


def _refuse(detail: str, reason: str = "corrupt") -> NoReturn:
    raise CorruptEntry(detail, reason)
