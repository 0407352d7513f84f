"""Answers as they are written to responses of LlamaIndex. Knows nothing of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
)

from llama_index_sac.markers import escape

if TYPE_CHECKING:
    from sac_rag.answering import AnswerStream
    from sac_rag.reports import Answer


@dataclass(frozen=True)
class Step:
    """An answer as far as it is written, with its account once it has ended."""

    text: str
    delta: str
    answer: Answer | None = None


def growing(stream: AnswerStream) -> Iterator[Step]:
    """An answer step by step; the last step adds no text and has the account."""
    written = shown = ""
    for piece in stream:
        written += piece
        # Whoever hands an answer on in a prompt must not hand on what looks like a marker.
        before, shown = shown, escape(written)
        yield Step(shown, shown[len(before) :])
    yield Step(shown, "", stream.answer)


def _account(step: Step) -> dict[str, Any]:
    """What a response says besides its text."""
    answer = step.answer
    if answer is None:
        return {}
    usage = answer.usage
    chunks = [
        {
            "node_id": report.chunk.metadata.get("node_id"),
            # A chunk that was compressed on retrieval is a hit by now.
            "status": report.chunk.metadata.get("miss") or report.status,
            "read_as": report.read_as,
            "num_tokens": report.num_tokens,
            "num_anchors": report.num_anchors,
        }
        for report in answer.chunks
    ]
    return {
        "raw": {
            "usage": {
                "prompt_tokens": usage.positions_attended,
                "completion_tokens": usage.generated_tokens,
                "total_tokens": usage.positions_attended + usage.generated_tokens,
            },
            "finish_reason": answer.finish_reason,
        },
        "additional_kwargs": {
            "sac": {"chunks": chunks, "usage": asdict(usage), "timings": asdict(answer.timings)}
        },
    }


def completion(step: Step) -> CompletionResponse:
    """What `complete` and its kin return."""
    return CompletionResponse(text=step.text, delta=step.delta, **_account(step))


def turn(step: Step) -> ChatResponse:
    """What `chat` and its kin return."""
    message = ChatMessage(step.text, role=MessageRole.ASSISTANT)
    return ChatResponse(message=message, delta=step.delta, **_account(step))
