"""Copies share the pipeline; what cannot be pickled says what to send in its place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda
from langchain_sac import ChatSAC, SACCompressor, SACRetriever, format_docs, prompt_template
from langchain_scenes import DOCUMENTS, QUESTION, home_of_module, make_rag  # noqa: F401

from sac_rag import SacRAG
from sac_rag.lm.generator import Generator


def retriever(rag: SacRAG) -> SACRetriever:
    base = RunnableLambda(lambda query: DOCUMENTS)
    return SACRetriever(base_retriever=base, compressor=SACCompressor(rag))


MAKE: dict[str, Callable[[SacRAG], Any]] = {
    "SacRAG": lambda rag: rag,
    "ChatSAC": ChatSAC,
    "SACCompressor": SACCompressor,
    "SACRetriever": retriever,
    "a chain": lambda rag: retriever(rag) | format_docs(rag) | ChatSAC(rag),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_deep_copy_shares_the_pipeline(llama: Generator, name: str) -> None:
    rag = make_rag(llama)
    copied = copy.deepcopy(MAKE[name](rag))
    assert (copied if name == "SacRAG" else _pipeline_of(copied)) is rag
    if name != "SacRAG":
        given = {"SACCompressor": DOCUMENTS}.get(name, QUESTION)
        assert str(copied.invoke(given))


def _pipeline_of(component: Any) -> SacRAG:
    while not hasattr(component, "rag"):
        component = getattr(component, "compressor", None) or component.last
    pipeline: SacRAG = component.rag
    return pipeline


def test_a_copy_may_have_other_settings(llama: Generator) -> None:
    chat = ChatSAC(make_rag(llama), max_tokens=4)
    other = chat.model_copy(update={"max_tokens": 2}, deep=True)
    assert (chat.max_tokens, other.max_tokens, other.rag) == (4, 2, chat.rag)
    rag = copy.copy(chat.rag)
    rag.on_miss = "text"
    assert (chat.rag.on_miss, rag.compressor) == ("compress", chat.rag.compressor)


@pytest.mark.parametrize("name", ["SacRAG", "ChatSAC", "SACCompressor"])
def test_pickling_says_how_to_send_it(llama: Generator, name: str) -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled; send the names .*from_pretrained"):
        pickle.dumps(MAKE[name](make_rag(llama)))


def test_a_prompt_of_the_pipeline_can_be_pickled(llama: Generator) -> None:
    prompt = prompt_template(make_rag(llama))
    assert pickle.loads(pickle.dumps(prompt)) == prompt
