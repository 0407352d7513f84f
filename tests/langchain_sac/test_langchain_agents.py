"""Agents, middleware, graphs and checkpoints get the pipeline's answers, and show text to users."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tools import tool
from langchain_sac import ChatSAC, SACCompressor, unmark
from langchain_scenes import DOCUMENTS, QUESTION, home_of_module, make_rag  # noqa: F401
from support.models import PROSE

from sac_rag import Chunk, Message, SacRAG
from sac_rag.lm.generator import Generator

FOUND = DOCUMENTS[:2]


@pytest.fixture
def rag(llama: Generator) -> SacRAG:
    return make_rag(llama)


def context(rag: SacRAG) -> str:
    return "\n\n".join(document.page_content for document in SACCompressor(rag).invoke(FOUND))


def system_turn() -> Message:
    return Message("system", ("Context: ", Chunk(PROSE[0]), "\n\n", Chunk(PROSE[1])))


# --- tools


def test_no_tools_can_be_bound_and_others_are_refused_with_the_remedy(rag: SacRAG) -> None:
    @tool
    def search(query: str) -> str:
        """Searches the pages."""
        return query

    chat = ChatSAC(rag)
    assert chat.bind_tools([]).invoke("Hello").text == chat.invoke("Hello").text
    assert chat.bind_tools([], max_tokens=2).invoke("Hello").usage_metadata["output_tokens"] == 2  # type: ignore[index]
    remedy = "calls no tools .*, got 1 tools; retrieve in a step of its own before it answers"
    with pytest.raises(NotImplementedError, match=remedy):
        chat.bind_tools([search])
    with pytest.raises(NotImplementedError, match=remedy):
        chat.with_structured_output({"title": "Answer", "type": "object", "properties": {}})


def test_the_profile_has_the_room_for_prompt_and_answer(rag: SacRAG) -> None:
    profile = ChatSAC(rag, max_tokens=100).profile
    assert profile is not None
    assert (profile["max_input_tokens"], profile["max_output_tokens"]) == (8092, 100)
    assert not profile["tool_calling"]
    assert ChatSAC(rag, profile={"max_input_tokens": 7}).profile == {"max_input_tokens": 7}


# --- agents and graphs


async def test_an_agent_without_tools_answers_from_chunks(rag: SacRAG) -> None:
    agents = pytest.importorskip("langchain.agents")
    middleware = pytest.importorskip("langchain.agents.middleware")

    @middleware.dynamic_prompt
    def with_context(request: Any) -> str:
        return f"Context: {context(rag)}"

    agent = agents.create_agent(ChatSAC(rag), tools=[], middleware=[with_context])
    asked: Any = {"messages": [HumanMessage(QUESTION)]}
    (expected,) = rag.chat([[system_turn(), Message("user", (QUESTION,))]])
    for state in (agent.invoke(asked), await agent.ainvoke(asked)):
        assert state["messages"][-1].text == expected.text
        assert [c["status"] for c in state["messages"][-1].response_metadata["sac"]] == ["hit"] * 2
        assert "sac:chunk" not in "".join(message.text for message in state["messages"])


def test_an_agent_with_tools_is_told_what_to_do(rag: SacRAG) -> None:
    agents = pytest.importorskip("langchain.agents")

    @tool
    def search(query: str) -> str:
        """Searches the pages."""
        return query

    agent = agents.create_agent(ChatSAC(rag), tools=[search])
    with pytest.raises(NotImplementedError, match="retrieve in a step of its own"):
        agent.invoke({"messages": [HumanMessage(QUESTION)]})


def test_histories_are_summarized_at_a_fraction_of_the_context(rag: SacRAG) -> None:
    agents = pytest.importorskip("langchain.agents")
    middleware = pytest.importorskip("langchain.agents.middleware")
    chat = ChatSAC(rag, max_tokens=8)
    summarizing = middleware.SummarizationMiddleware(
        chat, trigger=("fraction", 0.01), keep=("messages", 1)
    )
    agent = agents.create_agent(chat, tools=[], middleware=[summarizing])
    long: list[Any] = [HumanMessage("word " * 200), AIMessage("Yes."), HumanMessage(QUESTION)]
    messages = agent.invoke({"messages": long})["messages"]
    assert "summary" in messages[0].text
    assert "word word" not in messages[0].text
    assert [message.text for message in messages[1:-1]] == [QUESTION]


async def test_a_graph_with_a_checkpointer_keeps_documents_and_shows_text(rag: SacRAG) -> None:
    graphs = pytest.importorskip("langgraph.graph")
    memory = pytest.importorskip("langgraph.checkpoint.memory")
    chat, compressor = ChatSAC(rag), SACCompressor(rag)

    class State(graphs.MessagesState):  # type: ignore[name-defined, misc]
        documents: list[Document]

    def retrieve(state: Any) -> Any:
        return {"documents": FOUND}

    async def answer(state: Any) -> Any:
        marked = [document.page_content for document in compressor.invoke(state["documents"])]
        system = SystemMessage("Context: " + "\n\n".join(marked))
        return {"messages": [await chat.ainvoke([system, *state["messages"]])]}

    graph = (
        graphs.StateGraph(State)
        .add_node(retrieve)
        .add_node(answer)
        .add_edge(graphs.START, "retrieve")
        .add_edge("retrieve", "answer")
        .compile(checkpointer=memory.InMemorySaver())
    )
    thread: Any = {"configurable": {"thread_id": "1"}}
    first = await graph.ainvoke({"messages": [HumanMessage(QUESTION)]}, thread)
    second = await graph.ainvoke({"messages": [HumanMessage("Why?")]}, thread)
    turns = [system_turn(), Message("user", (QUESTION,))]
    assert first["messages"][-1].text == rag.chat([turns])[0].text
    turns += [Message("assistant", (first["messages"][-1].text,)), Message("user", ("Why?",))]
    assert second["messages"][-1].text == rag.chat([turns])[0].text
    assert second["documents"] == FOUND


# --- what users see


def test_a_retrieval_chain_returns_documents_as_they_were(rag: SacRAG) -> None:
    from langchain_classic.chains import create_retrieval_chain
    from langchain_classic.chains.combine_documents import create_stuff_documents_chain
    from langchain_core.prompts import ChatPromptTemplate

    prompt = ChatPromptTemplate([("system", "Context: {context}"), ("human", "{input}")])
    answering = RunnablePassthrough.assign(
        context=lambda state: SACCompressor(rag).invoke(state["context"])
    ) | create_stuff_documents_chain(ChatSAC(rag), prompt)
    chain = create_retrieval_chain(RunnableLambda(lambda state: FOUND), answering)
    result = chain.invoke({"input": QUESTION})
    assert result["context"] == FOUND
    (expected,) = rag.chat([[system_turn(), Message("user", (QUESTION,))]])
    assert result["answer"] == expected.text


def test_unmarking_undoes_marking(rag: SacRAG) -> None:
    marked = SACCompressor(rag).invoke(DOCUMENTS)
    assert unmark(marked) == DOCUMENTS
    assert unmark(marked[0]) == DOCUMENTS[0]
    assert unmark([marked[0].page_content]) == [PROSE[0]]
    assert unmark(f"See: {marked[0].page_content}!") == f"See: {PROSE[0]}!"
    assert (SACCompressor(rag) | unmark).invoke(DOCUMENTS) == DOCUMENTS
    with pytest.raises(TypeError, match=r'unmark what has them, such as result\["context"\]'):
        unmark({"context": marked})  # type: ignore[call-overload]


def test_a_tool_that_prints_metadata_costs_no_tokens_for_markers(rag: SacRAG) -> None:
    def printed(documents: list[Document]) -> str:
        return "\n\n".join(f"Source: {d.metadata}\nContent: {d.page_content}" for d in documents)

    rag.precompress(PROSE[:2])
    text, marked = (
        ChatSAC(rag).invoke(f"{printed(documents)}\n{QUESTION}").usage_metadata
        for documents in (FOUND, SACCompressor(rag).invoke(FOUND))
    )
    assert text is not None
    assert marked is not None
    details: Any = marked["input_token_details"]
    saved = details["sac_source_tokens"] - details["cache_read"]
    assert saved > 0
    # A few tokens more or less where text that was tokenized in one piece is now in several.
    assert abs(text["input_tokens"] - saved - marked["input_tokens"]) <= 2 * len(FOUND)
