"""SACCompressor, which marks retrieved documents. Knows nothing of prompts, chats or answers."""

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
from sac_rag.chunk import Chunk
from sac_rag.pipeline import SacRAG


class SACCompressor(
    BaseDocumentCompressor,
    RunnableSerializable[Sequence[Document], list[Document]],
    BaseDocumentTransformer,
):
    """Marks retrieved documents, so that ChatSAC attends to their anchors instead of reading them.

    Marking is all that happens at question time: no model runs, and the query does not matter.
    What is marked is compressed ahead of time by `transform_documents`, or else by ChatSAC when it
    comes to it. Goes behind a retriever (`retriever | compressor`), into LangChain's
    ContextualCompressionRetriever, and before an indexing (`transform_documents`).

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
        rag: Whose keys the markers have; ChatSAC must have one with the same model, compressor and
            namespace.
        ratio: Source tokens per KV entry of what is marked, whatever ratio ChatSAC has. Default:
            ChatSAC's, or else the compressor's own.
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
        """Marks documents; those that are marked already stay as they are.

        Args:
            documents: What was retrieved.
            query: Does not matter: a chunk is compressed once for all questions.
            callbacks: Not called; nothing runs.

        Returns:
            As many documents in the same order, with ids and metadata as they were, and
            `metadata["sac_key"]` beside them. The documents given are not changed.

        Raises:
            TypeError: for what is no Document.
        """
        return [self._marked(document) for document in require_documents(documents)]

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> list[Document]:
        """Compresses documents ahead of any question and stores their anchors.

        What is stored already is not computed again. The documents do not change, so what an
        indexing knows them by does not either. A stored chunk belongs to the document's
        `metadata["source"]`, or else its id: what `rag.forget` asks for.

        Args:
            documents: As they will be retrieved: the splits, not what they are cut from.
            **kwargs: Those of `SacRAG.precompress`: on_progress, on_bad, whole_documents.

        Returns:
            The same documents.

        Raises:
            TypeError: for what is no Document.
            PromptTooLongError: for a document longer than the model's context, without on_bad.
            OSError: if the store cannot be written.
        """
        given = require_documents(documents)
        chunks = (replace(chunk_of(document), ratio=self.ratio) for document in given)
        self.rag.precompress(chunks, **kwargs)
        return given

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
