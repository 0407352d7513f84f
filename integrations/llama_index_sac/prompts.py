"""The prompt format of a SacRAG as prompt templates of LlamaIndex."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate

from llama_index_sac.markers import MARKER, require_rag
from sac_rag import Chunk, Message, PromptFormat

if TYPE_CHECKING:
    from sac_rag import SacRAG


def text_qa_template(rag: SacRAG) -> BasePromptTemplate:
    """The template with which a query engine asks in the prompt of `rag.answer`.

    It is a `summary_template` too. The answers are equal if the nodes have no metadata for the LLM:
    the text between two chunks is then the separator of the format. SACLLM recognizes a plain
    prompt by the first and last words of the format; a format whose prompts have neither in common
    needs `SACLLM(rag, plain=True)`.

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
    return _template(_format_of(rag), ["{context_str}"], "context_str")


def refine_template(rag: SacRAG) -> BasePromptTemplate:
    """The `refine_template` in the prompt of `rag.answer`: the answer so far is its first passage.

    >>> template = refine_template(rag)
    >>> prompt = template.format(query_str="Tall?", existing_answer="41 m", context_msg="A tower.")
    >>> "41 m" in prompt and "A tower." in prompt
    True

    Raises as `text_qa_template` does.
    """
    return _template(_format_of(rag), ["{existing_answer}", "{context_msg}"], "context_msg")


def context_template(rag: SacRAG) -> PromptTemplate:
    """The system prompt of a chat engine with passages as `rag.answer` writes them.

    It is the `context_template` of ContextChatEngine and the `context_prompt` of
    CondensePlusContextChatEngine.

    >>> "A tower." in context_template(rag).format(context_str="A tower.")
    True

    Raises as `text_qa_template` does.
    """
    format = _format_of(rag)
    before, after = _texts(format.passages([Chunk("?")]))
    system = format.system if format.chat else format.prefix.rstrip()
    heading, _, rest = system.partition(
        "{chunks}"
    )  # a system prompt may have its own place for them
    start = heading if rest or not heading else f"{heading}\n\n"
    return PromptTemplate(
        f"{start}{before}{{context_str}}{after}{rest}\n\n",
        function_mappings={"context_str": _Joined(format, "context_str")},
    )


def _format_of(rag: SacRAG) -> PromptFormat:
    require_rag(rag)
    if rag.prompt_format.raw:
        raise ValueError(
            "a template of LlamaIndex is plain text, and a raw format is not; ask with rag.answer"
        )
    return rag.prompt_format


def _template(format: PromptFormat, passages: Sequence[str], context: str) -> BasePromptTemplate:
    """The format's prompt with variables as its passages; those in the context are joined."""
    turns = []
    for message in _messages(format, len(passages)):
        first, *texts = _texts(message.content)
        filled = first + "".join(
            passage + text for passage, text in zip(passages, texts, strict=False)
        )
        turns.append(ChatMessage(filled, role=MessageRole(message.role)))
    mappings: dict[str, Callable[..., Any]] = {context: _Joined(format, context)}
    if not format.chat:
        return PromptTemplate(turns[0].content or "", function_mappings=mappings)
    return ChatPromptTemplate(turns, function_mappings=mappings)


@dataclass(frozen=True)
class _Joined:
    """Joins the chunks of a context as the format does, in place of LlamaIndex's blank lines.

    Picklable, and so are the templates.
    """

    format: PromptFormat
    name: str

    def __call__(self, **values: Any) -> str:
        context = values.get(self.name, "")
        # "simple_summarize" gives a list.
        parts = MARKER.split(context if isinstance(context, str) else "\n".join(context))
        joints = _texts(self.format.passages([Chunk("?")] * (len(parts) // 2)))[1:-1]
        for i, joint in enumerate(joints, start=1):
            if not parts[2 * i].strip():
                parts[2 * i] = joint
        return "".join(parts)


def _messages(format: PromptFormat, chunks: int) -> list[Message]:
    """The turns of a prompt about n chunks; a plain prompt is one turn of the user."""
    placeholders = [Chunk("?")] * chunks
    if format.chat:
        return format.messages("{query_str}", placeholders)
    words = format.user.replace("{question}", "{query_str}")
    before, after = words.split("{chunks}")
    content = (format.prefix + before, *format.passages(placeholders), after)
    return [Message(MessageRole.USER.value, content)]


def _texts(content: Sequence[str | Chunk]) -> list[str]:
    """The texts before, between and behind chunks."""
    texts = [""]
    for piece in content:
        if isinstance(piece, Chunk):
            texts.append("")
        else:
            texts[-1] += piece
    return texts
