"""A node that changes after it was marked is read as it is, and markers do not reach people."""

from __future__ import annotations

import inspect
from contextvars import copy_context
from typing import Any

import pytest
from llama_index.core import Settings, SummaryIndex
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.tools import RetrieverTool
from llama_index_sac import SACLLM, SACCitationQueryEngine, SACPostprocessor, unmark
from support.models import PROSE
from tiny_index import (  # noqa: F401
    QUESTION,
    home_of_module,
    make_nodes,
    make_rag,
    no_loop_is_left,
    query_engine,
    scored,
)

from sac_rag.lm.generator import Generator

FORGED = f"<|sac:{'0' * 32}|>"
NEW = "The keeper was Olaf Berg."


def with_set_content(node: Any) -> None:
    node.set_content(NEW)


def with_an_assignment(node: Any) -> None:
    node.text = NEW


@pytest.mark.parametrize("change", [with_set_content, with_an_assignment])
def test_a_new_text_voids_the_marker(llama: Generator, change: Any) -> None:
    rag = make_rag(llama)
    nodes = scored(make_nodes(1, metadata={"page": 4}))
    (marked,) = SACPostprocessor(rag).postprocess_nodes(nodes)
    for node in (marked.node.model_copy(deep=True), marked.node):
        assert node.get_content("llm") == f"page: 4\n\n{node.marker}"
        change(node)
        assert (node.get_content("llm"), node.marker) == (f"page: 4\n\n{NEW}", "")


class Redactor(BaseNodePostprocessor):
    """Rewrites what the LLM would be shown, as redactors and optimizers do."""

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        for node in nodes:
            shown = node.node.get_content(metadata_mode=MetadataMode.LLM)
            node.node.set_content(PROSE[3] if "seven" in shown else shown)
        return nodes


@pytest.mark.parametrize(
    "last", [MetadataReplacementPostProcessor(target_metadata_key="masked"), Redactor()]
)
async def test_the_text_of_a_later_postprocessor_is_read(llama: Generator, last: Any) -> None:
    rag, masked = make_rag(llama), PROSE[3]
    nodes = make_nodes(1, metadata={"masked": masked}, excluded_llm_metadata_keys=["masked"])
    engine = SummaryIndex(nodes).as_query_engine(
        llm=SACLLM(rag), node_postprocessors=[SACPostprocessor(rag), last]
    )
    alone = SummaryIndex(make_nodes(1)).as_query_engine(llm=SACLLM(rag))
    nodes[0].text, original = masked, nodes[0].text
    expected = SummaryIndex(nodes).as_query_engine(llm=SACLLM(rag)).query(QUESTION).response
    assert expected != alone.query(QUESTION).response
    nodes[0].text = original
    for response in (engine.query(QUESTION), await engine.aquery(QUESTION)):
        (source,) = response.source_nodes
        assert source.text == source.node.get_content("llm") == masked
        assert response.response == expected


# --- markers do not reach people


def test_a_context_without_an_answer_is_text(
    llama: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    engine = query_engine(make_rag(llama), make_nodes(2), response_mode="context_only")
    assert engine.query(QUESTION).response == "\n\n".join(PROSE[:2])


async def test_a_retriever_tool_gives_text(llama: Generator) -> None:
    tool = RetrieverTool.from_defaults(
        SummaryIndex(make_nodes(2)).as_retriever(),
        node_postprocessors=[SACPostprocessor(make_rag(llama))],
    )
    for output in (tool.call(QUESTION), await tool.acall(QUESTION)):
        assert output.content == "".join(f"{text}\n\n" for text in PROSE[:2])


@pytest.mark.parametrize("mode", [MetadataMode.NONE, MetadataMode.LLM])
async def test_a_citation_engine_of_llama_index_reads_text(
    llama: Generator, mode: MetadataMode
) -> None:
    rag = make_rag(llama)
    engine = CitationQueryEngine.from_args(
        SummaryIndex(make_nodes(2)),
        llm=SACLLM(rag),
        node_postprocessors=[SACPostprocessor(rag)],
        metadata_mode=mode,
    )
    for response in (engine.query(QUESTION), await engine.aquery(QUESTION)):
        assert [source.text for source in response.source_nodes] == SOURCES


SOURCES = [f"Source {i}:\n{text}\n" for i, text in enumerate(PROSE[:2], start=1)]


async def test_our_citation_engine_shows_text_and_attends_to_anchors(llama: Generator) -> None:
    rag = make_rag(llama)
    index = SummaryIndex(make_nodes(2, metadata={"page": 4}))
    engine = SACCitationQueryEngine.from_args(index, llm=SACLLM(rag))
    for response in (engine.query(QUESTION), await engine.aquery(QUESTION)):
        assert [source.text for source in response.source_nodes] == SOURCES
        assert [source.node.sac["read_as"] for source in response.source_nodes] == ["anchors"] * 2
        marker = response.source_nodes[0].node.marker
        shown = response.source_nodes[0].node.get_content("llm")
        assert shown == f"page: 4\n\nSource 1:\n{marker}"
    assert all(node.text in rag.compressor for node in make_nodes(2))
    with pytest.raises(TypeError, match=r"expected llm=SACLLM\(rag\), got: MockLLM"):
        SACCitationQueryEngine.from_args(index, llm=MockLLM())


def test_unmark_gives_the_texts_back(llama: Generator) -> None:
    rag = make_rag(llama)
    nodes = SACPostprocessor(rag).postprocess_nodes(scored(make_nodes(2)))
    shown = copy_context().run(lambda: [node.get_content("llm") for node in nodes])
    prompt = f"See {shown[0]} and {shown[1]}, not {FORGED}."
    expected = f"See {PROSE[0]} and {PROSE[1]}, not {FORGED}."
    assert unmark(prompt) == prompt
    assert unmark(prompt, nodes) == unmark(prompt, [n.node for n in nodes]) == expected
    assert [node.get_content("llm") for node in nodes] == shown
    assert unmark(prompt) == expected


async def test_another_llm_that_is_asked_with_markers_is_warned_of(
    llama: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    rag, index = make_rag(llama), SummaryIndex(make_nodes(2))
    for llm, warns in ((SACLLM(rag), False), (MockLLM(), True)):
        engine = index.as_query_engine(llm=llm, node_postprocessors=[SACPostprocessor(rag)])
        for ask in (engine.query, engine.aquery):
            caplog.clear()
            asked = ask(QUESTION)
            await asked if inspect.isawaitable(asked) else None
            assert ("MockLLM was asked with markers of a SACPostproc" in caplog.text) is warns
