"""SACCitationQueryEngine: answers with numbered sources, over anchors."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.llms import LLM
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.schema import NodeWithScore

from llama_index_sac.llm import SACLLM
from llama_index_sac.marking import mark
from llama_index_sac.node import chunk_of, marked_copy


class SACCitationQueryEngine(CitationQueryEngine):
    r"""A CitationQueryEngine that attends to anchors of its numbered sources.

    Each retrieved text is split as by LlamaIndex (`citation_chunk_size`) and each piece is a chunk:
    compressed where it is missing, and a hit for `SACPrecompress` if the splitter behind which it
    stands makes pieces no longer than that. Sources are text. Needs no SACPostprocessor.

    >>> from llama_index.core import SummaryIndex
    >>> from llama_index.core.schema import TextNode
    >>> from llama_index_sac import SACLLM
    >>> index = SummaryIndex([TextNode(text="The keeper counted seven ships.")])
    >>> engine = SACCitationQueryEngine.from_args(index, llm=SACLLM(rag))
    >>> (source,) = engine.query("How many ships did the keeper count?").source_nodes
    >>> source.text
    'Source 1:\nThe keeper counted seven ships.\n'
    >>> source.node.sac["read_as"]
    'anchors'

    Args:
        retriever: Retrieves nodes.
        llm: A SACLLM.
        **settings: Those of CitationQueryEngine.

    Raises:
        TypeError: if the LLM is not a SACLLM.
    """

    def __init__(self, retriever: BaseRetriever, llm: LLM | None = None, **settings: Any) -> None:
        if not isinstance(llm, SACLLM):
            raise TypeError(f"expected llm=SACLLM(rag), got: {type(llm).__name__}")
        super().__init__(retriever, llm=llm, **settings)
        self._rag = llm.rag

    def _create_citation_nodes(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        """The numbered sources, marked."""
        sources = super()._create_citation_nodes(nodes)
        chunks, headings = [], []
        for source in sources:
            heading, text = source.node.get_content().split("\n", 1)
            headings.append(f"{heading}\n")
            source.node.set_content(text.removesuffix("\n"))
            chunks.append(chunk_of(source.node))
        for source, heading, marked in zip(sources, headings, mark(self._rag, chunks), strict=True):
            source.node = marked_copy(source.node, marked, around=(heading, "\n"))
        return sources
