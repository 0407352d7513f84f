"""Scores of predicted answers against gold ones.

Answers are compared as SQuAD compares them (arXiv 1606.05250): lower case, without punctuation and
articles. ROUGE-1 and raw EM, which neither leave out articles nor normalise, are those of the SAC
paper, for comparison with its tables.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sac_rag.evaluation.questions import normalised, says

_RESAMPLES = 2000
_ROUGE_WORD = re.compile(r"[a-z0-9]+")


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the prediction is one of the golds, once both are normalised, else 0.0."""
    return float(normalised(prediction) in map(normalised, golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, against the gold where it is highest."""
    return max((_f1(normalised(prediction).split(), gold) for gold in golds), default=0.0)


def rouge1(prediction: str, golds: Sequence[str]) -> float:
    """ROUGE-1 F: F1 of lower-case words, against the gold where it is highest.

    Words are of letters and digits, not stemmed. Source: Lin 2004, tokens of rouge-score.
    """
    words = _ROUGE_WORD.findall(prediction.lower())
    expected = (_ROUGE_WORD.findall(gold.lower()) for gold in golds)
    return max((_overlap(words, gold) for gold in expected), default=0.0)


def raw_exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the prediction, without white space around it, equals one of the golds, else 0.0."""
    return float(prediction.strip() in {gold.strip() for gold in golds})


def contains(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the prediction contains one of the golds as whole words, normalised, else 0.0."""
    return float(says(normalised(prediction), golds))


def interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of a mean: percentiles of the means of 2,000 resamples.

    Args:
        values: One per question, at least one.
        seed: Equal seeds give equal intervals.

    Raises:
        ValueError: if there are no values.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value, got none")
    rng = np.random.default_rng(seed)
    scores = np.asarray(values, dtype=float)
    means = [rng.choice(scores, len(scores)).mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_interval(
    values: Sequence[float], others: Sequence[float], *, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean difference of two systems on the same questions.

    Narrower than two intervals side by side, since what makes a question hard is in both.

    Args:
        values: One per question.
        others: Of the other system, in the same order; subtracted.
        seed: Equal seeds give equal intervals.

    Raises:
        ValueError: if the numbers of values differ, or there are none.
    """
    differences = [one - other for one, other in zip(values, others, strict=True)]
    return interval(differences, seed=seed)


def _f1(words: list[str], gold: str) -> float:
    return _overlap(words, normalised(gold).split())


def _overlap(words: list[str], expected: list[str]) -> float:
    """Harmonic mean of precision and recall of words."""
    if not words or not expected:
        return float(words == expected)
    common = (Counter(words) & Counter(expected)).total()
    return 2 * common / (len(words) + len(expected))
