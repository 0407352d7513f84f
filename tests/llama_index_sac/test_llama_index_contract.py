"""What holds in every response mode and chat engine, asked in every way LlamaIndex has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from llama_index.core import Settings, SummaryIndex
from llama_index.core.bridge.pydantic import Field
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index_sac import SACLLM, SACPostprocessor
from tiny_index import QUESTION, SHORT, compressor_of, home_of_module, make_nodes, no_loop_is_left  # noqa: F401

from sac_rag import Answer, CachedCompressor, Chunk, Message, SacRAG
from sac_rag.answering import AnswerStream
from sac_rag.lm.generator import Generator

MODES = (
    "compact",
    "refine",
    "simple_summarize",
    "tree_summarize",
    "accumulate",
    "compact_accumulate",
)
WAYS = ("sync", "async", "streaming", "async streaming")
ENGINES = {"context": ContextChatEngine, "condense_plus_context": CondensePlusContextChatEngine}


class RecordingRAG(SacRAG):
    """A pipeline that notes what it is asked."""

    asked: list[list[str | Chunk]]

    def stream_chat(
        self, conversation: Sequence[Message], *options: Any, **more: Any
    ) -> AnswerStream:
        self.asked.append([piece for message in conversation for piece in message.content])
        return super().stream_chat(conversation, *options, **more)

    def stream_complete(
        self, prompt: Sequence[str | Chunk], *options: Any, **more: Any
    ) -> AnswerStream:
        self.asked.append(list(prompt))
        return super().stream_complete(prompt, *options, **more)

    def submit_chat(
        self, conversation: Sequence[Message], *options: Any, **more: Any
    ) -> Future[Answer]:
        self.asked.append([piece for message in conversation for piece in message.content])
        return super().submit_chat(conversation, *options, **more)

    def submit_complete(
        self, prompt: Sequence[str | Chunk], *options: Any, **more: Any
    ) -> Future[Answer]:
        self.asked.append(list(prompt))
        return super().submit_complete(prompt, *options, **more)


class Events(BaseEventHandler):
    """Keeps the responses that LLM events report."""

    responses: list[Any] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Events"

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, (LLMChatEndEvent, LLMCompletionEndEvent)):
            self.responses.append(event.response)


@dataclass
class Witness:
    """What LlamaIndex's own instruments saw."""

    events: Events = field(default_factory=Events)
    spans: SimpleSpanHandler = field(default_factory=SimpleSpanHandler)
    tokens: TokenCountingHandler = field(
        default_factory=lambda: TokenCountingHandler(tokenizer=lambda text: [0] * 100_000)
    )


@pytest.fixture
def witness() -> Iterator[Witness]:
    seen, dispatcher = Witness(), get_dispatcher()
    handlers = list(dispatcher.event_handlers), list(dispatcher.span_handlers)
    dispatcher.add_event_handler(seen.events)
    dispatcher.add_span_handler(seen.spans)
    Settings.callback_manager = CallbackManager([seen.tokens])
    yield seen
    Settings.callback_manager = CallbackManager()
    dispatcher.event_handlers, dispatcher.span_handlers = handlers


@pytest.fixture(params=[False, True], ids=["chat", "plain"])
def llm(request: pytest.FixtureRequest, llama: Generator, witness: Witness) -> SACLLM:
    rag = RecordingRAG(CachedCompressor(compressor_of(llama, "sac"), {}), decoding=SHORT)
    rag.asked = []
    return SACLLM(rag, plain=request.param, callback_manager=Settings.callback_manager)


async def asked_engine(llm: SACLLM, mode: str, way: str, nodes: Any) -> tuple[str, Any]:
    """Text and source nodes of a query engine's response."""
    engine = SummaryIndex(nodes).as_query_engine(
        llm=llm,
        node_postprocessors=[SACPostprocessor(llm.rag)],
        response_mode=mode,
        streaming="streaming" in way,
    )
    if "async" in way:
        response = await engine.aquery(QUESTION)
        text = await text_of(response.async_response_gen()) if "streaming" in way else str(response)
    else:
        response = engine.query(QUESTION)
        text = "".join(response.response_gen) if "streaming" in way else str(response)
    return text, response.source_nodes


async def asked_chat(llm: SACLLM, engine: str, way: str, nodes: Any) -> tuple[str, Any]:
    """The same of a chat engine that has a turn behind it."""
    said = [ChatMessage("Hello.", role="user"), ChatMessage("Ahoy!", role="assistant")]
    chat = ENGINES[engine].from_defaults(
        retriever=SummaryIndex(nodes).as_retriever(),
        llm=llm,
        memory=ChatMemoryBuffer.from_defaults(chat_history=said, token_limit=4000),
        node_postprocessors=[SACPostprocessor(llm.rag)],
    )
    if way == "async streaming":
        stream = await chat.astream_chat(QUESTION)
        return await text_of(stream.async_response_gen()), stream.source_nodes
    if way == "streaming":
        stream = chat.stream_chat(QUESTION)
        return "".join(stream.response_gen), stream.source_nodes
    response = await chat.achat(QUESTION) if way == "async" else chat.chat(QUESTION)
    return response.response, response.source_nodes


async def text_of(pieces: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in pieces])


CELLS = [
    pytest.param(ask, name, way, id=f"{name}, {way}")
    for ask, names in ((asked_engine, MODES), (asked_chat, ENGINES))
    for name in names
    for way in WAYS
    if not ("accumulate" in name and "streaming" in way)  # LlamaIndex has no such thing
]


@pytest.mark.parametrize(("ask", "name", "way"), CELLS)
async def test_contract(llm: SACLLM, witness: Witness, ask: Any, name: str, way: str) -> None:
    nodes = make_nodes(metadata={"file": "log.txt"})
    before = [node.to_dict() for node in nodes]
    rag = llm.rag
    assert isinstance(rag, RecordingRAG)

    text, sources = await ask(llm, name, way, nodes)

    # The model attends to every node, and reads neither its text nor a marker.
    attended = [piece.text for asked in rag.asked for piece in asked if isinstance(piece, Chunk)]
    assert sorted(attended) == sorted(node.text for node in nodes)
    read = "".join(piece for asked in rag.asked for piece in asked if isinstance(piece, str))
    assert "<|sac" not in read
    assert not any(node.text in read for node in nodes)
    assert read.count("file: log.txt") == len(nodes)

    # What the last call wrote is what the caller gets.
    *_, last = witness.events.responses
    written = str(getattr(last, "text", None) or last.message.content)
    assert written and written in text

    # Sources are the nodes that were retrieved, which are as they were.
    assert [source.node.get_content() for source in sources] == [node.text for node in nodes]
    for source, node in zip(sources, nodes, strict=True):
        assert (source.node_id, source.node.ref_doc_id) == (node.node_id, node.ref_doc_id)
        assert (source.metadata, source.node.hash) == (node.metadata, node.hash)
        assert (source.node.sac["status"], source.node.sac["read_as"]) == ("absent", "anchors")
    assert [node.to_dict() for node in nodes] == before

    # Every call is an event and a span; tokens are what was attended to and written.
    reports = [response.additional_kwargs["sac"] for response in witness.events.responses]
    assert len(reports) == len(rag.asked)
    chunks = [chunk for report in reports for chunk in report["chunks"]]
    assert sorted((c["node_id"], c["status"], c["read_as"]) for c in chunks) == [
        (node.node_id, "absent", "anchors") for node in nodes
    ]
    assert witness.tokens.prompt_llm_token_count == sum(
        report["usage"]["positions_attended"] for report in reports
    )
    assert witness.tokens.completion_llm_token_count == sum(
        report["usage"]["generated_tokens"] for report in reports
    )
    spans = [span.id_ for span in witness.spans.completed_spans]
    assert any("SACLLM" in span for span in spans)
    assert any("SACPostprocessor" in span for span in spans)
