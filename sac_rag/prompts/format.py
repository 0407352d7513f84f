"""PromptFormat: how a question and its chunks become the turns of a chat, or plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sac_rag.chunk import Chunk
from sac_rag.prompts.chat import (
    Markup,
    Message,
    Piece,
    joined,
    leading,
    opening,
    plain,
    render,
    tokenizer_bos,
)

_SYSTEM = "Answer the question from the passages. Be brief."

# Stands for a chunk in a text.
_CHUNK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class PromptFormat:
    """How a question and its chunks become a prompt: the turns of a chat, or plain text.

    A plain prompt is the prefix followed by the user's text, without any chat template. Its prefix
    can show a small model by examples what an answer looks like (`SPANS`).

    Attributes:
        system: System prompt of a chat; "" for none. A plain prompt has none: its default is "".
            {chunks} may be here instead of in `user`.
        chunk: Plain text around a chunk, with {number} from 1, {title}, {id} and {chunk}.
        user: The user's turn, with {chunks} and {question}.
        separator: Plain text between chunks.
        prefix: Beginning of every plain prompt, literally: braces in it are not filled in.
        chat: Whether the prompt is a chat in the tokenizer's template.
        raw: Whether the fields of a plain prompt are a complete template: special tokens in them
            are recognised, the BOS must be among them, and the question is tokenized separately.
        stop: Texts at which an answer to a prompt of this format ends, unless the Decoding has
            stop texts.

    Raises:
        ValueError: if a placeholder is missing, or a field has the wrong type or belongs to the
            other kind of prompt.
    """

    system: str = _SYSTEM
    chunk: str = "{title}\n{chunk}"
    user: str = "{chunks}\n\nQuestion: {question}"
    separator: str = "\n\n"
    prefix: str = ""
    chat: bool = True
    raw: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("chat", "raw"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"the prompt format's {name!r} must be a bool, was: {getattr(self, name)!r}"
                )
        if not self.chat and self.system == _SYSTEM:
            object.__setattr__(self, "system", "")
        stop = tuple(self.stop) if isinstance(self.stop, (list, tuple)) else (self.stop,)
        object.__setattr__(self, "stop", stop)
        for name in ("system", "chunk", "user", "separator", "prefix"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(
                    f"the prompt format's {name!r} must be a str, was: {getattr(self, name)!r}"
                )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(
                "the prompt format's 'stop' must be made of texts that are not empty, "
                f"was: {self.stop!r}"
            )
        for name, needed in (
            ("chunk", "{chunk}"),
            ("user", "{question}"),
            ("system" if "{chunks}" in self.system else "user", "{chunks}"),
        ):
            if getattr(self, name).count(needed) != 1:
                raise ValueError(
                    f"the prompt format's {name!r} must contain {needed} once, "
                    f"was: {getattr(self, name)!r}"
                )
        if "{chunks}" in self.system and "{chunks}" in self.user:
            raise ValueError(
                "the prompt format must contain {chunks} once, in 'system' or 'user', was in both"
            )
        if self.chat and self.prefix:
            raise ValueError(
                "a chat begins with its template's own words, so it has no 'prefix', was: "
                f"{self.prefix!r:.100}; put it into 'system', or give chat=False for a plain prompt"
            )
        if self.chat and self.raw:
            raise ValueError(
                "a chat is in its template's words, so it cannot be 'raw'; give chat=False for a "
                "plain prompt"
            )
        if self.system and not self.chat:
            raise ValueError(
                f"a plain prompt (chat=False) has no 'system', was: {self.system!r:.100}; "
                "put it into 'prefix'"
            )

    def pieces(self, tokenizer: Any, question: str, chunks: Sequence[Chunk]) -> list[Piece]:
        """The prompt that asks a question about chunks, in their order.

        Args:
            tokenizer: An HF tokenizer, for its chat template and its BOS.
            question: The question.
            chunks: May be empty.

        Returns:
            Pieces in reading order, the last of them text.

        Raises:
            ValueError: if the question is empty, or the chat template refuses the messages.
        """
        if self.chat:
            return render(tokenizer, self.messages(question, chunks))
        if self.raw:
            return self._raw(question, chunks)
        _require_text(question)
        return plain(
            tokenizer, [self.prefix, *self._filled(self.user, {"question": question}, chunks)]
        )

    def messages(self, question: str, chunks: Sequence[Chunk]) -> list[Message]:
        """The chat that asks a question about chunks, in their order.

        Raises:
            ValueError: if the question is empty, or this is the format of a plain prompt.
        """
        if not self.chat:
            raise ValueError("a plain prompt (chat=False) is no chat; use `pieces`")
        _require_text(question)
        system = self._filled(self.system, {}, chunks)
        user = self._filled(self.user, {"question": question}, chunks)
        # Without chunks the question needs no heading.
        turns = [Message("system", joined(system))] if self.system else []
        return [*turns, Message("user", joined(user) if chunks else (question,))]

    def passages(self, chunks: Sequence[Chunk]) -> list[str | Chunk]:
        """The chunks with the text around them: what replaces {chunks} in a prompt."""
        if isinstance(chunks, str):
            raise TypeError("chunks must be several Chunks, was: one str; put a Chunk in a list")
        passages: list[str | Chunk] = []
        for number, chunk in enumerate(chunks, start=1):
            passages += [self.separator] if passages else []
            after = _fill(self.chunk.split("{chunk}")[1], _names(chunk, number))
            passages += [self._heading(chunk, number), chunk, after]
        return passages

    def matches(self, content: Sequence[str | Chunk]) -> bool:
        """Whether a text is a plain prompt of this format, with chunks as such or as text.

        It is if it begins and ends as every such prompt does and has the text between chunks and
        question. Nothing matches a chat format, a raw one, or one in which prompts share neither
        their first nor their last words.
        """
        if self.chat or self.raw:
            return False
        before, between, after = re.split(r"\{(?:chunks|question)\}", self.user)
        begins = self.prefix + before
        if not (begins + after).strip():
            return False
        # The text of a chunk must not match words of the format.
        text = "".join(piece if isinstance(piece, str) else _CHUNK for piece in content)
        rest = text.removeprefix(begins)
        return (
            text.startswith(begins)
            and rest.endswith(after)
            and not rest.endswith(_CHUNK)  # the answer continues text
            and between in rest[: len(rest) - len(after)]
        )

    def beginning(self, tokenizer: Any) -> list[Markup | str]:
        """The part of the prefix that does not depend on question or chunks.

        Raises:
            ValueError: if the chat template refuses the messages.
        """
        return leading(self.pieces(tokenizer, "?", [Chunk("?")]))

    def opening(self, tokenizer: Any) -> str:
        """The start of every prompt, or of a plain one's first example, up to the chunk's text.

        It is the natural sink of a compressor whose chunks are in such prompts: short, and ending
        in the words before a chunk.
        """
        if self.chat:
            return opening(tokenizer)
        heading = self._heading(Chunk("text"), 1)
        begins = self.user.split("{chunks}")[0] + heading
        text = self.prefix + begins
        end = text.find(begins) + len(begins) if begins else len(text)
        return text[:end] if self.raw else tokenizer_bos(tokenizer) + text[:end]

    def to_json(self) -> str:
        """The fields as JSON, one per line."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PromptFormat:
        """Reads the result of `to_json`.

        Raises:
            ValueError: if it is not a JSON object, or has a field unknown to this version.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a prompt format must be JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"a prompt format must be a JSON object, was: {values!r:.80}")
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown fields in a prompt format: {', '.join(unknown)}; "
                "it was written by a newer sac_rag: upgrade"
            )
        return cls(**values)

    def _filled(
        self, words: str, fields: dict[str, Any], chunks: Sequence[Chunk]
    ) -> list[str | Chunk]:
        """The text of a turn with its fields filled in and {chunks} replaced by the passages."""
        before, *after = words.split("{chunks}")
        passages = self.passages(chunks) if after else []
        return [_fill(before, fields), *passages, *(_fill(words, fields) for words in after)]

    def _raw(self, question: str, chunks: Sequence[Chunk]) -> list[Piece]:
        """The prompt with the text of its fields as markup, separate from the caller's text."""
        _require_text(question)
        pieces: list[Piece] = [Markup(self.prefix)]
        before, after = self.user.split("{chunks}")
        for words, then in ((before, self.passages(chunks)), (after, [])):
            head, *tail = words.split("{question}")
            pieces += [Markup(head), *((question, Markup(tail[0])) if tail else ()), *then]
        return [piece for piece in pieces if piece not in ("", Markup(""))]

    def _heading(self, chunk: Chunk, number: int) -> str:
        heading = _fill(self.chunk.split("{chunk}")[0], _names(chunk, number))
        # Without a title its line is dropped.
        return heading if heading.strip() else ""


# Answers are spans of the text: after these examples a small model answers with a few words of it,
# where in a chat it answers with whole sentences.
SPANS = PromptFormat(
    prefix="""\
Answer each question with a few words from the text.

Text:
The harbour of Port Ellery was dredged in 1931 by the engineer Mabel Strand, and its lighthouse, \
41 metres tall, was painted in red and white bands three years later.
Question: Who dredged the harbour?
Answer: Mabel Strand
Question: How tall is the lighthouse?
Answer: 41 metres

Text:
Barley is sown in March in the upper valley. Farmers sell the straw to the paper mills of Orsk, \
which stopped importing reed after the flood of 1987.
Question: What do farmers sell to the mills?
Answer: straw
Question: Why did the mills stop importing reed?
Answer: the flood of 1987

""",
    chat=False,
    chunk="Text:\n{chunk}",
    separator="\n\n",
    user="{chunks}\nQuestion: {question}\nAnswer:",
    stop=("\n",),
)


def _require_text(question: str) -> None:
    if not question.strip():
        raise ValueError("the question must have text, was: empty or only white space")


def _names(chunk: Chunk, number: int) -> dict[str, Any]:
    return {"number": number, "title": chunk.title or "", "id": chunk.id or ""}


def _fill(template: str, fields: dict[str, Any]) -> str:
    """Replaces {name}; unknown names and braces in the values stay unchanged."""
    return re.sub(r"\{(\w+)\}", lambda m: str(fields.get(m[1], m[0])), template)
