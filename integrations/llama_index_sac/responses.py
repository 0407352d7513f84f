"""Answers to responses of LlamaIndex, whole or while they are generated."""

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
    from sac_rag import Answer, AnswerStream
    from sac_rag.reports import ChunkReport


@dataclass(frozen=True)
class Step:
    """An answer as far as it is generated; `answer` has usage and timings once it has ended."""

    text: str
    delta: str
    answer: Answer | None = None


def growing(stream: AnswerStream) -> Iterator[Step]:
    """An answer step by step; the last step adds no text and has the whole answer."""
    written = shown = ""
    for piece in stream:
        written += piece
        # Answers end up in later prompts, where they must not look like markers.
        before, shown = shown, escape(written)
        yield Step(shown, shown[len(before) :])
    yield whole(stream.answer, shown)


def whole(answer: Answer, text: str | None = None) -> Step:
    """The last step: an answer that has ended; the nodes that it read report it."""
    for report in answer.chunks:
        report.chunk.metadata["report"].update(_entry(report))
    return Step(escape(answer.text) if text is None else text, "", answer)


def _entry(report: ChunkReport) -> dict[str, Any]:
    """How a chunk was read, as JSON values."""
    metadata = report.chunk.metadata
    return {
        "node_id": metadata["node_id"],
        # A chunk that was compressed on retrieval is a hit by now; its reason is recorded.
        "status": metadata["miss"] or report.status,
        "read_as": report.read_as,
        "num_tokens": report.num_tokens,
        "num_anchors": report.num_anchors,
    }


def _account(step: Step) -> dict[str, Any]:
    """Fields of a response besides its text."""
    answer = step.answer
    if answer is None:
        return {}
    usage = answer.usage
    chunks = [_entry(report) for report in answer.chunks]
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
    """Response of `complete` and its stream."""
    return CompletionResponse(text=step.text, delta=step.delta, **_account(step))


def turn(step: Step) -> ChatResponse:
    """Response of `chat` and its stream."""
    message = ChatMessage(step.text, role=MessageRole.ASSISTANT)
    return ChatResponse(message=message, delta=step.delta, **_account(step))
