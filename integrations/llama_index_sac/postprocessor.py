"""SACPostprocessor: replaces the text of retrieved nodes by markers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from llama_index_sac.markers import require_known, require_rag, require_several, withdraw
from llama_index_sac.marking import mark
from llama_index_sac.node import can_be_compressed, chunk_of, marked_copy
from llama_index_sac.watch import watch_other_llms
from sac_rag import by_rank as chunks_by_rank

if TYPE_CHECKING:
    from sac_rag import SacRAG


class SACPostprocessor(BaseNodePostprocessor):
    """Replaces text by markers of compressed text, for a SACLLM over the same SacRAG.

    Must be the last postprocessor. Returns copies of the nodes with the same ids, scores, metadata,
    relationships and order. Texts that are not in the store are handled as `on_miss` of the SacRAG
    defines. Nodes with more than text (images, references to other indices) are passed through and
    read as usual; so are texts that do not fit into the model's context with a question and an
    answer, which LlamaIndex then splits.

    >>> from llama_index.core import SummaryIndex
    >>> from llama_index.core.schema import TextNode
    >>> from llama_index_sac import SACLLM
    >>> index = SummaryIndex([TextNode(text="The keeper counted seven ships.", id_="log, page 4")])
    >>> engine = index.as_query_engine(
    ...     llm=SACLLM(rag), node_postprocessors=[SACPostprocessor(rag)]
    ... )
    >>> response = engine.query("How many ships did the keeper count?")
    >>> source = response.source_nodes[0]
    >>> source.node_id, source.node.sac["read_as"]
    ('log, page 4', 'anchors')

    Args:
        rag: Compresses the texts and resolves the markers.
        ratio: Source tokens per KV entry of these texts, whatever ratio the SACLLM has. Default:
            that of the SACLLM, or else of the compressor.
        by_rank: Whether nodes come best first and share the KV entries of that ratio by rank: see
            `sac_rag.by_rank`.
        **settings: Fields of BaseNodePostprocessor.

    Raises:
        TypeError: if rag is not a SacRAG, or for an unknown setting.
        ValueError: for a ratio that the compressor does not have.
    """

    ratio: int | None = Field(
        default=None, strict=True, description="Source tokens per KV entry of these texts."
    )

    by_rank: bool = Field(default=False, description="Whether the best nodes get most entries.")

    _rag: SacRAG = PrivateAttr()

    def __init__(
        self, rag: SacRAG, *, ratio: int | None = None, by_rank: bool = False, **settings: Any
    ) -> None:
        require_rag(rag)
        require_known(
            settings,
            type(self).model_fields,
            type(self).__name__,
            "it marks all nodes that it gets, so put what selects them before it; ",
        )
        rag.compressor.ratio_for(ratio)
        if by_rank:
            chunks_by_rank((), rag.compressor, ratio=ratio)
        super().__init__(ratio=ratio, by_rank=by_rank, **settings)  # type: ignore[call-arg]  # pydantic takes it
        self._rag = rag
        watch_other_llms()

    @classmethod
    def class_name(cls) -> str:
        """The name in events and traces."""
        return "SACPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Marks the nodes. Markers in the question are text.

        Raises:
            ChunkMissError: with on_miss="raise", if a text is not in the store.
            TypeError: if nodes is a str.
        """
        require_several(nodes, "nodes")
        if query_bundle is not None:
            withdraw(query_bundle.query_str)
        texts = [scored.node for scored in nodes if can_be_compressed(scored.node)]
        chunks = [chunk_of(node) for node in texts]
        if self.by_rank:
            chunks = chunks_by_rank(chunks, self._rag.compressor, ratio=self.ratio)
        else:
            chunks = [replace(chunk, ratio=self.ratio) for chunk in chunks]
        copies = {
            id(node): marked_copy(node, marked)
            for node, marked in zip(texts, mark(self._rag, chunks), strict=True)
        }
        return [
            NodeWithScore(node=copies.get(id(scored.node), scored.node), score=scored.score)
            for scored in nodes
        ]

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """The same, in a thread."""
        if query_bundle is not None:
            withdraw(query_bundle.query_str)  # here, since a thread has a context of its own
        return await asyncio.to_thread(self._postprocess_nodes, nodes, query_bundle)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a SACPostprocessor cannot be pickled, since it holds a loaded model; "
            "make one in the other process, over a SacRAG opened there"
        )
