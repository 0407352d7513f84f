"""LangChain messages to pieces of prompts, answers to messages. Knows nothing of stores or models.

Everything becomes text or chunks. A tool's result is a turn of the user's; what an assistant wanted
called stands behind its words, a call a line. Blocks that only carry such calls again, or thoughts
of an earlier turn, are left out; pictures and sound are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata

from langchain_sac.marker import KeyOf, find, fits
from sac_rag.chunk import Chunk
from sac_rag.prompts.chat import Message
from sac_rag.reports import Answer

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "user"),
    (FunctionMessage, "user"),
)
_SAID_ELSEWHERE = {"tool_call", "tool_use", "invalid_tool_call", "reasoning", "thinking"}


def conversation(messages: Sequence[BaseMessage], key_of: KeyOf) -> list[Message]:
    """The turns of a chat; messages of one role in a row are one turn, a blank line between them.

    Args:
        messages: What LangChain hands to a chat model.
        key_of: Gives the key that a text must have.

    Raises:
        ValueError: for a message that has no role, or content that is no text.
    """
    turns: list[Message] = []
    for message in messages:
        role, content = _role(message), _content(message, key_of)
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, (*turns[-1].content, "\n\n", *content))
        else:
            turns.append(Message(role, tuple(content)))
    return turns


def plain_prompt(messages: Sequence[BaseMessage], key_of: KeyOf) -> list[str | Chunk]:
    """The contents of messages as one text, a blank line between them, whoever said them.

    Raises:
        ValueError: for content that is no text.
    """
    pieces: list[str | Chunk] = []
    for number, message in enumerate(messages):
        pieces += ["\n\n"] if number else []
        pieces += _content(message, key_of)
    return pieces


def usage_of(answer: Answer) -> UsageMetadata:
    """What an answer took: `input_tokens` are the positions that the model attended to.

    Anchors are among them: `cache_read` out of the store, `cache_creation` computed for this
    answer. `sac_source_tokens` is how much text they stand for.
    """
    usage = answer.usage
    details: Any = {
        "cache_read": usage.anchors_from_store,
        "cache_creation": usage.anchors_computed,
        "sac_source_tokens": usage.source_tokens,
    }
    return UsageMetadata(
        input_tokens=usage.positions_attended,
        output_tokens=usage.generated_tokens,
        total_tokens=usage.positions_attended + usage.generated_tokens,
        input_token_details=details,
    )


def metadata_of(answer: Answer, model: str) -> dict[str, Any]:
    """The rest of an answer's account: JSON, with what became of each chunk under "sac"."""
    return {
        "model_name": model,
        # "eos" is a name of ours; others call any end of the model's own choice "stop".
        "finish_reason": "length" if answer.finish_reason == "length" else "stop",
        "sac": [
            {
                "key": report.chunk.metadata["key"],
                "status": report.status,
                "read_as": report.read_as,
                "num_tokens": report.num_tokens,
                "num_anchors": report.num_anchors,
            }
            for report in answer.chunks
        ],
    }


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise ValueError(
        f"expected a system, human, AI, tool, function or chat message, got: {message.type!r}"
    )


def _content(message: BaseMessage, key_of: KeyOf) -> list[str | Chunk]:
    content = message.content
    blocks = [content] if isinstance(content, str) else content
    pieces = [piece for block in blocks for piece in _block(block, key_of)]
    if isinstance(message, AIMessage) and message.tool_calls:
        calls = [
            f"{call['name']}({json.dumps(call['args'], ensure_ascii=False)})"
            for call in message.tool_calls
        ]
        pieces.append("\n".join(["", *calls] if pieces else calls))
    return pieces


def _block(block: str | dict[Any, Any], key_of: KeyOf) -> list[str | Chunk]:
    if isinstance(block, str):
        return find(block, key_of)
    kind, text = block.get("type"), block.get("text")
    if kind in _SAID_ELSEWHERE:
        return []
    if kind not in ("text", "text-plain") or not isinstance(text, str):
        raise ValueError(
            "ChatSAC reads text alone: expected content blocks of type 'text' or 'text-plain' "
            f"with a 'text', got: {kind!r}; leave it out, or say in words what is in it"
        )
    key = _key_in(block) if kind == "text-plain" else None
    if key is not None and fits(text, key, key_of):
        return [Chunk(text, metadata={"key": key})]
    return find(text, key_of)


def _key_in(block: dict[Any, Any]) -> str | None:
    """The key in a block's extras["sac"]["key"]."""
    inside: Any = block
    for name in ("extras", "sac", "key"):
        inside = inside.get(name) if isinstance(inside, dict) else None
    return inside if isinstance(inside, str) else None
