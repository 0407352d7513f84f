"""What a store may be able to do besides being a mapping. Knows nothing of who asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeAlias, runtime_checkable

from sac_rag.kv import AnchorKV

# How many of the first KV entries are wanted of a chunk of that many source tokens.
Wanted: TypeAlias = Callable[[int], int]


@runtime_checkable
class PartialStore(Protocol):
    """Can read a chunk at a higher ratio than it is stored at: the first of its KV entries."""

    def read(self, key: str, wanted: Wanted) -> AnchorKV:
        """Reads an entry's first KV entries.

        Args:
            key: As for `store[key]`, which raises the same errors.
            wanted: Called with the chunk's source tokens, returns how many KV entries to read,
                at least 1. All that are stored are read where it returns more.
        """

    def extent(self, key: str) -> tuple[int, int]:
        """Source tokens and stored KV entries of a chunk, without reading them.

        Raises:
            KeyError: if there is no entry, or its extent is not known.
        """


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
