"""Namespace: keys of chunks and ids of documents in a store, separate for each tenant."""

from __future__ import annotations

import hashlib
import re

# How the ids of a namespace's documents begin.
_PREFIX = re.compile("[0-9a-f]{16}:")


class Namespace:
    """Digests that differ from those of every other namespace and do not reveal the text.

    The namespace is the secret of a keyed hash. Without it, nobody can test whether a key belongs
    to a guessed text, or whether two tenants have the same text. The namespace "" is public.
    """

    def __init__(self, name: str) -> None:
        self._secret = hashlib.blake2b(_bytes(name), person=b"sac_rag secret").digest()
        self._is_open = not name

    def key(self, fingerprint: str, text: str) -> str:
        """The key of a chunk that a compressor with this fingerprint makes."""
        return self._digest("key", fingerprint, text)

    def text_id(self, text: str) -> str:
        """A digest of the text alone: shows that another compressor has stored the text."""
        return self._digest("text", text)

    def document_id(self, document: str) -> str:
        """A document's id in the store: unchanged in the namespace "", else with a prefix.

        The caller's id stays readable in it, so that an operator can forget a document. In the
        namespace "", one that looks like another namespace's gets a prefix too, and is not it.
        """
        if self._is_open and _PREFIX.match(document) is None:
            return document
        return f"{self._digest('document')[:16]}:{document}"

    def owns(self, document_id: str) -> bool:
        """Whether an id in the store is of this namespace."""
        if self._is_open and _PREFIX.match(document_id) is None:
            return True
        return document_id.startswith(f"{self._digest('document')[:16]}:")

    def _digest(self, purpose: str, *parts: str) -> str:
        digest = hashlib.blake2b(key=self._secret, person=purpose.encode(), digest_size=32)
        for part in parts:
            encoded = _bytes(part)
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return digest.hexdigest()


def _bytes(text: str) -> bytes:
    # surrogatepass: half a surrogate pair is not valid text, but must not raise here.
    return text.encode("utf-8", "surrogatepass")
