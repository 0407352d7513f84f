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
from pydantic import Field

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
        k: Most documents, the first ones; passed to the base retriever too, which may ignore it.
            Default: all that it retrieves.
    """

    base_retriever: RetrieverLike
    compressor: SACCompressor
    k: int | None = Field(default=None, ge=1)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        limit = self._limit(k)
        config: RunnableConfig = {"callbacks": run_manager.get_child()}
        documents = self.base_retriever.invoke(query, config, **limit, **kwargs)
        return self.compressor.compress_documents(documents[: limit.get("k")], query)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        limit = self._limit(k)
        config: RunnableConfig = {"callbacks": run_manager.get_child()}
        documents = await self.base_retriever.ainvoke(query, config, **limit, **kwargs)
        return self.compressor.compress_documents(documents[: limit.get("k")], query)

    def _limit(self, k: int | None) -> dict[str, int]:
        limit = self.k if k is None else k
        return {} if limit is None else {"k": limit}
