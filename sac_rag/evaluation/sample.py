"""Sample, questions drawn for a measurement with the passages of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sac_rag.chunk import Chunk
from sac_rag.evaluation.passages import PassagePool
from sac_rag.evaluation.questions import QAExample, Question


@dataclass(frozen=True)
class Trial:
    """A question as it is asked.

    Attributes:
        number: Of the question among all of the data, from 0.
        question: With its gold answers.
        chunks: The passages it is asked about, in the prompt's order.
    """

    number: int
    question: Question
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Sample:
    """Questions drawn for a measurement: the same for every system.

    Attributes:
        trials: In the order they were drawn.
        k: Number of chunks asked for per question.
        seed: Of the questions, their distractors and their order.
        recall: Share of trials with a gold passage among their chunks, where those were retrieved;
            None where they were given.
    """

    trials: tuple[Trial, ...]
    k: int
    seed: int
    recall: float | None = None


def draw(
    examples: Iterable[QAExample],
    *,
    k: int = 1,
    limit: int | None = None,
    seed: int = 0,
    close: bool = False,
    retrieve: Callable[[str, int], Sequence[Chunk]] | None = None,
) -> Sample:
    """Draws questions with the passages of each: its gold ones among distractors, or retrieved.

    A question's passages depend on its number, k and the seed alone, not on the limit.

    Args:
        examples: All of the data: distractors also come from those whose questions are not drawn.
        k: Passages per question, its gold ones among them.
        limit: Questions to draw; None for all, in the data's order.
        seed: Makes it repeatable; not negative.
        close: Whether distractors are those with the most words in common with the question; see
            `PassagePool.passages_for`.
        retrieve: Returns the k passages that a search finds for a question, best first. Default:
            the gold passages among distractors.

    Raises:
        ValueError: if there is no question, k or limit is below 1, or the seed below 0.
    """
    examples = list(examples)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, was: {limit}")
    if seed < 0:  # Random takes its absolute value
        raise ValueError(f"seed must be at least 0, was: {seed}")
    pool = PassagePool(examples)
    asked = [(example, question) for example in examples for question in example.questions]
    if not asked:
        raise ValueError("expected at least one question with an answer, the data has none")
    numbers: Sequence[int] = range(len(asked))
    if limit is not None:
        numbers = random.Random(seed).sample(numbers, min(limit, len(asked)))
    trials = []
    num_hits = 0
    for number in numbers:
        example, question = asked[number]
        if retrieve is None:
            asking = replace(example, questions=(question,)) if close else example
            chunks = pool.passages_for(asking, k, random.Random(f"{seed} {number}"), close=close)
        else:
            chunks = list(retrieve(question.text, k))
            num_hits += not {c.text for c in chunks}.isdisjoint(c.text for c in example.gold)
        trials.append(Trial(number, question, tuple(chunks)))
    recall = num_hits / len(trials) if retrieve is not None else None
    return Sample(tuple(trials), k, seed, recall)


def passages_of(examples: Iterable[QAExample]) -> list[Chunk]:
    """All passages of the data, no text twice: what a search for answers goes through."""
    every = (chunk for example in examples for chunk in (*example.gold, *example.distractors))
    return list({chunk.text: chunk for chunk in every}.values())
