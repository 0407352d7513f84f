"""What is left in a store of documents that have changed. Knows nothing of how they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.stores.abilities import ReindexingStore


class Reindexing:
    """Watches the chunks of whole documents go by and deletes what else the store has of them.

    Chunks of one document may come apart from each other. In memory are the ids of all documents,
    and the keys of those that have changed.
    """

    def __init__(self, compressor: CachedCompressor) -> None:
        self._compressor = compressor
        self._store = compressor.store if isinstance(compressor.store, ReindexingStore) else None
        self._seen: set[str] = set()
        # The keys that each document with something to delete still has.
        self._changed: dict[str, set[str]] = {}

    def watch(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Hands chunks on."""
        document: str | None = None
        keys: set[str] = set()
        for chunk in chunks:
            if chunk.id != document:
                self._end(document, keys)
                document, keys = chunk.id, set()
            if not chunk.is_empty:
                keys.add(self._compressor.key(chunk.text))
            yield chunk
        self._end(document, keys)

    def finish(self) -> int:
        """Deletes, once all chunks are stored; killed before, it is done by the next run.

        Returns:
            How many entries were deleted.
        """
        if self._store is None or not self._changed:
            return 0
        named = {self._compressor.document_id(name): keys for name, keys in self._changed.items()}
        deleted = self._store.replace_documents(named)
        self._changed.clear()
        return deleted

    def _end(self, document: str | None, keys: set[str]) -> None:
        if document is None or self._store is None:
            return
        if document in self._changed:
            self._changed[document] |= keys
        elif document not in self._seen:
            stored = self._store.keys_of(self._compressor.document_id(document))
            if not keys.issuperset(stored):
                self._changed[document] = keys
        # Else nothing was to be deleted, and what is there since is of this run.
        self._seen.add(document)
