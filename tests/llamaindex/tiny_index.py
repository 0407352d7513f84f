"""Engines of LlamaIndex over a few short nodes and a tiny model."""

from __future__ import annotations

from typing import Any

from conftest import PROSE, make_compressor
from llama_index.core import SummaryIndex
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index_sac import SACLLM, SACPostprocessor

from sac_rag import CachedCompressor, Decoding, SacRAG
from sac_rag.generator import Generator

QUESTION = "Who counted the ships?"
SHORT = Decoding(max_new_tokens=6)


def make_rag(generator: Generator, method: str = "sac", **options: Any) -> SacRAG:
    """A pipeline with short answers over a store of its own."""
    namespace = options.pop("namespace", "")
    cached = CachedCompressor(
        make_compressor(generator, method), options.pop("store", {}), namespace=namespace
    )
    return SacRAG(cached, **{"decoding": SHORT, **options})


def make_nodes(count: int = 3, **fields: Any) -> list[TextNode]:
    """Nodes as a splitter leaves them, a document each."""
    return [
        TextNode(
            text=text,
            id_=f"node {i}",
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"document {i}")},
            **fields,
        )
        for i, text in enumerate(PROSE[:count])
    ]


def scored(nodes: list[TextNode]) -> list[NodeWithScore]:
    return [NodeWithScore(node=node, score=1 / (i + 2)) for i, node in enumerate(nodes)]


def query_engine(rag: SacRAG, nodes: list[TextNode], plain: bool = False, **options: Any) -> Any:
    """All nodes are retrieved, in their order."""
    return SummaryIndex(nodes).as_query_engine(
        llm=SACLLM(rag, plain=plain), node_postprocessors=[SACPostprocessor(rag)], **options
    )
