"""Chat messages to pieces of a prompt, cut where chunks stand. Knows nothing of KV or models."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sac_rag.chunk import Chunk


@dataclass(frozen=True)
class Message:
    """One turn of a chat, its content any interleaving of text and chunks.

    Attributes:
        role: "system", "user", "assistant", or what else the model's chat template knows.
        content: Text and chunks in reading order.
    """

    role: str
    content: tuple[str | Chunk, ...]

    def __post_init__(self) -> None:
        if isinstance(self.content, str):
            raise TypeError(
                f"a message's content must be a tuple of texts and chunks, was one str: "
                f"{self.content!r:.100}"
            )


@dataclass(frozen=True)
class Markup:
    """The chat template's own words, in which special tokens count as such."""

    text: str


# What a prompt is made of: the template's words, the caller's words, chunks.
Piece: TypeAlias = Markup | str | Chunk


@dataclass(frozen=True)
class PromptFormat:
    """How a question and its chunks become chat messages.

    Attributes:
        system: System prompt; "" for none.
        chunk: A chunk's surroundings, plain text, with {number} from 1, {title}, {id} and {chunk}.
        user: The user's turn, with {chunks} and {question}.
        separator: Plain text between chunks.
    """

    system: str = "Answer the question from the passages. Be brief."
    chunk: str = "{title}\n{chunk}"
    user: str = "{chunks}\n\nQuestion: {question}"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        for name, needed in (("chunk", "{chunk}"), ("user", "{question}"), ("user", "{chunks}")):
            if getattr(self, name).count(needed) != 1:
                raise ValueError(
                    f"the prompt format's {name!r} must contain {needed} once, "
                    f"was: {getattr(self, name)!r}"
                )

    def messages(self, question: str, chunks: Sequence[Chunk]) -> list[Message]:
        """The chat that asks a question about chunks, in their order.

        Raises:
            ValueError: if the question is empty.
        """
        if not question.strip():
            raise ValueError("the question must have text, was: empty or only white space")
        passages: list[str | Chunk] = []
        for number, chunk in enumerate(chunks, start=1):
            before, after = self.chunk.split("{chunk}")
            fields = {"number": number, "title": chunk.title or "", "id": chunk.id or ""}
            passages += [self.separator] if passages else []
            heading = _fill(before, fields)
            # The line of a title that is not there is no line.
            passages += [heading if heading.strip() else "", chunk, _fill(after, fields)]
        before, after = self.user.split("{chunks}")
        fields = {"question": question}
        # Without chunks there is nothing to set the question apart from.
        content = (
            [_fill(before, fields), *passages, _fill(after, fields)] if passages else [question]
        )
        turns = [Message("system", (self.system,))] if self.system else []
        return [*turns, Message("user", _joined(content))]


def render(tokenizer: Any, messages: Sequence[Message]) -> list[Piece]:
    """Puts messages into the tokenizer's chat template, ready for the assistant's turn.

    The template sees a placeholder for each content, so nothing in a text or a chunk can be taken
    for the template's own markup, and chunks need not be text when the prompt is put together.

    Args:
        tokenizer: An HF tokenizer. One without a chat template gets the contents as plain
            paragraphs behind its BOS.
        messages: At least one.

    Returns:
        Pieces in reading order.

    Raises:
        ValueError: if there are no messages, or the template refuses them or drops one.
    """
    if not messages:
        raise ValueError("expected at least one message, got none")
    if not getattr(tokenizer, "chat_template", None):
        return _plain(tokenizer, messages)
    nonce = secrets.token_hex(8)
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": m.role, "content": f"<{nonce}:{i}>"} for i, m in enumerate(messages)],
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # templates raise whatever Jinja or their author chose
        raise ValueError(
            f"the model's chat template refused the roles {[m.role for m in messages]}: {error}"
        ) from error
    pieces: list[Piece] = []
    parts = re.split(f"<{nonce}:([0-9]+)>", text)
    if [int(i) for i in parts[1::2]] != list(range(len(messages))):
        raise ValueError(
            f"the model's chat template must render each of {len(messages)} messages once, in "
            f"order, but rendered numbers {parts[1::2]}"
        )
    for i, part in enumerate(parts):
        if i % 2:
            pieces += messages[int(part)].content
        elif part:
            pieces.append(Markup(part))
    return pieces


def opening(tokenizer: Any) -> str:
    """What every prompt of this tokenizer starts with, whatever the messages: the natural sink."""
    if not getattr(tokenizer, "chat_template", None):
        return _bos(tokenizer)
    try:
        first = render(tokenizer, [Message("system", ("a",)), Message("user", ("a",))])[0]
    except ValueError:  # Gemma's, for one, knows no system role
        first = render(tokenizer, [Message("user", ("a",))])[0]
    if not isinstance(first, Markup):
        return _bos(tokenizer)
    return first.text


def _plain(tokenizer: Any, messages: Sequence[Message]) -> list[Piece]:
    bos = _bos(tokenizer)
    pieces: list[Piece] = [Markup(bos)] if bos else []
    for message in messages:
        pieces += [*message.content, "\n\n"]
    return pieces


def _bos(tokenizer: Any) -> str:
    """The BOS, if the tokenizer itself puts one in front of a text."""
    starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if starts and tokenizer.bos_token else ""


def _fill(template: str, fields: dict[str, Any]) -> str:
    """Replaces {name}; braces in the values are left alone, unknown names too."""
    return re.sub(r"\{(\w+)\}", lambda m: str(fields.get(m[1], m[0])), template)


def _joined(content: Sequence[str | Chunk]) -> tuple[str | Chunk, ...]:
    """Neighbouring texts as one, so that they are tokenized as one; empty ones dropped."""
    joined: list[str | Chunk] = []
    for piece in content:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return tuple(joined)
