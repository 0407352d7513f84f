"""SACCompressor: marks retrieved documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

from langchain_sac.documents import chunk_of, require_documents
from langchain_sac.marker import find, mark
from sac_rag import Chunk, SacRAG


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
        >>> marked.page_content.replace(marked.metadata["sac_key"], "…")
        '<sac:chunk key="…">The lighthouse was built in 1889.</sac:chunk>'

    Attributes:
        rag: Gives the keys of markers; that of ChatSAC must have the same model, compressor and
            namespace.
        ratio: Source tokens per KV entry of marked documents, whatever ratio ChatSAC has. Default:
            that of ChatSAC, or else of the compressor.
    """

    rag: SacRAG = Field(repr=False, exclude=True)
    ratio: int | None = Field(default=None, strict=True)

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def __init__(self, rag: SacRAG, **fields: Any) -> None:
        super().__init__(rag=rag, **fields)  # type: ignore[call-arg]  # pydantic takes it

    @model_validator(mode="after")
    def _ratio_is_possible(self) -> Self:
        self.rag.compressor.ratio_for(self.ratio)
        return self

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Marks documents; documents that are already marked stay as they are.

        Args:
            documents: Retrieved documents.
            query: Without influence: a chunk is compressed once for all questions.
            callbacks: Not called: nothing runs.

        Returns:
            Copies of the documents in the same order, with `metadata["sac_key"]` added.

        Raises:
            TypeError: for anything else than Documents.
        """
        return [self._marked(document) for document in require_documents(documents)]

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> list[Document]:
        """Compresses documents ahead of questions and stores their anchors.

        Stored chunks are not computed again. The documents do not change, so that an index of them
        does not either. A stored chunk belongs to `metadata["source"]` of the document, or else its
        id: the argument of `rag.forget`.

        Args:
            documents: As they will be retrieved: splits, not the documents they are cut from.
            **kwargs: Arguments of `SacRAG.precompress`: on_progress, on_bad, whole_documents.

        Returns:
            The same documents.

        Raises:
            TypeError: for anything else than Documents.
            PromptTooLongError: for a document longer than the model's context, without on_bad.
            OSError: if the store cannot be written.
        """
        checked = require_documents(documents)
        chunks = (replace(chunk_of(document), ratio=self.ratio) for document in checked)
        self.rag.precompress(chunks, **kwargs)
        return checked

    def invoke(
        self, input: Sequence[Document], config: RunnableConfig | None = None, **kwargs: Any
    ) -> list[Document]:
        """Marks documents: `retriever | compressor`. See `compress_documents`."""
        return self._call_with_config(
            lambda documents: self.compress_documents(documents, ""), input, config
        )

    def _marked(self, document: Document) -> Document:
        key_of = self.rag.compressor.key
        text = document.page_content
        if "sac_key" in document.metadata:
            pieces = find(text, key_of)
            if len(pieces) == 1 and isinstance(pieces[0], Chunk):
                return document
        key = key_of(text)
        return document.model_copy(
            update={
                "page_content": mark(text, key, self.ratio),
                "metadata": {**document.metadata, "sac_key": key},
            }
        )
