"""Questions and prose to rows to learn from, in batches. Knows nothing of models or losses."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from sac_rag.chunk import Chunk
from sac_rag.generator import Generator
from sac_rag.questions import Question
from sac_rag.template import Markup, Piece, PromptFormat, leading

# Of prose, in tokens.
SHORTEST_TEXT = 32
# What stands before a text that is to be repeated.
_AGAIN = "\n\nRepeat the text:\n"


@dataclass(frozen=True)
class Source:
    """A chunk to be compressed.

    Attributes:
        ids: Token ids.
        learns: Whether gradients flow into its encoding; a distractor can do without.
    """

    ids: tuple[int, ...]
    learns: bool = True


@dataclass(frozen=True)
class Target:
    """A text that is read behind the chunks, and what of it is to be predicted.

    Attributes:
        ids: Token ids.
        predicted: How many of its last tokens count in the loss, all of them but the first at most.
    """

    ids: tuple[int, ...]
    predicted: int


RowPart: TypeAlias = tuple[int, ...] | Source


@dataclass(frozen=True)
class Row:
    """One prompt, behind the prefix that all prompts share, with all that is asked of it.

    Attributes:
        parts: Chunks, and plain text as token ids, in reading order.
        targets: Each continues the same parts; none sees another.
    """

    parts: tuple[RowPart, ...]
    targets: tuple[Target, ...]

    @property
    def sources(self) -> list[Source]:
        """The chunks, in reading order."""
        return [part for part in self.parts if isinstance(part, Source)]

    @property
    def num_encoded(self) -> int:
        """Tokens the encoder reads."""
        return sum(len(source.ids) for source in self.sources)

    @property
    def num_decoded(self) -> int:
        """Tokens the frozen LM reads."""
        plain = sum(len(part) for part in self.parts if not isinstance(part, Source))
        return plain + sum(len(target.ids) for target in self.targets)


class RowMaker:
    """Makes rows in the very prompt in which the compressor will be used.

    Attributes:
        prefix_ids: Tokens that every row's prompt begins with.

    Args:
        generator: Whose tokens and special tokens count.
        format: The prompt's. Questions must come after the chunks: they share the encoding.

    Raises:
        ValueError: if the question stands before a chunk.
    """

    def __init__(self, generator: Generator, format: PromptFormat) -> None:
        self._generator = generator
        self._format = format
        pieces, _ = self._pieces("one question", [Chunk("a"), Chunk("b")])
        if pieces != self._pieces("another question", [Chunk("a"), Chunk("b")])[0]:
            raise ValueError(
                "training needs a prompt format in which the question stands after the chunks, "
                f"was: user={format.user!r}"
            )
        self._beginning = leading(pieces)
        self.prefix_ids = tuple(i for piece in self._beginning for i in self._tokens(piece))
        ends = sorted(generator.eos_ids)[:1]
        self._end = () if format.stop else tuple(ends)

    def ask(
        self,
        chunks: Sequence[Chunk],
        questions: Sequence[Question],
        *,
        learns: Sequence[bool] | None = None,
    ) -> Row:
        """All questions about the same chunks, the answers to be predicted.

        Args:
            chunks: In reading order.
            questions: Each with at least one answer, of which the first counts.
            learns: Which chunks get gradients. Default: all.
        """
        flags = iter(learns or [True] * len(chunks))
        shared, _ = self._pieces(questions[0].text, chunks)
        parts: list[RowPart] = []
        for piece in shared[len(self._beginning) :]:
            if isinstance(piece, Chunk):
                parts.append(Source(tuple(self._generator.tokenize(piece.text)), next(flags)))
            else:
                parts.append(self._tokens(piece))
        return Row(tuple(parts), tuple(self._target(question, chunks) for question in questions))

    def continue_text(self, text: str, chunk_tokens: int, *, repeat: bool = False) -> Row | None:
        """A text whose first part is compressed and whose rest is to be predicted.

        Args:
            text: Prose.
            chunk_tokens: Longest part compressed, and longest rest, in tokens.
            repeat: Whether the compressed part itself is to be predicted, too.

        Returns:
            None for a text of fewer than SHORTEST_TEXT tokens.
        """
        ids = tuple(self._generator.tokenize(text))[: 2 * chunk_tokens]
        if len(ids) < SHORTEST_TEXT:
            return None
        half = min(len(ids) // 2, chunk_tokens)
        targets = [Target(ids[half:], len(ids) - half - 1)]
        if repeat:
            again = tuple(self._generator.tokenize(_AGAIN))
            targets.append(Target(again + ids[:half], half))
        return Row((Source(ids[:half]),), tuple(targets))

    def _target(self, question: Question, chunks: Sequence[Chunk]) -> Target:
        _, tail = self._pieces(question.text, chunks)
        last = tail[-1].text if isinstance(tail[-1], Markup) else tail[-1]
        between = "" if last[-1:].isspace() else " "
        stop = self._format.stop[0] if self._format.stop else ""
        answer = tuple(self._generator.tokenize(f"{between}{question.answers[0]}{stop}"))
        answer += self._end
        asked = tuple(i for piece in tail for i in self._tokens(piece))
        return Target(asked + answer, len(answer))

    def _pieces(
        self, question: str, chunks: Sequence[Chunk]
    ) -> tuple[list[Piece], list[Markup | str]]:
        """The prompt up to its last chunk, and what follows."""
        pieces = self._format.pieces(self._generator.tokenizer, question, chunks)
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
    """Groups rows of like length, so that a batch is padded little, in random order.

    Args:
        rows: Read `window` at a time.
        batch_tokens: Most padded tokens, encoded and decoded together, in a batch; a row longer
            than that is a batch of its own.
        rng: Equal states give equal batches.
        window: Rows sorted together.
    """
    stream = iter(rows)
    while group := list(islice(stream, window)):
        group.sort(key=lambda row: (row.num_encoded, row.num_decoded))
        batches: list[list[Row]] = [[]]
        for row in group:
            grown = [*batches[-1], row]
            if batches[-1] and padded_tokens(grown) > batch_tokens:
                batches.append([row])
            else:
                batches[-1] = grown
        rng.shuffle(batches)
        yield from batches


def padded_tokens(rows: Sequence[Row]) -> int:
    """Tokens that a batch takes, padding included."""
    longest = max(len(source.ids) for row in rows for source in row.sources)
    encoded = longest * sum(len(row.sources) for row in rows)
    return encoded + len(rows) * max(row.num_decoded for row in rows)
