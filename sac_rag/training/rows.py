"""Rows: prompts with targets, made from questions and prose, and grouped into batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice, takewhile
from typing import TypeAlias

from sac_rag.chunk import Chunk
from sac_rag.compressors.anchor_selection import REPEAT_PROMPT
from sac_rag.evaluation.questions import Question
from sac_rag.lm.generator import Generator
from sac_rag.prompts.chat import Markup, Piece, leading, repeat_question
from sac_rag.prompts.format import PromptFormat
from sac_rag.training.prompts import DRAFT

SHORTEST_TEXT = 32  # tokens of prose


@dataclass(frozen=True)
class Source:
    """A chunk that is compressed.

    Attributes:
        ids: Token ids.
        learns: Whether gradients flow into its encoding.
    """

    ids: tuple[int, ...]
    learns: bool = True


@dataclass(frozen=True)
class Target:
    """A text behind the chunks, whose last tokens are predicted.

    Attributes:
        ids: Token ids.
        predicted: Number of last tokens that count in the loss; at most all except the first.
    """

    ids: tuple[int, ...]
    predicted: int


RowPart: TypeAlias = tuple[int, ...] | Source


@dataclass(frozen=True)
class Row:
    """One prompt, behind the prefix that all prompts share, with its targets.

    Attributes:
        parts: Chunks, and plain text as token ids, in reading order.
        targets: Branches of the prompt, which do not attend to one another.
    """

    parts: tuple[RowPart, ...]
    targets: tuple[Target, ...]

    @property
    def sources(self) -> list[Source]:
        """The chunks, in reading order."""
        return [part for part in self.parts if isinstance(part, Source)]

    @property
    def num_encoded(self) -> int:
        """Number of tokens that the encoder reads."""
        return sum(len(source.ids) for source in self.sources)

    @property
    def num_decoded(self) -> int:
        """Number of tokens that the frozen LM reads."""
        plain = sum(len(part) for part in self.parts if not isinstance(part, Source))
        return plain + sum(len(target.ids) for target in self.targets)


class RowMaker:
    """Makes rows in given prompts.

    Attributes:
        prefix_ids: Tokens that all rows begin with; none where there are several prompts.

    Args:
        generator: Gives the tokenizer and special tokens.
        formats: One prompt or several.
    """

    def __init__(
        self, generator: Generator, formats: PromptFormat | Sequence[PromptFormat]
    ) -> None:
        self._generator = generator
        self.formats = (formats,) if isinstance(formats, PromptFormat) else tuple(formats)
        beginnings = [
            leading(self._pieces(text, [Chunk("a", title=text)], format)[0])
            for format in self.formats
            for text in ("a question", "another")
        ]
        # Pieces that do not depend on the question and the titles.
        equal = takewhile(lambda pieces: len(set(pieces)) == 1, zip(*beginnings, strict=False))
        self._beginning = [pieces[0] for pieces in equal] if len(self.formats) == 1 else []
        self.prefix_ids = tuple(i for piece in self._beginning for i in self._tokens(piece))
        self._end = tuple(sorted(generator.eos_ids)[:1])

    def shares_chunks(self, prompt: int) -> bool:
        """Whether questions come after the chunks, and can therefore share them in one row."""
        format = self.formats[prompt]
        words = f"{format.system}{format.user}"
        return words.index("{chunks}") < words.index("{question}")

    def refines(self, prompt: int) -> bool:
        """Whether the prompt contains a draft of the answer."""
        return DRAFT in self.formats[prompt].user

    def rows(
        self,
        chunks: Sequence[Chunk],
        questions: Sequence[Question],
        *,
        prompt: int = 0,
        learns: Sequence[bool] | None = None,
        draft: str = "",
    ) -> list[Row]:
        """One row with all questions about the chunks, or one row each if they precede the chunks.

        Equal chunks of several rows are encoded once per batch. Arguments as for `ask`.
        """
        groups = [questions] if self.shares_chunks(prompt) else [[q] for q in questions]
        return [
            self.ask(chunks, group, prompt=prompt, learns=learns, draft=draft) for group in groups
        ]

    def ask(
        self,
        chunks: Sequence[Chunk],
        questions: Sequence[Question],
        *,
        prompt: int = 0,
        learns: Sequence[bool] | None = None,
        draft: str = "",
        ends: bool = True,
    ) -> Row:
        """One row with all questions about the same chunks, whose answers are the targets.

        Args:
            chunks: In reading order.
            questions: Each with at least one answer, of which the first is used.
            prompt: Index of the prompt.
            learns: Whether each chunk gets gradients. Default: all do.
            draft: Replaces {draft} in a prompt that refines an answer.
            ends: Whether the end of the answer is predicted too.

        Raises:
            ValueError: for several questions in a prompt where the question precedes a chunk.
        """
        if len(questions) > 1 and not self.shares_chunks(prompt):
            raise ValueError(
                "questions that precede the chunks cannot share a row, got "
                f"{len(questions)} of them for user={self.formats[prompt].user!r}; use `rows`"
            )
        format = self.formats[prompt]
        format = replace(format, user=format.user.replace(DRAFT, draft))
        flags = iter(learns or [True] * len(chunks))
        shared, _ = self._pieces(questions[0].text, chunks, format)
        parts: list[RowPart] = []
        for piece in shared[len(self._beginning) :]:
            if isinstance(piece, Chunk):
                parts.append(Source(tuple(self._generator.tokenize(piece.text)), next(flags)))
            else:
                parts.append(self._tokens(piece))
        return Row(
            tuple(parts),
            tuple(self._target(question, chunks, format, ends) for question in questions),
        )

    def continue_text(self, text: str, chunk_tokens: int, *, repeat: bool = False) -> Row | None:
        """A row whose first half is compressed and whose second half is predicted.

        Args:
            text: Prose.
            chunk_tokens: Most tokens of each half.
            repeat: Whether the compressed half is predicted, too.

        Returns:
            None for a text of fewer than SHORTEST_TEXT tokens.
        """
        ids = tuple(self._generator.tokenize(text))[: 2 * chunk_tokens]
        if len(ids) < SHORTEST_TEXT:
            return None
        half = min(len(ids) // 2, chunk_tokens)
        targets = [Target(ids[half:], len(ids) - half - 1)]
        if repeat:
            again = tuple(self._generator.tokenize(REPEAT_PROMPT))
            targets.append(Target(again + ids[:half], half))
        return Row((Source(ids[:half]),), tuple(targets))

    def _target(
        self, question: Question, chunks: Sequence[Chunk], format: PromptFormat, ends: bool
    ) -> Target:
        _, tail = self._pieces(question.text, chunks, format)
        last = tail[-1].text if isinstance(tail[-1], Markup) else tail[-1]
        between = "" if last[-1:].isspace() else " "
        stop = format.stop[0] if format.stop and ends else ""
        answer = tuple(self._generator.tokenize(f"{between}{question.answers[0]}{stop}"))
        if ends and not stop:
            answer += self._end
        prompt_end = tuple(i for piece in tail for i in self._tokens(piece))
        return Target(prompt_end + answer, len(answer))

    def _pieces(
        self, question: str, chunks: Sequence[Chunk], format: PromptFormat
    ) -> tuple[list[Piece], list[Markup | str]]:
        """The prompt up to its last chunk, and the rest."""
        # As prompts are answered.
        pieces = repeat_question(format.pieces(self._generator.tokenizer, question, chunks))
        tail: list[Markup | str] = []
        while not isinstance(pieces[-1], Chunk):
            tail.insert(0, pieces.pop())  # type: ignore[arg-type]
        return pieces, tail

    def _tokens(self, piece: Markup | str) -> tuple[int, ...]:
        if isinstance(piece, Markup):
            return tuple(self._generator.tokenize(piece.text, special=True))
        return tuple(self._generator.tokenize(piece))


def batched(
    rows: Iterable[Row], batch_tokens: int, rng: random.Random, *, window: int = 256
) -> Iterator[list[Row]]:
    """Groups rows of similar length into batches, in random order.

    Args:
        rows: Read `window` at a time.
        batch_tokens: Most padded tokens of a batch, encoded and decoded together; a longer row is a
            batch by itself.
        rng: Equal states give equal batches.
        window: Number of rows sorted together.
    """
    stream = iter(rows)
    while group := list(islice(stream, window)):
        group.sort(key=lambda row: (row.num_encoded, row.num_decoded))
        batches: list[list[Row]] = []
        size = PaddedSize()
        for row in group:
            grown = size.with_row(row)
            if not batches or grown.tokens > batch_tokens:
                batches.append([])
                grown = PaddedSize().with_row(row)
            batches[-1].append(row)
            size = grown
        rng.shuffle(batches)
        yield from batches


@dataclass(frozen=True)
class PaddedSize:
    """Number of tokens of a batch, padding included; equal chunks are encoded once.

    Attributes:
        chunks: Chunks of all rows.
        longest: Number of tokens of the longest chunk.
        rows: Number of rows.
        decoded: Most tokens that the frozen LM reads for a row.
    """

    chunks: frozenset[Source] = frozenset()
    longest: int = 0
    rows: int = 0
    decoded: int = 0

    @property
    def tokens(self) -> int:
        """Encoded and decoded tokens together."""
        return self.longest * len(self.chunks) + self.rows * self.decoded

    def with_row(self, row: Row) -> PaddedSize:
        """The size with one more row."""
        return PaddedSize(
            self.chunks.union(row.sources),
            max(self.longest, *(len(source.ids) for source in row.sources)),
            self.rows + 1,
            max(self.decoded, row.num_decoded),
        )


def padded_tokens(rows: Sequence[Row]) -> int:
    """Number of tokens of a batch, padding included."""
    return reduce(PaddedSize.with_row, rows, PaddedSize()).tokens
