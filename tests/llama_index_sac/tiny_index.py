"""Engines of LlamaIndex over a few short nodes and a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from llama_index.core import SummaryIndex
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index_sac import SACLLM, SACPostprocessor
from support.models import PROSE, make_compressor

from sac_rag import CachedCompressor, Decoding, SacRAG
from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator

QUESTION = "Who counted the ships?"
SHORT = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module", autouse=True)
def home_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the test module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAC_RAG_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def no_loop_is_left() -> None:
    """LlamaIndex's sync calls make a loop that they do not close, unless none can be had."""
    asyncio.set_event_loop(None)


@cache
def compressor_of(generator: Generator, method: str) -> Compressor:
    """One for all tests: each that is made leaves an adapter in the model."""
    return make_compressor(generator, method)


def make_rag(
    generator: Generator,
    method: str = "sac",
    *,
    namespace: str = "",
    store: Any = None,
    **options: Any,
) -> SacRAG:
    """A pipeline with short answers over a store of its own."""
    kept = {} if store is None else store
    cached = CachedCompressor(compressor_of(generator, method), kept, namespace=namespace)
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


def query_engine(rag: SacRAG, nodes: list[TextNode], **options: Any) -> Any:
    """All nodes are retrieved, in their order."""
    return SummaryIndex(nodes).as_query_engine(
        llm=SACLLM(rag), node_postprocessors=[SACPostprocessor(rag)], **options
    )
