"""Which documents an entry's text is of. Knows nothing of what the ids mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from sac_rag.errors import CorruptEntryError
from sac_rag.stores.disk.index import Index
from sac_rag.stores.entry import is_key


class Sealing(Protocol):
    """Makes of an id the bytes that are kept, the same bytes for the same id, and back."""

    def seal(self, name: bytes) -> bytes:
        """What is kept."""

    def unseal(self, sealed: bytes) -> bytes:
        """What was sealed; raises ValueError for other bytes."""


class Plain:
    """Keeps ids as they are."""

    def seal(self, name: bytes) -> bytes:
        """What is kept."""
        return name

    def unseal(self, sealed: bytes) -> bytes:
        """What was kept."""
        return sealed


class Documents:
    """The documents of entries, in the index. What changes something belongs in a transaction."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.sealing: Sealing = Plain()

    def of(self, key: str, strict: bool = False) -> frozenset[str]:
        """The documents of an entry; unreadable ones are left out, or CorruptEntryError."""
        select = "SELECT CAST(document AS BLOB) FROM Owner WHERE key = ?"
        found = set()
        for (sealed,) in self._index.sql(select, (key,)).fetchall():
            try:
                found.add(self._open(sealed))
            except ValueError as error:
                if strict:
                    raise CorruptEntryError(f"its document ids cannot be read: {error}") from error
        return frozenset(found)

    def keys(self, document: str) -> list[str]:
        """The entries of a document that are there."""
        select = "SELECT key FROM Owner JOIN Cache USING (key) WHERE document = ? AND raw = 1"
        found = self._index.sql(select, (self._seal(document),)).fetchall()
        return [key for (key,) in found if is_key(key)]

    def add(self, key: str, documents: Iterable[str]) -> None:
        """Notes more documents for an entry."""
        for document in documents:
            self._index.sql(
                "INSERT OR IGNORE INTO Owner VALUES (?, ?)", (self._seal(document), key)
            )

    def drop_key(self, key: str) -> None:
        """Forgets whose an entry was."""
        self._index.sql("DELETE FROM Owner WHERE key = ?", (key,))

    def disown(self, document: str, keep: frozenset[str] = frozenset()) -> list[str]:
        """Takes a document from all entries but some; returns the keys left without any."""
        sealed = self._seal(document)
        select = "SELECT key FROM Owner WHERE document = ?"
        keys = [key for (key,) in self._index.sql(select, (sealed,)).fetchall() if key not in keep]
        left = []
        for key in keys:
            self._index.sql("DELETE FROM Owner WHERE document = ? AND key = ?", (sealed, key))
            others = self._index.sql("SELECT 1 FROM Owner WHERE key = ?", (key,)).fetchone()
            if not others and is_key(key):
                left.append(key)
        return left

    def count(self) -> int:
        """How many documents there are."""
        return int(self._index.sql("SELECT COUNT(DISTINCT document) FROM Owner").fetchone()[0])

    def drop_unreadable(self, key: str) -> None:
        """Drops those of an entry's documents that cannot be read."""
        select = "SELECT document, CAST(document AS BLOB) FROM Owner WHERE key = ?"
        for document, sealed in self._index.sql(select, (key,)).fetchall():
            try:
                self._open(sealed)
            except ValueError:
                delete = "DELETE FROM Owner WHERE document = ? AND key = ?"
                self._index.sql(delete, (document, key))

    def reseal(self, sealing: Sealing) -> None:
        """Keeps every id in another form from now on."""
        for (sealed,) in self._index.sql("SELECT DISTINCT document FROM Owner").fetchall():
            update = "UPDATE OR REPLACE Owner SET document = ? WHERE document = ?"
            self._index.sql(update, (sealing.seal(self.sealing.unseal(sealed)), sealed))
        self.sealing = sealing

    def _seal(self, document: str) -> bytes:
        # surrogatepass: half a surrogate pair is no valid text, but no reason to crash either.
        return self.sealing.seal(document.encode("utf-8", "surrogatepass"))

    def _open(self, sealed: bytes) -> str:
        return self.sealing.unseal(sealed).decode("utf-8", "surrogatepass")


def document_ids(documents: Iterable[str]) -> frozenset[str]:
    """Document ids as a set, refusing anything but several str."""
    if isinstance(documents, str):
        raise TypeError(f"documents must be several ids, was one str: {documents!r:.100}")
    ids = frozenset(documents)
    if not all(isinstance(name, str) for name in ids):
        raise TypeError(f"document ids must be str, were: {sorted(map(repr, ids))[:3]}")
    return ids
