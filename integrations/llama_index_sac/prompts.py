"""A SacRAG's prompt format as a template of LlamaIndex. Knows nothing of KV or of retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate

from llama_index_sac.markers import MARKER, markers_of
from sac_rag.chunk import Chunk
from sac_rag.template import Markup

if TYPE_CHECKING:
    from sac_rag.pipeline import SacRAG


def text_qa_template(rag: SacRAG) -> BasePromptTemplate:
    """The template with which a query engine asks as `rag.answer` does.

    For `as_query_engine(text_qa_template=…)`, with `SACLLM(rag, plain=True)` if the format is a
    plain one. What stands between chunks without metadata is what the format puts there.

    >>> from sac_rag.template import SPANS
    >>> rag.format = SPANS
    >>> print(text_qa_template(rag).get_template()[-52:])
    Text:
    {context_str}
    Question: {query_str}
    Answer:

    Raises:
        TypeError: if rag is no SacRAG.
        ValueError: for a raw format, whose own words are special tokens: no template has those.
    """
    markers_of(rag)
    format, tokenizer = rag.format, rag.generator.tokenizer
    if format.raw:
        raise ValueError(
            "a template of LlamaIndex is plain text, and a raw format is not; ask with rag.answer"
        )

    def around(chunks: int) -> list[str]:
        """The user's text before, between and behind so many chunks."""
        given = [Chunk("?")] * chunks
        if format.chat:
            return _texts(format.messages("{query_str}", given)[-1].content)
        return _texts(format.pieces(tokenizer, "{query_str}", given))

    def context_str(context_str: str | Sequence[str] = "", **others: Any) -> str:
        # A list comes from "simple_summarize".
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


def _texts(content: Sequence[Markup | str | Chunk]) -> list[str]:
    """What stands before, between and behind chunks."""
    texts = [""]
    for piece in content:
        if isinstance(piece, Chunk):
            texts.append("")
        elif isinstance(piece, str):  # Markup is the tokenizer's BOS, which SacRAG puts there
            texts[-1] += piece
    return texts
