"""Arguments are taken under the framework's names, refused by name where unknown, never dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import langchain_sac
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_sac import (
    ChatSAC,
    SACCompressor,
    SACEmbeddings,
    SACRetriever,
    format_docs,
    prompt_template,
    sync,
    unmark,
)
from langchain_scenes import (  # noqa: F401
    DOCUMENTS,
    QUESTION,
    Words,
    home_of_module,
    make_embedder,
    make_rag,
)
from pydantic import BaseModel

from sac_rag import SacRAG
from sac_rag.lm.generator import Generator


@pytest.fixture(scope="module")
def rag(llama: Generator) -> SacRAG:
    return make_rag(llama)


def make_retriever(rag: SacRAG, **fields: Any) -> SACRetriever:
    vectors = InMemoryVectorStore(Words())
    vectors.add_documents(DOCUMENTS)
    return SACRetriever(
        base_retriever=vectors.as_retriever(), compressor=SACCompressor(rag), **fields
    )


MAKE: dict[str, Callable[..., Any]] = {
    "ChatSAC": ChatSAC,
    "SACCompressor": SACCompressor,
    "SACEmbeddings": lambda rag, **fields: SACEmbeddings(make_embedder(), **fields),
    "SACRetriever": make_retriever,
    "format_docs": format_docs,
    "prompt_template": prompt_template,
    "sync": lambda rag, **fields: sync(rag, DOCUMENTS, **fields),
    "unmark": lambda rag, **fields: unmark("text", **fields),
}


def test_every_public_name_is_tried() -> None:
    assert sorted(MAKE) == langchain_sac.__all__


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("argument", ["plian", "search_kwargs", "top_n", "rag2"])
def test_an_unknown_argument_is_refused_by_name(rag: SacRAG, name: str, argument: str) -> None:
    with pytest.raises((TypeError, ValueError), match=argument):
        MAKE[name](rag, **{argument: 1})


CALLS: dict[str, Callable[[SacRAG, Any], Any]] = {
    "ChatSAC.invoke": lambda rag, more: ChatSAC(rag).invoke("Hello", **more),
    "ChatSAC.bind": lambda rag, more: ChatSAC(rag).bind(**more).invoke("Hello"),
    "ChatSAC.batch": lambda rag, more: ChatSAC(rag).batch(["Hello"], **more),
    "ChatSAC.stream": lambda rag, more: list(ChatSAC(rag).stream("Hello", **more)),
    "ChatSAC.from_pretrained": lambda rag, more: ChatSAC.from_pretrained("smollm2-135m", **more),
    "SACCompressor.invoke": lambda rag, more: SACCompressor(rag).invoke(DOCUMENTS, None, **more),
    "SACCompressor.transform_documents": lambda rag, more: SACCompressor(rag).transform_documents(
        DOCUMENTS, **more
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_unknown_argument_of_a_call_is_refused_by_name(rag: SacRAG, call: str) -> None:
    with pytest.raises(TypeError, match="plian"):
        CALLS[call](rag, {"plian": True})


SEVERAL: dict[str, Callable[[SacRAG], Any]] = {
    "ChatSAC.batch": lambda rag: ChatSAC(rag).batch("Hello"),  # type: ignore[arg-type]
    "SACCompressor.invoke": lambda rag: SACCompressor(rag).invoke("text"),  # type: ignore[arg-type]
    "SACCompressor.compress_documents": lambda rag: SACCompressor(rag).compress_documents(
        "text",  # type: ignore[arg-type]
        "query",
    ),
    "SACCompressor.transform_documents": lambda rag: SACCompressor(rag).transform_documents(
        "text"  # type: ignore[arg-type]
    ),
    "SACEmbeddings.embed_documents": lambda rag: SACEmbeddings(make_embedder()).embed_documents(
        "text"  # type: ignore[arg-type]
    ),
    "format_docs": lambda rag: format_docs(rag)("text"),  # type: ignore[arg-type]
    "sync": lambda rag: sync(rag, "text"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", SEVERAL)
def test_a_str_where_several_are_due_is_refused(rag: SacRAG, call: str) -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        SEVERAL[call](rag)


async def test_a_str_is_no_batch_in_async_either(rag: SacRAG) -> None:
    with pytest.raises(TypeError, match="expected a list of inputs, got one str"):
        await ChatSAC(rag).abatch("Hello")  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [format_docs, prompt_template, sync])
def test_who_leaves_the_pipeline_out_is_told_how_to_call(function: Any) -> None:
    arguments = (DOCUMENTS, []) if function is sync else (DOCUMENTS,)
    name = function.__name__
    with pytest.raises(TypeError, match=rf"expected a SacRAG, as in {name}\(rag\), got a list"):
        function(*arguments)


def test_a_function_is_never_the_context(rag: SacRAG) -> None:
    chain = SACCompressor(rag) | format_docs
    with pytest.raises(TypeError, match=r"as in format_docs\(rag\), got a list"):
        chain.invoke(DOCUMENTS)


def test_the_frameworks_own_fields_pass(rag: SacRAG) -> None:
    handler = BaseCallbackHandler()
    shared: dict[str, Any] = {"name": "mine"}
    traced: dict[str, Any] = {**shared, "tags": ["a"], "metadata": {"b": 1}}
    chat = ChatSAC(
        rag, **traced, callbacks=[handler], cache=False, disable_streaming=True, verbose=False
    )
    assert (chat.name, chat.tags, (chat.metadata or {})["b"]) == ("mine", ["a"], 1)
    assert SACCompressor(rag, **shared).name == "mine"
    assert make_retriever(rag, **traced).tags == ["a"]
    models: list[BaseModel] = [chat, SACCompressor(rag), make_retriever(rag)]
    for model in models:
        assert model.model_copy(update={"name": "other"}).name == "other"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 3, "stop": ["zz"], "model": "mine"},
        {"max_new_tokens": 3, "stop_sequences": ["zz"], "model_name": "mine"},
        {"max_completion_tokens": 3, "stop": "zz", "model": "mine"},
        {"model_kwargs": {"max_new_tokens": 3, "stop": ["zz"]}, "model": "mine"},
        {"max_tokens": 3, "stop": ["zz"], "model": "mine", "timeout": 9, "max_retries": 2},
    ],
)
def test_the_usual_names_of_settings_mean_the_same(rag: SacRAG, fields: dict[str, Any]) -> None:
    chat = ChatSAC(rag, **fields)
    decoding = chat._identifying_params["decoding"]
    assert (decoding["max_new_tokens"], decoding["stop"]) == (3, ("zz",))
    assert chat.model == "mine"
    if "model_kwargs" not in fields:
        fields = {name: value for name, value in fields.items() if not name.startswith("model")}
        plain = ChatSAC(rag)
        assert plain.invoke("Hello", **fields).text == chat.invoke("Hello").text


def test_a_setting_given_under_two_names_is_refused(rag: SacRAG) -> None:
    with pytest.raises(TypeError, match="max_tokens was given twice, the second time as max_new"):
        ChatSAC(rag, max_tokens=3, max_new_tokens=4)
    with pytest.raises(TypeError, match="stop was given twice, the second time as stop_sequences"):
        ChatSAC(rag).invoke("Hello", stop=["a"], stop_sequences=["b"])


# --- k


def test_k_cuts_what_a_reranker_returns_and_not_what_it_sees(rag: SacRAG) -> None:
    def ranked(documents: list[Any]) -> list[Any]:
        return sorted(documents, key=lambda document: "keeper" not in document.page_content)

    base = RunnableLambda(lambda query: list(reversed(DOCUMENTS))) | ranked
    retriever = SACRetriever(base_retriever=base, compressor=SACCompressor(rag), k=1)
    (best,) = unmark(retriever.invoke(QUESTION))
    assert best == DOCUMENTS[0]
    assert len(retriever.invoke(QUESTION, k=2)) == 2


@pytest.mark.parametrize("k", [0, -1, "2", True])
async def test_an_impossible_k_is_refused_everywhere(rag: SacRAG, k: Any) -> None:
    with pytest.raises(ValueError, match="k"):
        make_retriever(rag, k=k)
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        make_retriever(rag).invoke(QUESTION, k=k)
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        await make_retriever(rag).ainvoke(QUESTION, k=k)
