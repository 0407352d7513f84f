"""A query engine with the format's own template answers as the pipeline does."""

from __future__ import annotations

import pytest
from llama_index_sac import text_qa_template
from tiny_index import QUESTION, home_of_module, make_nodes, make_rag, no_loop_is_left, query_engine  # noqa: F401

from sac_rag import PromptFormat
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import SPANS

FORMATS = {
    "the default chat": PromptFormat(),
    "a chat with numbers": PromptFormat(system="", chunk="[{number}] {chunk}.", separator="\n"),
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
