"""What a store may be able to do besides being a mapping. Knows nothing of who asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from sac_rag.kv import AnchorKV


@runtime_checkable
class DocumentStore(Protocol):
    """Remembers which documents an entry belongs to."""

    def put(self, key: str, kv: AnchorKV, documents: Iterable[str] = ()) -> None:
        """Stores an entry, or adds documents to the one that is there."""

    def documents(self, key: str) -> tuple[str, ...]:
        """The documents of an entry, without reading it."""


@runtime_checkable
class ForgettingStore(Protocol):
    """Can forget a document."""

    def forget(self, document: str) -> int:
        """Deletes what only this document uses; says how many entries that were."""


@runtime_checkable
class ReindexingStore(Protocol):
    """Can take in documents anew."""

    def keys_of(self, document: str) -> list[str]:
        """Keys of a document's entries."""

    def replace_documents(self, documents: Mapping[str, Iterable[str]]) -> int:
        """Deletes what only these use, but for some keys of each; says how many that were."""


@runtime_checkable
class ExplainingStore(Protocol):
    """Can tell why an entry is not there."""

    def put(
        self,
        key: str,
        kv: AnchorKV,
        documents: Iterable[str] = (),
        *,
        text_id: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Stores an entry with what explains its absence later."""

    def note(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        """Remembers what a fingerprint is made of."""

    def why_absent(
        self, key: str, *, text_id: str | None = None, fingerprint: str | None = None
    ) -> str:
        """The reason, one of `misses.REASONS`."""
