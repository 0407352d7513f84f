"""The same chunks and question: pipeline, LangChain and LlamaIndex answer the same text."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_sac import ChatSAC, SACCompressor, format_docs, prompt_template
from llama_index.core import SummaryIndex
from llama_index.core.schema import TextNode
from llama_index_sac import SACLLM, SACPostprocessor, text_qa_template
from support.models import PROSE, make_compressor

from sac_rag import CachedCompressor, Decoding, DiskStore, SacRAG, by_rank
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import SPANS

TEXTS = (
    "The observatory on Mount Brannock was opened in 1924 by the astronomer Ida Vossberg.",
    "Its dome weighs ninety tonnes and turns on a ring of mercury.",
    "The ferry to Sel leaves the pier at a quarter past six.",
)
QUESTIONS = (
    "Who opened the observatory?",
    "How heavy is the dome?",
    "When does the ferry to Sel leave?",
)


def chain_over(rag: SacRAG, texts: tuple[str, ...], **options: Any) -> Any:
    """A chain of LangChain whose retriever returns all texts."""
    retriever = RunnableLambda(lambda question: [Document(text) for text in texts])
    return (
        {
            "context": retriever | SACCompressor(rag, **options) | format_docs(rag),
            "question": RunnablePassthrough(),
        }
        | prompt_template(rag)
        | ChatSAC(rag)
    )


def engine_over(rag: SacRAG, texts: tuple[str, ...], **options: Any) -> Any:
    """A query engine of LlamaIndex that retrieves all texts."""
    asyncio.set_event_loop(None)  # LlamaIndex's sync calls would make one and not close it
    return SummaryIndex([TextNode(text=text) for text in texts]).as_query_engine(
        llm=SACLLM(rag),
        node_postprocessors=[SACPostprocessor(rag, **options)],
        text_qa_template=text_qa_template(rag),
    )


@pytest.mark.real_model
def test_pipeline_langchain_and_llama_index_answer_the_same() -> None:
    rag = SacRAG.from_pretrained("smollm2-135m", decoding=Decoding(max_new_tokens=12))
    chain, engine = chain_over(rag, TEXTS), engine_over(rag, TEXTS)
    expected = [rag.answer(question, TEXTS).text for question in QUESTIONS]
    assert all(expected) and len(set(expected)) == len(QUESTIONS)
    assert [chain.invoke(question).text for question in QUESTIONS] == expected
    assert [engine.query(question).response for question in QUESTIONS] == expected


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("full", {}),
        ("shared", {}),
        ("icae", {}),
        ("icae", {"positions": "uniform"}),
        ("x500", {}),
        ("x500", {"positions": "uniform"}),
    ],
)
def test_they_answer_alike_from_a_store_that_any_method_has_filled(
    llama: Generator, home: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    compressor, question = make_compressor(llama, method, **changes), QUESTIONS[0]
    with DiskStore(tmp_path / "anchors") as store:
        rag = SacRAG(
            CachedCompressor(compressor, store, guard=False),
            prompt_format=SPANS,
            decoding=Decoding(max_new_tokens=8),
            on_miss="raise",  # whatever is not a hit
        )
        assert rag.precompress(PROSE[:3]).computed == 3
        expected = rag.answer(question, PROSE[:3]).text
        assert expected
        assert chain_over(rag, PROSE[:3]).invoke(question).text == expected
        assert engine_over(rag, PROSE[:3]).query(question).response == expected
        assert rag.metrics().hits == 9


def test_both_spend_a_budget_by_rank_as_the_pipeline_does(llama: Generator, home: Path) -> None:
    compressor, question = make_compressor(llama, "shared", ratio=2), QUESTIONS[0]
    rag = SacRAG(
        CachedCompressor(compressor, {}, guard=False),
        prompt_format=SPANS,
        decoding=Decoding(max_new_tokens=8),
    )
    rag.precompress(PROSE[:3])
    rag.on_miss = "raise"
    ranked = by_rank(PROSE[:3], rag.compressor, ratio=6)
    assert [chunk.ratio for chunk in ranked] != [6, 6, 6]
    expected = rag.answer(question, ranked).text
    options = {"ratio": 6, "by_rank": True}
    assert chain_over(rag, PROSE[:3], **options).invoke(question).text == expected
    assert engine_over(rag, PROSE[:3], **options).query(question).response == expected
    marked = SACCompressor(rag, **options).invoke([Document(text) for text in PROSE[:3]])
    for chunk, one in zip(ranked, marked, strict=True):
        assert f'ratio="{chunk.ratio}"' in one.page_content


def test_by_rank_needs_a_compressor_of_several_ratios(llama: Generator, home: Path) -> None:
    rag = SacRAG(CachedCompressor(make_compressor(llama, "x500"), {}))
    for kind in (SACCompressor, SACPostprocessor):
        with pytest.raises(ValueError, match="where one compression serves several"):
            kind(rag, by_rank=True)
