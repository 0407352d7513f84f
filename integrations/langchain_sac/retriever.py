"""SACRetriever: a retriever that marks its documents."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from langchain_core.runnables import RunnableConfig
from pydantic import ConfigDict, Field

from langchain_sac.compressor import SACCompressor


class SACRetriever(BaseRetriever):
    """Retrieves with another retriever and marks the documents, for chains that take one retriever.

    Example:
        >>> rag = SacRAG.from_pretrained("smollm2-135m")
        >>> retriever = SACRetriever(
        ...     base_retriever=vector_store.as_retriever(), compressor=SACCompressor(rag), k=2
        ... )
        >>> [document.page_content[:16] for document in retriever.invoke("Who kept the light?")]
        ['<sac:chunk key="', '<sac:chunk key="']

    Attributes:
        base_retriever: Retrieves documents.
        compressor: Marks them.
        k: Most documents, the first ones of those that the base retriever returns. Default: all.
            How many that retrieves is its own setting: a reranker must see more than it returns.

    `k` can be given in a call too; other arguments of a call are the base retriever's.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    base_retriever: RetrieverLike
    compressor: SACCompressor
    k: int | None = Field(default=None, ge=1, strict=True)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config: RunnableConfig = {"callbacks": run_manager.get_child()}
        documents = self.base_retriever.invoke(query, config, **kwargs)
        return self.compressor.compress_documents(self._first(documents, k), query)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config: RunnableConfig = {"callbacks": run_manager.get_child()}
        documents = await self.base_retriever.ainvoke(query, config, **kwargs)
        return self.compressor.compress_documents(self._first(documents, k), query)

    def _first(self, documents: list[Document], k: int | None) -> list[Document]:
        limit = self.k if k is None else k
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"k must be an integer of at least 1, was: {limit!r}")
        return documents[:limit]
