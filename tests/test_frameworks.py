"""The same chunks and question: pipeline, LangChain and LlamaIndex answer the same text."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_sac import ChatSAC, SACCompressor, format_docs, prompt_template
from llama_index.core import SummaryIndex
from llama_index.core.schema import TextNode
from llama_index_sac import SACLLM, SACPostprocessor, text_qa_template

from sac_rag import Decoding, SacRAG

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


@pytest.mark.real_model
def test_pipeline_langchain_and_llama_index_answer_the_same() -> None:
    rag = SacRAG.from_pretrained("smollm2-135m", decoding=Decoding(max_new_tokens=12))
    retriever = RunnableLambda(lambda question: [Document(text) for text in TEXTS])
    chain = (
        {
            "context": retriever | SACCompressor(rag) | format_docs(rag),
            "question": RunnablePassthrough(),
        }
        | prompt_template(rag)
        | ChatSAC(rag)
    )
    asyncio.set_event_loop(None)  # LlamaIndex's sync calls would make one and not close it
    engine = SummaryIndex([TextNode(text=text) for text in TEXTS]).as_query_engine(
        llm=SACLLM(rag),
        node_postprocessors=[SACPostprocessor(rag)],
        text_qa_template=text_qa_template(rag),
    )
    expected = [rag.answer(question, TEXTS).text for question in QUESTIONS]
    assert all(expected) and len(set(expected)) == len(QUESTIONS)
    assert [chain.invoke(question).text for question in QUESTIONS] == expected
    assert [engine.query(question).response for question in QUESTIONS] == expected
