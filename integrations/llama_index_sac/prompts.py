"""The prompt format of a SacRAG as a prompt template of LlamaIndex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate

from llama_index_sac.markers import MARKER, markers_of
from sac_rag import Chunk

if TYPE_CHECKING:
    from sac_rag import SacRAG


def text_qa_template(rag: SacRAG) -> BasePromptTemplate:
    """The template with which a query engine asks in the prompt of `rag.answer`.

    The answers are equal if the nodes have no metadata for the LLM: the text between two chunks is
    then the separator of the format. SACLLM recognizes a plain prompt by the first and last words
    of the format; a format whose prompts have neither in common needs `SACLLM(rag, plain=True)`.

    >>> from llama_index.core import SummaryIndex
    >>> from llama_index.core.schema import TextNode
    >>> from llama_index_sac import SACLLM, SACPostprocessor
    >>> texts = ["The keeper counted seven ships.", "The tower is 41 metres tall."]
    >>> engine = SummaryIndex([TextNode(text=text) for text in texts]).as_query_engine(
    ...     llm=SACLLM(rag),
    ...     node_postprocessors=[SACPostprocessor(rag)],
    ...     text_qa_template=text_qa_template(rag),
    ... )
    >>> engine.query("How tall is it?").response == rag.answer("How tall is it?", texts).text
    True

    Raises:
        TypeError: if rag is not a SacRAG.
        ValueError: for a raw format: its special tokens would be plain text in a template.
    """
    markers_of(rag)
    format, tokenizer = rag.prompt_format, rag.generator.tokenizer
    if format.raw:
        raise ValueError(
            "a template of LlamaIndex is plain text, and a raw format is not; ask with rag.answer"
        )

    def around(chunks: int) -> list[str]:
        """The text of the user before, between and behind n chunks."""
        placeholders = [Chunk("?")] * chunks
        if format.chat:
            return _texts(format.messages("{query_str}", placeholders)[-1].content)
        return _texts(format.pieces(tokenizer, "{query_str}", placeholders))

    def context_str(context_str: str | Sequence[str] = "", **others: Any) -> str:
        # "simple_summarize" gives a list.
        context = context_str if isinstance(context_str, str) else "\n".join(context_str)
        parts = MARKER.split(context)
        for i, between in enumerate(around(len(parts) // 2)[1:-1], start=1):
            if not parts[2 * i].strip():
                parts[2 * i] = between
        return "".join(parts)

    before, after = around(1)
    user = before + "{context_str}" + after
    mappings = {"context_str": context_str}
    if not format.chat:
        return PromptTemplate(user, function_mappings=mappings)
    system = [ChatMessage(format.system, role=MessageRole.SYSTEM)] if format.system else []
    turns = [*system, ChatMessage(user, role=MessageRole.USER)]
    return ChatPromptTemplate(turns, function_mappings=mappings)


def _texts(content: Sequence[object]) -> list[str]:
    """The texts before, between and behind chunks."""
    texts = [""]
    for piece in content:
        if isinstance(piece, Chunk):
            texts.append("")
        elif isinstance(piece, str):  # the rest is the tokenizer's BOS, which SacRAG adds
            texts[-1] += piece
    return texts
