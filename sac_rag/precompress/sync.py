"""What a store has of documents made equal to the documents that there are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.precompress.job import precompress
from sac_rag.reports import BadRecord, PrecompressReport
from sac_rag.stores.base import strings


def sync(
    compressor: CachedCompressor,
    chunks: Iterable[ChunkLike],
    *,
    on_bad: Callable[[BadRecord], None] | None = None,
    keep: Iterable[str] = (),
) -> PrecompressReport:
    """Compresses all documents that there are, and deletes what is stored of any other.

    Entries of other namespaces stay, and so do those that belong to no document: texts that were
    compressed without an id.

    Args:
        compressor: With the store.
        chunks: All chunks of all documents of this namespace; streamed, never all in memory.
        on_bad: Called with each chunk that is longer than the model's context and skipped.
            Default: raise.
        keep: Ids of documents whose entries stay though none of their chunks is given.

    Returns:
        The counts; `deleted` has the entries of former versions and of documents that are gone.

    Raises:
        TypeError: if the store does not record documents.
        PromptTooLongError: for a chunk longer than the model's context; nothing is deleted then.
        OSError: if the store cannot be read or written.
    """
    store = compressor.store
    if not store.remembers_documents:
        raise TypeError(
            "to delete what is gone, the store must remember documents, as a DiskStore does, "
            f"was: {store.type_name}"
        )
    current = {compressor.document_id(document) for document in strings(keep, "keep")}

    def watched() -> Iterator[Chunk]:
        for chunk in map(Chunk.of, chunks):
            if chunk.id is not None:
                current.add(compressor.document_id(chunk.id))
            yield chunk

    report = precompress(compressor, watched(), on_bad=on_bad, whole_documents=True)
    gone = stored_documents(compressor) - current
    return report + PrecompressReport(deleted=store.forget(*gone) if gone else 0)


def stored_documents(compressor: CachedCompressor) -> set[str]:
    """Ids, as the store has them, of the documents of this namespace that have entries."""
    documents: set[str] = set()
    for key in compressor.store:
        with contextlib.suppress(KeyError):  # evicted meanwhile
            documents.update(compressor.store.documents(key))
    return {document for document in documents if compressor.owns(document)}
