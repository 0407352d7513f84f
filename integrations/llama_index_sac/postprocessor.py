"""SACPostprocessor: replaces the text of retrieved nodes by markers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from llama_index_sac.markers import Markers, markers_of, require_no_marker
from llama_index_sac.node import can_be_compressed, chunk_of, marked

if TYPE_CHECKING:
    from sac_rag import Chunk, SacRAG


class SACPostprocessor(BaseNodePostprocessor):
    """Replaces text by markers of compressed text, for a SACLLM over the same SacRAG.

    Must be the last postprocessor. Returns copies of the nodes with the same ids, scores, metadata,
    relationships and order. Texts that are not in the store are handled as `on_miss` of the SacRAG
    defines. Nodes with more than text (images, references to other indices) are passed through and
    read as usual.

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
        rag: Compresses the texts and resolves the markers.
        ratio: Source tokens per KV entry of these texts, whatever ratio the SACLLM has. Default:
            that of the SACLLM, or else of the compressor.
        **settings: Fields of BaseNodePostprocessor.

    Raises:
        TypeError: if rag is not a SacRAG.
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
        """Marks the nodes; LlamaIndex's async version runs it in a thread.

        Raises:
            UnanswerableError: if the question has a text that could be taken for a marker.
            ChunkMissError: with on_miss="raise", if a text is not in the store.
            PromptTooLongError: for a text longer than the model's context that must be compressed.
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
        """The chunks; those that are compressed now have the miss reason in their metadata."""
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
        annotated = list(chunks)
        for i, reason in zip(missing, fetched.misses, strict=True):
            annotated[i] = replace(chunks[i], metadata={**chunks[i].metadata, "miss": reason})
        return annotated

    def _is_missing(self, chunk: Chunk) -> bool:
        try:
            compressor = self._rag.compressor
            return not chunk.is_empty and not compressor.is_stored(chunk.text, chunk.ratio)
        except OSError:
            return True  # `fetch` meets the same error, logs it, and computes without the store
