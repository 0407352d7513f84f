"""Seconds of answering questions in one batch, beside answering them one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from sac_rag.benchmarks.contestants import Moments, from_anchors
from sac_rag.benchmarks.first_token import QUESTION, cut
from sac_rag.benchmarks.timing import Times, in_turn
from sac_rag.pipeline import SacRAG


@dataclass(frozen=True)
class BatchRow:
    """Times of answering the same questions in both ways.

    Attributes:
        questions: Number of questions, each with chunks of its own.
        k: Chunks of each.
        answer_tokens: Length of each answer.
        one_by_one: Seconds to the end of the last answer.
        together: The same in one batch.
    """

    questions: int
    k: int
    answer_tokens: int
    one_by_one: Times
    together: Times

    @property
    def faster(self) -> float:
        """How many times faster together: the median over repeats, each of which measures both."""
        return self.together.speed_relative_to(self.one_by_one)


def measure(
    rag: SacRAG,
    texts: Iterable[str],
    *,
    questions: int = 8,
    ks: Sequence[int] = (1, 4),
    answer_tokens: Sequence[int] = (4, 32),
    chunk_tokens: int = 510,
    repeats: int = 3,
) -> Iterator[BatchRow]:
    """Times both ways in turn, from chunks that the store has.

    Args:
        rag: The pipeline.
        texts: Prose to cut the chunks from.
        questions: Number of questions.
        ks: Numbers of chunks of each question.
        answer_tokens: Lengths of answers; each is a part of the longest one.
        chunk_tokens: Tokens of every chunk.
        repeats: Measurements of each way.

    Raises:
        ValueError: if there is too little prose.
    """
    chunks = cut(rag.generator, texts, questions * max(ks), chunk_tokens)
    rag.precompress(chunks)
    longest = max(answer_tokens)
    for k in ks:
        asked = [(QUESTION, chunks[at * k : (at + 1) * k]) for at in range(questions)]
        groups = [asked], [[question] for question in asked]
        ways = [partial(_answer, rag, group, longest) for group in groups]
        together, alone = in_turn(ways, repeats, warm_up=True)
        for tokens in answer_tokens:
            yield BatchRow(
                questions=questions,
                k=k,
                answer_tokens=tokens,
                one_by_one=_times(alone, tokens),
                together=_times(together, tokens),
            )


def _answer(
    rag: SacRAG, groups: Sequence[Sequence[tuple[str, Sequence[str]]]], tokens: int
) -> list[Moments]:
    """Answers groups of questions one after the other, those of a group together."""
    return [from_anchors(rag, group, tokens) for group in groups]


def _times(rounds: Sequence[Sequence[Moments]], tokens: int) -> Times:
    """Seconds that answers of this length took in each round."""
    return Times(tuple(sum(moments[tokens - 1] for moments in groups) for groups in rounds))
