"""Messages of LangChain to pieces of prompts, and answers to messages.

All content becomes text or chunks. The result of a tool is a turn of the user; tool calls follow
the text of the assistant, one per line. Blocks that only repeat such calls, or carry the reasoning
of an earlier turn, are left out; images and audio are refused.
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
from sac_rag import Answer, Chunk, Message

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "user"),
    (FunctionMessage, "user"),
)
_LEFT_OUT = {"tool_call", "tool_use", "invalid_tool_call", "reasoning", "thinking"}


def conversation(messages: Sequence[BaseMessage], key_of: KeyOf) -> list[Message]:
    """The turns of a chat; consecutive messages of one role are joined by blank lines.

    Args:
        messages: Input of a chat model.
        key_of: Computes the key of a text.

    Raises:
        ValueError: for a message without a role, or content that is not text.
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
    """The contents of messages of any role as one text, joined by blank lines.

    Raises:
        ValueError: for content that is not text.
    """
    pieces: list[str | Chunk] = []
    for number, message in enumerate(messages):
        pieces += ["\n\n"] if number else []
        pieces += _content(message, key_of)
    return pieces


def usage_of(answer: Answer) -> UsageMetadata:
    """Usage of an answer: `input_tokens` are the positions that the model attended to.

    They include anchors: `cache_read` from the store, `cache_creation` computed for this answer.
    `sac_source_tokens` is the number of tokens of the chunks' text.
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
    """Metadata of an answer as JSON values, with the status of each chunk under "sac"."""
    return {
        "model_name": model,
        # OpenAI's names: "stop" is any end that the model chose, "eos" included.
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
    if kind in _LEFT_OUT:
        return []
    if kind not in ("text", "text-plain") or not isinstance(text, str):
        raise ValueError(
            "ChatSAC reads text only: expected content blocks of type 'text' or 'text-plain' "
            f"with a 'text', got: {kind!r}; leave it out, or describe it in words"
        )
    key = _key_in(block) if kind == "text-plain" else None
    if key is not None and fits(text, key, key_of):
        return [Chunk(text, metadata={"key": key})]
    return find(text, key_of)


def _key_in(block: dict[Any, Any]) -> str | None:
    """The key of a block, in extras["sac"]["key"], if it has one."""
    inside: Any = block
    for name in ("extras", "sac", "key"):
        inside = inside.get(name) if isinstance(inside, dict) else None
    return inside if isinstance(inside, str) else None
