"""Messages and chat templates: turns of a chat to pieces of a prompt, split at chunks."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sac_rag.chunk import Chunk

_ROLE = re.compile(r"[\w .-]+")

# Fewer words than these behind the chunks ("Answer:") have no question among them.
_FEW_WORDS = 4
# More words than these before the chunks are examples rather than a question.
_MANY_WORDS = 150


@dataclass(frozen=True)
class Message:
    """One turn of a chat, its content any interleaving of text and chunks.

    Attributes:
        role: "system", "user", "assistant", or another role of the model's chat template.
        content: Text and chunks in reading order.

    Raises:
        TypeError: if the content is a str.
        ValueError: for a role of other characters than letters, digits, spaces, ".", "_" and "-":
            the template puts it among its own words, where control tokens are recognised.
    """

    role: str
    content: tuple[str | Chunk, ...]

    def __post_init__(self) -> None:
        if not _ROLE.fullmatch(self.role):
            raise ValueError(
                "a message's role must be made of letters, digits, spaces, '.', '_' and '-', "
                f"was: {self.role!r:.100}"
            )
        if isinstance(self.content, str):
            raise TypeError(
                f"a message's content must be a tuple of texts and chunks, was one str: "
                f"{self.content!r:.100}"
            )


@dataclass(frozen=True)
class Markup:
    """Text of a template, in which special tokens are recognised."""

    text: str


# Pieces of a prompt: text of the template, text of the caller, chunks.
Piece: TypeAlias = Markup | str | Chunk


def render(tokenizer: Any, messages: Sequence[Message]) -> list[Piece]:
    """Renders messages with the tokenizer's chat template, up to the assistant's next turn.

    The template gets a placeholder for each content, so that nothing in a text or a chunk can be
    taken for the template's markup, and chunks need not be text. A template that has no system role
    gets the system prompt at the start of the first user's turn.

    Args:
        tokenizer: An HF tokenizer. Without a chat template, the contents become plain paragraphs
            behind its BOS.
        messages: At least one.

    Returns:
        Pieces in reading order.

    Raises:
        ValueError: if there are no messages, or the template refuses them or drops one.
    """
    if not messages:
        raise ValueError("expected at least one message, got none")
    try:
        return _rendered(tokenizer, messages)
    except ValueError as refused:
        if [message.role for message in messages[:2]] != ["system", "user"]:
            raise
        system, user, *others = messages
        first = Message("user", joined((*system.content, "\n\n", *user.content)))
        try:
            return _rendered(tokenizer, [first, *others])
        except ValueError:
            raise refused from None


def _rendered(tokenizer: Any, messages: Sequence[Message]) -> list[Piece]:
    if not getattr(tokenizer, "chat_template", None):
        paragraphs = [part for message in messages for part in (*message.content, "\n\n")]
        return _behind_bos(tokenizer, paragraphs)
    nonce = secrets.token_hex(8)
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": m.role, "content": f"<{nonce}:{i}>"} for i, m in enumerate(messages)],
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # templates may raise any exception
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


def plain(tokenizer: Any, content: Sequence[str | Chunk]) -> list[Piece]:
    """Pieces of a text that the answer continues: the tokenizer's BOS, if it has one, and content.

    Raises:
        ValueError: if the content does not end in text.
    """
    words = joined(content)
    if not words or not isinstance(words[-1], str):
        raise ValueError(
            "a plain prompt must end in text, which the answer continues, ended in "
            f"{'a chunk' if words else 'nothing'}"
        )
    return _behind_bos(tokenizer, words)


def leading(pieces: Sequence[Piece]) -> list[Markup | str]:
    """The prefix: the pieces before the first chunk."""
    prefix: list[Markup | str] = []
    for piece in pieces:
        if isinstance(piece, Chunk):
            break
        prefix.append(piece)
    return prefix


def repeat_question(pieces: Sequence[Piece]) -> list[Piece]:
    """A prompt that repeats its question behind the chunks, if it stands before them.

    Chunks are compressed without the question, and a small model looks for the answer in them only
    when it reads the question after them. What is repeated is the text before the chunks of the
    last turn, if no question mark follows them, and it has one itself or hardly a word follows.
    For a turn of chunks alone, as of a tool, it is what the same speaker asked in an earlier turn.
    """
    pieces = list(pieces)
    last = max((i for i, piece in enumerate(pieces) if isinstance(piece, Chunk)), default=-1)
    markups = [i for i, piece in enumerate(pieces) if isinstance(piece, Markup)]
    begin = max((i + 1 for i in markups if i < last), default=0)
    end = min((i for i in markups if i > last), default=len(pieces))
    before = "".join(text for text in leading(pieces[begin:end]) if isinstance(text, str))
    after = "".join(text for text in pieces[last + 1 : end] if isinstance(text, str))
    if not f"{before}{after}".split():
        before = _asked_earlier(pieces[:begin])
    is_before = "?" not in after and ("?" in before or len(after.split()) < _FEW_WORDS)
    is_last_turn = all(isinstance(piece, Markup) for piece in pieces[end:])
    if last < 0 or not is_before or not is_last_turn or not 0 < len(before.split()) <= _MANY_WORDS:
        return pieces
    return [*pieces[: last + 1], f"\n\n{before}{after}", *pieces[end:]]


def _asked_earlier(pieces: Sequence[Piece]) -> str:
    """The last text that the next speaker, who has every second turn, wrote without chunks."""
    turns: list[list[Piece]] = [[]]
    for piece in pieces:
        if isinstance(piece, Markup):
            turns.append([])
        else:
            turns[-1].append(piece)
    # The last one is the turn that follows.
    for turn in turns[-3::-2]:
        text = "".join(piece for piece in turn if isinstance(piece, str))
        if text.split() and not any(isinstance(piece, Chunk) for piece in turn):
            return text
    return ""


def before_first_turn(tokenizer: Any, messages: Sequence[Message]) -> list[Markup | str]:
    """The part of a chat that does not depend on its turns: system prompt and template.

    It ends at the first chunk, if the system prompt has one.

    Raises:
        ValueError: as `render`.
    """
    first = next((i for i, message in enumerate(messages) if message.role != "system"), None)
    return leading(
        render(
            tokenizer,
            [
                Message(message.role, (Chunk("?"),)) if i == first else message
                for i, message in enumerate(messages)
            ],
        )
    )


def opening(tokenizer: Any) -> str:
    """The text that every chat of this tokenizer starts with: the natural sink."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer_bos(tokenizer)
    try:
        first = render(tokenizer, [Message("system", ("a",)), Message("user", ("a",))])[0]
    except ValueError:  # Gemma's template, for example, has no system role
        first = render(tokenizer, [Message("user", ("a",))])[0]
    if not isinstance(first, Markup):
        return tokenizer_bos(tokenizer)
    return first.text


def _behind_bos(tokenizer: Any, content: Sequence[Piece]) -> list[Piece]:
    bos = tokenizer_bos(tokenizer)
    return [*([Markup(bos)] if bos else []), *content]


def tokenizer_bos(tokenizer: Any) -> str:
    """The BOS, if the tokenizer puts it before texts."""
    starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if starts and tokenizer.bos_token else ""


def joined(content: Sequence[str | Chunk]) -> tuple[str | Chunk, ...]:
    """Neighbouring texts as one, so that they are tokenized as one; empty ones dropped."""
    joined: list[str | Chunk] = []
    for piece in content:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return tuple(joined)
