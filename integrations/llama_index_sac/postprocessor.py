"""SACPostprocessor: retrieved nodes to nodes the LLM attends to. Knows nothing of prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from llama_index_sac.markers import Markers, markers_of, require_no_marker
from llama_index_sac.node import can_be_compressed, chunk_of, marked

if TYPE_CHECKING:
    from sac_rag.chunk import Chunk
    from sac_rag.pipeline import SacRAG


class SACPostprocessor(BaseNodePostprocessor):
    """Puts compressed text in the place of text, for a SACLLM over the same SacRAG.

    It goes last. Nodes keep ids, scores, metadata, relationships, number and order; the nodes that
    it was given stay as they are. Texts that are not in the store are dealt with as the SacRAG's
    `on_miss` says. Nodes that are more than a text (images, references to other indices) go on as
    they are, and are read.

    >>> from llama_index.core import SummaryIndex
    >>> from llama_index.core.schema import TextNode
    >>> from llama_index_sac import SACLLM
    >>> index = SummaryIndex([TextNode(text="The keeper counted seven ships.", id_="log, page 4")])
    >>> engine = index.as_query_engine(
    ...     llm=SACLLM(rag), node_postprocessors=[SACPostprocessor(rag)]
    ... )
    >>> response = engine.query("How many ships did the keeper count?")
    >>> response.source_nodes[0].node_id
    'log, page 4'

    Args:
        rag: Compresses and remembers the texts.
        ratio: Source tokens per KV entry of these texts, whatever ratio the SACLLM has. Default:
            the SACLLM's, or else the compressor's own.
        **settings: Those of BaseNodePostprocessor.

    Raises:
        TypeError: if rag is no SacRAG.
        ValueError: for a ratio that the compressor does not have.
    """

    ratio: int | None = Field(
        default=None, strict=True, description="Source tokens per KV entry of these texts."
    )

    _rag: SacRAG = PrivateAttr()
    _markers: Markers = PrivateAttr()

    def __init__(self, rag: SacRAG, *, ratio: int | None = None, **settings: Any) -> None:
        markers = markers_of(rag)
        rag.compressor.ratio_for(ratio)
        super().__init__(ratio=ratio, **settings)  # type: ignore[call-arg]  # pydantic takes it
        self._rag, self._markers = rag, markers

    @classmethod
    def class_name(cls) -> str:
        """The name in events and traces."""
        return "SACPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """The nodes, marked; LlamaIndex's own async version does it in a thread.

        Raises:
            UnanswerableError: if the question contains what could be taken for a marker.
            ChunkMissError: with on_miss="raise", if a text is not in the store.
            PromptTooLongError: for a text longer than the model's context that is to be compressed.
        """
        if query_bundle is not None:
            require_no_marker(query_bundle.query_str)
        texts = [scored.node for scored in nodes if can_be_compressed(scored.node)]
        chunks = self._fetched([replace(chunk_of(node), ratio=self.ratio) for node in texts])
        sac = {
            id(node): marked(node, self._markers.issue(chunk))
            for node, chunk in zip(texts, chunks, strict=True)
        }
        return [
            NodeWithScore(node=sac.get(id(scored.node), scored.node), score=scored.score)
            for scored in nodes
        ]

    def _fetched(self, chunks: list[Chunk]) -> list[Chunk]:
        """The same, those that were not in the store compressed now, and told why they had to."""
        rag = self._rag
        missing = [i for i, chunk in enumerate(chunks) if self._is_missing(chunk)]
        if not missing or rag.on_miss == "text":
            return chunks
        fetched = rag.compressor.fetch(
            [chunks[i].text for i in missing],
            ratios=[chunks[i].ratio for i in missing],
            on_miss=rag.on_miss,
            documents=[chunks[i].id for i in missing],
        )
        noted = list(chunks)
        for i, reason in zip(missing, fetched.misses, strict=True):
            noted[i] = replace(chunks[i], metadata={**chunks[i].metadata, "miss": reason})
        return noted

    def _is_missing(self, chunk: Chunk) -> bool:
        try:
            compressor = self._rag.compressor
            return not chunk.is_empty and not compressor.is_stored(chunk.text, chunk.ratio)
        except OSError:
            return True  # `fetch` finds out too, says so, and does without the store
