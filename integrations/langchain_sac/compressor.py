"""SACCompressor: marks retrieved documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

from langchain_sac.documents import chunk_of, log_bad, require_documents
from langchain_sac.marker import mark, whole
from sac_rag import Chunk, SacRAG, by_rank
from sac_rag.reports import BadRecord


class SACCompressor(
    BaseDocumentCompressor,
    RunnableSerializable[Sequence[Document], list[Document]],
    BaseDocumentTransformer,
):
    """Marks retrieved documents, so that ChatSAC attends to their anchors instead of reading them.

    At question time documents are only marked: no model runs, and the query has no influence. They
    are compressed ahead of time by `transform_documents`, or else by ChatSAC. Stands behind a
    retriever (`retriever | compressor`), in LangChain's ContextualCompressionRetriever, and before
    indexing (`transform_documents`).

    Example:
        >>> rag = SacRAG.from_pretrained("smollm2-135m")
        >>> compressor = SACCompressor(rag)
        >>> splits = [Document("The lighthouse was built in 1889.", metadata={"source": "tower"})]
        >>> compressor.transform_documents(splits) == splits  # ahead of time: compressed, unchanged
        True
        >>> (marked,) = compressor.invoke(splits)  # at question time
        >>> marked.page_content[:16], marked.page_content[80:]
        ('<sac:chunk key="', '" source="tower">The lighthouse was built in 1889.</sac:chunk>')

    Attributes:
        rag: Gives the keys of markers; that of ChatSAC must have the same model, compressor and
            namespace.
        ratio: Source tokens per KV entry of marked documents, whatever ratio ChatSAC has. Default:
            that of ChatSAC, or else of the compressor.
        by_rank: Whether documents come best first and share the KV entries of that ratio by rank:
            see `sac_rag.by_rank`.
    """

    rag: SacRAG = Field(repr=False, exclude=True)
    ratio: int | None = Field(default=None, strict=True)
    by_rank: bool = Field(default=False, strict=True)

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    def __init__(self, rag: SacRAG, **fields: Any) -> None:
        super().__init__(rag=rag, **fields)  # type: ignore[call-arg]  # pydantic takes it

    @model_validator(mode="after")
    def _ratio_is_possible(self) -> Self:
        self.rag.compressor.ratio_for(self.ratio)
        if self.by_rank:
            by_rank((), self.rag.compressor, ratio=self.ratio)
        return self

    def compress_documents(
        self, documents: Sequence[Document], query: str = "", callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Marks documents; documents that are already marked stay as they are.

        Args:
            documents: Retrieved documents.
            query: Without influence: a chunk is compressed once for all questions.
            callbacks: Not called: nothing runs.

        Returns:
            Copies of the documents in the same order, with their id and metadata. `unmark` takes
            the tags off again.

        Raises:
            TypeError: for anything else than Documents.
        """
        key_of, checked = self.rag.compressor.key, require_documents(documents)
        plain = [doc for doc in checked if whole(doc.page_content, key_of) is None]
        chunks = [chunk_of(doc, key_of) for doc in plain]
        if self.by_rank:
            chunks = by_rank(chunks, self.rag.compressor, ratio=self.ratio)
        elif self.ratio is not None:
            chunks = [replace(chunk, ratio=self.ratio) for chunk in chunks]
        texts = {
            id(doc): mark(chunk.text, key_of(chunk.text), chunk.ratio, chunk.id)
            for doc, chunk in zip(plain, chunks, strict=True)
        }
        return [
            doc.model_copy(update={"page_content": texts[id(doc)]}) if id(doc) in texts else doc
            for doc in checked
        ]

    def transform_documents(  # type: ignore[override]  # names what LangChain leaves open
        self,
        documents: Sequence[Document],
        *,
        whole_documents: bool = False,
        on_bad: Callable[[BadRecord], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Document]:
        """Compresses documents ahead of questions and stores their anchors.

        Stored chunks are not computed again. The documents do not change, so that an index of them
        does not either. A stored chunk belongs to `metadata["source"]` of the document, or else its
        id: the argument of `rag.forget`.

        Args:
            documents: As they will be retrieved: splits, not the documents they are cut from.
            whole_documents: Whether these are all splits of each source: the anchors of its former
                splits are deleted.
            on_bad: Called with each document that is longer than the model's context, which is
                left out. Default: log a warning.
            on_progress: Called with the number of documents processed since the last call.

        Returns:
            The same documents.

        Raises:
            TypeError: for anything else than Documents.
            OSError: if the store cannot be written.
        """
        checked = require_documents(documents)
        self.rag.precompress(
            (self._chunk_of(document) for document in checked),
            on_progress=on_progress,
            on_bad=on_bad or log_bad,
            whole_documents=whole_documents,
        )
        return checked

    def invoke(
        self, input: Sequence[Document], config: RunnableConfig | None = None, **kwargs: Any
    ) -> list[Document]:
        """Marks documents: `retriever | compressor`. See `compress_documents`.

        Raises:
            TypeError: for any other argument.
        """
        if kwargs:
            raise TypeError(f"SACCompressor takes documents only, got: {', '.join(sorted(kwargs))}")
        return self._call_with_config(self.compress_documents, input, config)

    def _chunk_of(self, document: Document) -> Chunk:
        chunk = chunk_of(document, self.rag.compressor.key)
        return chunk if self.ratio is None else replace(chunk, ratio=self.ratio)
