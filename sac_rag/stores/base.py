"""DocumentStore: what a store can do beyond a mapping of keys to AnchorKVs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

from typing_extensions import Self

from sac_rag.kv import AnchorKV

# How many of the first KV entries are wanted of a chunk of that many source tokens.
Wanted: TypeAlias = Callable[[int], int]
# Stands for an argument that was not given.
NO_DEFAULT = object()


def strings(values: Iterable[str], what: str) -> list[str]:
    """Several strings as a list.

    Args:
        values: Any iterable but a str, whose letters nobody means.
        what: They are, for the error message.

    Raises:
        TypeError: for one str, or anything among them that is none.
    """
    if isinstance(values, str | bytes):
        raise TypeError(
            f"{what} must be several str, was one {type(values).__name__}: {values!r:.100}"
        )
    listed = list(values)
    for value in listed:
        if not isinstance(value, str):
            raise TypeError(f"{what} must be str, among them was: {value!r:.100}")
    return listed


class DocumentStore(MutableMapping[str, AnchorKV]):
    """A mapping of keys (lower-case hex digests) to AnchorKVs, and more.

    Each method beyond those of a mapping has a default, for a store that remembers its entries and
    nothing about them. A store that can do better overrides it.

    Attributes:
        remembers_documents: Whether the store records which documents an entry belongs to.
        read_only: Whether writing raises an OSError.
        evictions: Entries that this object evicted, or did not keep because there was no room.
        reads_many: Whether reading several entries at once takes less time than one by one.
    """

    remembers_documents: bool = False
    reads_many: bool = False
    read_only: bool = False
    evictions: int = 0

    def pop(self, key: str, default: Any = NO_DEFAULT) -> Any:
        """Removes an entry and returns it, or the default; others may remove it meanwhile."""
        try:
            kv = self[key]
        except KeyError:
            if default is NO_DEFAULT:
                raise
            return default
        with contextlib.suppress(KeyError):
            del self[key]
        return kv

    def read(self, key: str, wanted: Wanted) -> AnchorKV:
        """Reads an entry's first KV entries: the chunk at a higher ratio than it is stored at.

        Args:
            key: As for `store[key]`, which raises the same errors.
            wanted: Called with the chunk's source tokens, returns how many KV entries to read,
                at least 1. All that are stored are read where it returns more.
        """
        kv = self[key]
        return kv.first(min(wanted(kv.num_tokens), kv.num_entries))

    def read_many(
        self, wanted: Mapping[str, Wanted | None]
    ) -> dict[str, AnchorKV | KeyError | OSError]:
        """Reads several entries.

        Args:
            wanted: By key, as `read` takes it; None reads all KV entries.

        Returns:
            By key, the entry, or the error that reading it alone raises.
        """
        entries: dict[str, AnchorKV | KeyError | OSError] = {}
        for key, count in wanted.items():
            try:
                entries[key] = self[key] if count is None else self.read(key, count)
            except (KeyError, OSError) as error:
                entries[key] = error
        return entries

    def prefetch(self, keys: Iterable[str]) -> None:
        """Starts reading entries that will soon be asked for, and returns at once.

        What cannot be read is left out: asking for it says why. Default: nothing is done.

        Raises:
            TypeError: for keys that are one str.
        """
        strings(keys, "keys")

    def extent(self, key: str) -> tuple[int, int]:
        """Source tokens and stored KV entries of a chunk.

        Raises:
            KeyError: if there is no entry, or its extent is not known.
        """
        kv = self[key]
        return kv.num_tokens, kv.num_entries

    def put(
        self,
        key: str,
        kv: AnchorKV,
        documents: Iterable[str] = (),
        *,
        text_id: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Stores an entry, or adds documents to the one that is there.

        Args:
            key: A lower-case hex digest.
            kv: The entry.
            documents: Ids of documents that it belongs to.
            text_id: The same for the same text whatever the fingerprint, to explain a miss.
            fingerprint: What made the KV, see `note`.

        Raises:
            OSError: if it cannot be written.
            TypeError: for documents that are one str.
        """
        strings(documents, "documents")
        self[key] = kv

    def offer(
        self,
        key: str,
        kv: AnchorKV,
        documents: Iterable[str] = (),
        *,
        text_id: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Stores an entry as `put` does, in the path of an answer that does not need it.

        A store that others may keep waiting for long raises an OSError after a moment.
        """
        self.put(key, kv, documents, text_id=text_id, fingerprint=fingerprint)

    def documents(self, key: str) -> tuple[str, ...]:
        """Documents of an entry, sorted, without reading it.

        Raises:
            KeyError: if there is no entry.
        """
        if key not in self:
            raise KeyError(key)
        return ()

    def origin_of(self, key: str) -> tuple[str | None, str | None]:
        """The text id and the fingerprint that an entry was put with; None where not known."""
        return None, None

    def keys_of(self, document: str) -> list[str]:
        """Keys of a document's entries."""
        return []

    def forget(self, *documents: str) -> int:
        """Deletes what only these documents use; returns the number of entries deleted.

        Raises:
            OSError: if something could not be deleted; repeating it deletes the rest.
            TypeError: if the store does not remember documents.
        """
        if not self.remembers_documents:
            raise TypeError(
                "to forget a document, the store must remember documents, as a DiskStore does, "
                f"was: {self.type_name}"
            )
        return self.replace_documents(dict.fromkeys(strings(documents, "document ids"), ()))

    def replace_documents(self, documents: Mapping[str, Iterable[str]]) -> int:
        """Deletes what only these documents use, except some keys of each.

        Args:
            documents: By document id, the keys of its entries that stay.

        Returns:
            The number of entries deleted.
        """
        return 0

    def note(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        """Records what a fingerprint is made of, so that a difference can be named."""

    def why_absent(
        self, key: str, *, text_id: str | None = None, fingerprint: str | None = None
    ) -> str:
        """Why there is no entry: one of `errors.REASONS`, perhaps with details."""
        return "absent"

    def close(self) -> None:
        """Releases what the store holds open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def type_name(self) -> str:
        """Name of the class that the caller passed, for error messages."""
        return type(self).__name__


class MappingStore(DocumentStore):
    """Any mutable mapping as a DocumentStore that remembers no documents."""

    def __init__(self, mapping: MutableMapping[str, AnchorKV]) -> None:
        self._mapping = mapping

    def __getitem__(self, key: str) -> AnchorKV:
        return self._mapping[key]

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        self._mapping[key] = kv

    def __delitem__(self, key: str) -> None:
        del self._mapping[key]

    def __contains__(self, key: object) -> bool:
        return key in self._mapping

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    @property
    def type_name(self) -> str:
        """Name of the wrapped mapping's class."""
        return type(self._mapping).__name__


def as_document_store(store: MutableMapping[str, AnchorKV]) -> DocumentStore:
    """A DocumentStore itself, or a plain mapping, such as a dict, wrapped as one."""
    return store if isinstance(store, DocumentStore) else MappingStore(store)
