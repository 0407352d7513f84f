"""Cipher: encrypts bytes with a key of the caller's (extra "encrypt").

AES-256-GCM: without the key, encrypted bytes can neither be read nor changed unnoticed. Every
encryption draws a nonce of 96 bits; one key is good for about 2**32 of them (NIST SP 800-38D),
after which the store should get another (`DiskStore.rekey`).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
except ImportError as error:
    raise ImportError(
        "sac_rag.stores.cipher needs the 'encrypt' extra: pip install 'sac-rag[encrypt]'"
    ) from error

_KEY_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = 16
_TEXT_LIMIT = 1024  # characters read of a key file; a key has at most 64
_REMEDY = "make one with `openssl rand -hex 32`"
_HEX = re.compile("[0-9a-fA-F]{64}")


class Cipher:
    """Encrypts and decrypts with one key. Safe to share between threads and to send to processes.

    Its `repr` shows the id, never the key.

    Args:
        key: 32 random bytes; not a password.

    Attributes:
        overhead: Bytes that encrypting adds.
        id: Public name of the key, 16 hex digits: identifies the key without revealing it.

    Raises:
        TypeError, ValueError: if the key is not 32 bytes.
    """

    overhead: ClassVar[int] = _NONCE_BYTES + _TAG_BYTES

    def __init__(self, key: bytes) -> None:
        if not isinstance(key, bytes):
            raise TypeError(f"a key must be bytes, was: {type(key).__name__}")
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a key must have {_KEY_BYTES} bytes, had {len(key)}; {_REMEDY}")
        self._key = key
        self._aead = AESGCM(key)
        self._names = AESSIV(hashlib.blake2b(key=key, person=b"sac_rag names").digest())
        self.id = hashlib.blake2b(key=key, person=b"sac_rag key id", digest_size=8).hexdigest()

    @classmethod
    def from_env(cls, name: str) -> Self:
        """Reads the key from an environment variable, in hex or base64.

        Raises:
            ValueError: if it is not set, or not 32 bytes.
        """
        text = os.environ.get(name)
        if text is None:
            raise ValueError(f"the environment variable {name} must hold a key and is not set")
        return cls(_parse(text, f"the environment variable {name}"))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the key from an owner-only file, in hex or base64.

        Raises:
            PermissionError: if others may read or change it.
            ValueError: if it does not hold 32 bytes.
            OSError: if it cannot be read.
        """
        with Path(path).open(encoding="ascii", errors="replace") as file:
            # The mode of the open file: the name could be another file's by now.
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if os.name == "posix" and mode & 0o077:
                raise PermissionError(
                    f"the key file {os.fspath(path)} must be its owner's alone (mode 600), "
                    f"has mode {mode:o}; run `chmod 600` on it, and make another key if others "
                    "may have read it"
                )
            text = file.read(_TEXT_LIMIT)
        return cls(_parse(text, f"the key file {os.fspath(path)}"))

    def encrypt(self, data: bytes | memoryview, about: bytes) -> bytes:
        """Encrypts bytes.

        Args:
            data: The bytes to protect.
            about: Bytes that stay readable beside them, and must be the same to decrypt.

        Returns:
            A nonce of 12 bytes, the encrypted data, and a tag of 16 bytes.
        """
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, data, about)

    def decrypt(self, data: bytes | bytearray | memoryview, about: bytes) -> bytes:
        """The data of encrypted bytes.

        Raises:
            ValueError: if it was encrypted with another key, was changed, or `about` differs.
        """
        view = memoryview(data)
        if len(view) < self.overhead:
            raise ValueError(f"{len(view)} bytes are too few to have been encrypted")
        try:
            return self._aead.decrypt(bytes(view[:_NONCE_BYTES]), view[_NONCE_BYTES:], about)
        except InvalidTag:
            raise ValueError(f"was not encrypted with key {self.id}, or was changed") from None

    def seal(self, name: bytes) -> bytes:
        """Encrypts a name, always to the same bytes, so that it can be looked up (RFC 5297)."""
        return self._names.encrypt(name, None)

    def unseal(self, sealed: bytes) -> bytes:
        """The name of sealed bytes.

        Raises:
            ValueError: if it was not sealed with this key.
        """
        try:
            return self._names.decrypt(sealed, None)
        except InvalidTag:
            raise ValueError(f"the name was not encrypted with key {self.id}") from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._key,)


def _parse(text: str, source: str) -> bytes:
    """A key from its hex or base64 digits, which no error message shows."""
    text = text.strip()
    if _HEX.fullmatch(text):
        return bytes.fromhex(text)
    try:
        padded = text + "=" * (-len(text) % 4)
        key = base64.b64decode(padded.replace("-", "+").replace("_", "/"), validate=True)
    except ValueError:  # of which binascii.Error is one
        key = b""
    if len(key) != _KEY_BYTES:
        raise ValueError(
            f"{source} must hold {_KEY_BYTES} bytes as 64 hex digits or as base64, "
            f"held {len(text)} other characters; {_REMEDY}"
        )
    return key
