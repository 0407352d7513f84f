"""What chunks and documents are called in a store. Knows nothing of stores or models."""

from __future__ import annotations

import hashlib


class Namespace:
    """A tenant's names: digests that no other namespace has and that do not give the text away.

    The namespace is the secret of a keyed hash. Who does not know it cannot tell from a name
    whether it is that of a text he guesses, or whether two tenants have the same text. The
    namespace "" is known to everybody.
    """

    def __init__(self, name: str) -> None:
        self._secret = hashlib.blake2b(_bytes(name), person=b"sac_rag secret").digest()
        self._is_open = not name

    def key(self, fingerprint: str, text: str) -> str:
        """The key of a chunk as one compressor makes it."""
        return self._digest("key", fingerprint, text)

    def text_id(self, text: str) -> str:
        """The same for every compressor, to find out that a text is there, compressed otherwise."""
        return self._digest("text", text)

    def document_id(self, document: str) -> str:
        """A document's id in the store: its own in the namespace "", else one of this namespace's.

        The id itself stays readable, so that an operator can forget a document.
        """
        return document if self._is_open else f"{self._digest('document')[:16]}:{document}"

    def _digest(self, purpose: str, *parts: str) -> str:
        digest = hashlib.blake2b(key=self._secret, person=purpose.encode(), digest_size=32)
        for part in parts:
            encoded = _bytes(part)
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return digest.hexdigest()


def _bytes(text: str) -> bytes:
    # surrogatepass: half a surrogate pair is no valid text, but no reason to crash either.
    return text.encode("utf-8", "surrogatepass")
