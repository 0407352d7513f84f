"""LangChain documents as chunks, and marked documents as they were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import overload

from langchain_core.documents import Document

from langchain_sac.marker import KeyOf, whole, without_tags
from sac_rag import Chunk, SacRAG
from sac_rag.precompress.sync import sync as sync_chunks
from sac_rag.reports import BadRecord, PrecompressReport

log = logging.getLogger(__name__)


def chunk_of(document: Document, key_of: KeyOf) -> Chunk:
    """The chunk of a document, with the id that the command line gives LangChain's exports.

    Its id is `metadata["source"]`, the file that it was cut from, as a str, or else the id of the
    document; its title is `metadata["title"]`. A marked document is the chunk in its marker.

    Args:
        document: A document.
        key_of: Computes the key of a text.
    """
    marked = whole(document.page_content, key_of)
    source = _named(document, "source")
    return Chunk(
        text=document.page_content if marked is None else marked.text,
        id=document.id if source is None else source,
        title=_named(document, "title"),
        ratio=None if marked is None else marked.ratio,
    )


def log_bad(record: BadRecord) -> None:
    """Logs what was left out: one document that is too long does not end the ingestion of all."""
    log.warning("%s was not compressed: %s", record.place, record.problem)


def sync(
    rag: SacRAG,
    documents: Iterable[Document],
    *,
    ratio: int | None = None,
    on_bad: Callable[[BadRecord], None] | None = None,
) -> PrecompressReport:
    """Makes the store hold the anchors of these documents and of no others.

    Goes with `index(…, cleanup="full")`: documents and splits that are gone from the index are gone
    from the store. Entries of other namespaces stay, and so do those of texts without a document,
    which had neither `metadata["source"]` nor an id when they were compressed.

    Example:
        >>> rag = SacRAG.from_pretrained("smollm2-135m", store=DiskStore(folder))
        >>> splits = [Document("Built in 1889.", id="1"), Document("Painted red.", id="2")]
        >>> sync(rag, splits).computed
        2
        >>> sync(rag, splits[:1]).deleted
        1

    Args:
        rag: With the store.
        documents: All splits of all documents that there are.
        ratio: Source tokens per KV entry to store them at: that of the SACCompressor, if it has
            one.
        on_bad: Called with each document that is longer than the model's context, which is left
            out. Default: log a warning.

    Returns:
        The counts; `deleted` has the entries deleted.

    Raises:
        TypeError: for anything else than Documents, or if the store does not record documents.
        ValueError: for no documents at all.
        OSError: if the store cannot be read or written.
    """
    key_of = require_pipeline(rag, "sync").compressor.key
    checked = require_documents(documents)
    if not checked:
        raise ValueError(
            "got no documents, so that everything stored would be deleted; an iterator can be read "
            "only once, and to delete a document use rag.forget(source)"
        )
    chunks = (chunk_of(document, key_of) for document in checked)
    if ratio is not None:
        chunks = (replace(chunk, ratio=ratio) for chunk in chunks)
    return sync_chunks(rag.compressor, chunks, on_bad=on_bad or log_bad)


def require_pipeline(rag: object, function: str) -> SacRAG:
    """The pipeline that a function was called with.

    Raises:
        TypeError: for anything else, such as the documents that a chain hands to `format_docs`
            where `format_docs(rag)` is meant.
    """
    if not isinstance(rag, SacRAG):
        raise TypeError(
            f"expected a SacRAG, as in {function}(rag), got a {type(rag).__name__}: {function} "
            "takes the pipeline first"
        )
    return rag


def require_documents(documents: Iterable[object]) -> list[Document]:
    """The documents as a list.

    Raises:
        TypeError: if one is not a Document, or a single document is given.
    """
    if isinstance(documents, (Document, str)):
        raise TypeError(
            f"expected a sequence of Documents, got one {type(documents).__name__}; put it in a "
            "list of Documents"
        )
    checked: list[Document] = []
    for document in documents:
        if not isinstance(document, Document):
            raise TypeError(f"expected Documents, got a {type(document).__name__} among them")
        checked.append(document)
    return checked


@overload
def unmark(marked: str) -> str: ...  # type: ignore[overload-overlap]  # a str is no list of them
@overload
def unmark(marked: Document) -> Document: ...
@overload
def unmark(marked: Sequence[Document]) -> list[Document]: ...
@overload
def unmark(marked: Sequence[str]) -> list[str]: ...


def unmark(
    marked: str | Document | Sequence[Document] | Sequence[str],
) -> str | Document | list[Document] | list[str]:
    """Takes the tags of markers off, to show what users may see: the text.

    Example:
        >>> rag = SacRAG.from_pretrained("smollm2-135m")
        >>> (marked,) = SACCompressor(rag).invoke([Document("Built in 1889.")])
        >>> unmark(marked).page_content
        'Built in 1889.'
        >>> unmark(f"See: {marked.page_content}")
        'See: Built in 1889.'

    Args:
        marked: A text with markers anywhere in it, a document, or several of either.

    Returns:
        The same without tags; documents are copies. Where the text around a marker is HTML or JSON,
        what was marked stays escaped as that is.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(marked, str):
        return without_tags(marked)
    if isinstance(marked, Document):
        return marked.model_copy(update={"page_content": without_tags(marked.page_content)})
    if isinstance(marked, Sequence) and all(isinstance(one, (str, Document)) for one in marked):
        return [unmark(one) for one in marked]  # type: ignore[return-value]  # as many as given
    raise TypeError(
        f"expected texts or Documents, got: {type(marked).__name__}; unmark what has them, such as "
        'result["context"] or message.text'
    )


def _named(document: Document, field: str) -> str | None:
    """A field of the metadata as a str: a Path and a number too; None, NaN and "" are no values."""
    value = document.metadata.get(field)
    return None if value is None or value != value else str(value) or None
