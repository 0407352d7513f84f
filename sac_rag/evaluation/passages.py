"""PassagePool, gold passages among distractors."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from sac_rag.chunk import Chunk
from sac_rag.evaluation.questions import QAExample, normalised, says

T = TypeVar("T")


class PassagePool:
    """Passages of many examples, from which distractors are drawn.

    Args:
        examples: Their gold passages and distractors are the pool.
    """

    def __init__(self, examples: Iterable[QAExample]) -> None:
        passages: dict[str, Chunk] = {}
        articles: dict[str, dict[str, Chunk]] = {}
        for example in examples:
            gold = {chunk.text: chunk for chunk in example.gold}
            passages |= gold | {chunk.text: chunk for chunk in example.distractors}
            if example.article is not None:
                articles.setdefault(example.article, {}).update(gold)
        self._passages = list(passages.values())
        self._articles: dict[str | None, list[Chunk]] = {
            name: list(by_text.values()) for name, by_text in articles.items()
        }
        self._normalised: dict[str, str] = {}
        self._index: Any = None

    def passages_for(
        self, example: QAExample, k: int, rng: random.Random, *, close: bool = False
    ) -> list[Chunk]:
        """The gold passages of an example among distractors, in random order.

        Distractors are the example's own; if those are too few, passages of the same article, then
        any. Passages that contain one of the example's answers come last.

        Args:
            example: Need not be of this pool.
            k: Number of passages. With more gold ones than that, the first k of them.
            rng: Equal states give equal passages.
            close: Whether passages with the most words in common with the example's questions, as
                a search returns them, are taken before all others. Needs the package bm25s.

        Returns:
            k passages, or fewer if the pool has no more, no text twice.

        Raises:
            ValueError: if k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, was: {k}")
        chosen = {chunk.text: chunk for chunk in example.gold[:k]}
        excluded = {chunk.text for chunk in example.gold}
        answers = [answer for question in example.questions for answer in question.answers]
        answering: list[Chunk] = []

        def take(source: Iterable[Chunk], may_answer: bool) -> None:
            for chunk in source:
                if len(chosen) >= k:
                    return
                if chunk.text in chosen or chunk.text in excluded:
                    continue
                if may_answer or not says(self._normal(chunk.text), answers):
                    chosen[chunk.text] = chunk
                else:
                    answering.append(chunk)

        if close:
            take(self._closest(example, 4 * k), may_answer=False)
        take(_shuffled(example.distractors, rng), may_answer=True)
        take(_shuffled(self._articles.get(example.article, ()), rng), may_answer=False)
        take(_shuffled(self._passages, rng), may_answer=False)
        take(answering, may_answer=True)
        passages = list(chosen.values())
        rng.shuffle(passages)
        return passages

    def _closest(self, example: QAExample, count: int) -> list[Chunk]:
        """Passages by BM25 with the words of the example's questions, the closest first."""
        import bm25s  # of the extras "train" and "eval"

        if self._index is None:
            logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s sets DEBUG, with a handler
            self._index = bm25s.BM25()
            words = [self._normal(chunk.text).split() for chunk in self._passages]
            self._index.index(words, show_progress=False)
        asked = [word for q in example.questions for word in normalised(q.text).split()]
        known = [word for word in asked if word in self._index.vocab_dict]
        if not known:
            return []
        count = min(count, len(self._passages))
        numbers, _ = self._index.retrieve([known], k=count, show_progress=False)
        return [self._passages[number] for number in numbers[0]]

    def _normal(self, text: str) -> str:
        if text not in self._normalised:
            self._normalised[text] = normalised(text)
        return self._normalised[text]


def _shuffled(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Items in random order, at no cost for those that are never drawn."""
    moved: dict[int, int] = {}
    for last in range(len(items) - 1, -1, -1):
        drawn = rng.randint(0, last)
        yield items[moved.get(drawn, drawn)]
        moved[drawn] = moved.get(last, last)
