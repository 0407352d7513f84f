"""A query engine with the format's own template answers as the pipeline does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from llama_index.core import SummaryIndex
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index_sac import (
    SACLLM,
    SACPostprocessor,
    context_template,
    refine_template,
    text_qa_template,
)
from support.models import PROSE
from tiny_index import (  # noqa: F401
    QUESTION,
    SHORT,
    home_of_module,
    make_nodes,
    make_rag,
    no_loop_is_left,
    query_engine,
)

from sac_rag import AnswerStream, Chunk, Message, PromptFormat, SacRAG
from sac_rag.lm.generator import Generator
from sac_rag.prompts.chat import Markup, Piece
from sac_rag.prompts.format import SPANS

FORMATS = {
    "the default chat": PromptFormat(),
    "a chat with numbers": PromptFormat(system="", chunk="[{number}] {chunk}.", separator="\n"),
    "a system prompt with the chunks": PromptFormat(
        system="Passages:\n{chunks}\nEnd.", user="Question: {question}"
    ),
    "spans": SPANS,
    "a question first": PromptFormat(
        chat=False, chunk="{number}: {chunk}!", user="{question} {{}}\n{chunks}\nSo:", stop=("e",)
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_query_engine_answers_as_the_pipeline_does(
    llama: Generator, name: str, chunks: int
) -> None:
    rag = make_rag(llama, prompt_format=FORMATS[name])
    nodes = make_nodes(chunks)
    expected = rag.answer(QUESTION, [node.text for node in nodes]).text
    template = text_qa_template(rag)
    for mode in ("compact", "simple_summarize"):
        engine = query_engine(rag, nodes, text_qa_template=template, response_mode=mode)
        assert engine.query(QUESTION).response == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_summary_of_few_nodes_answers_as_the_pipeline_does(llama: Generator, name: str) -> None:
    rag, nodes = make_rag(llama, prompt_format=FORMATS[name]), make_nodes(3)
    engine = query_engine(
        rag, nodes, summary_template=text_qa_template(rag), response_mode="tree_summarize"
    )
    expected = rag.answer(QUESTION, [node.text for node in nodes]).text
    assert engine.query(QUESTION).response == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_refinement_has_the_answer_so_far_as_its_first_passage(
    llama: Generator, name: str
) -> None:
    rag = make_rag(llama, prompt_format=FORMATS[name])
    format, template = rag.prompt_format, refine_template(rag)
    values = {"query_str": QUESTION, "existing_answer": "Ingrid", "context_msg": PROSE[0]}
    chunks = [Chunk("Ingrid"), Chunk(PROSE[0])]
    if format.chat:
        expected = [(m.role, text_of(m.content)) for m in format.messages(QUESTION, chunks)]
        asked = [(m.role.value, m.content) for m in template.format_messages(**values)]
        assert asked == expected
    else:
        pieces = format.pieces(llama.tokenizer, QUESTION, chunks)
        assert template.format(**values) == text_of(pieces)


def text_of(content: Sequence[Piece]) -> str:
    """Pieces of a prompt as text, without the tokenizer's BOS."""
    words = (piece for piece in content if not isinstance(piece, Markup))
    return "".join(piece.text if isinstance(piece, Chunk) else piece for piece in words)


class Chats(SacRAG):
    """A pipeline that notes the conversations that it is asked."""

    asked: list[list[Message]]

    def stream_chat(
        self, conversation: Sequence[Message], *options: Any, **more: Any
    ) -> AnswerStream:
        self.asked.append(list(conversation))
        return super().stream_chat(conversation, *options, **more)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("engine", [ContextChatEngine, CondensePlusContextChatEngine])
def test_a_chat_engines_context_has_passages_as_the_format_writes_them(
    llama: Generator, name: str, engine: Any
) -> None:
    rag = Chats(make_rag(llama).compressor, prompt_format=FORMATS[name], decoding=SHORT)
    rag.asked = []
    nodes = make_nodes(2)
    template = context_template(rag)
    chat = engine.from_defaults(
        retriever=SummaryIndex(nodes).as_retriever(),
        llm=SACLLM(rag),
        memory=ChatMemoryBuffer.from_defaults(token_limit=4000),
        node_postprocessors=[SACPostprocessor(rag)],
        context_template=template,
        context_prompt=template,
    )
    chat.chat(QUESTION)
    system, user = rag.asked[-1]
    chunks = [Chunk(node.text) for node in nodes]
    assert text_of(rag.prompt_format.passages(chunks)) in text_of(system.content)
    assert [p.text for p in system.content if isinstance(p, Chunk)] == [n.text for n in nodes]
    assert user.content == (QUESTION,)
