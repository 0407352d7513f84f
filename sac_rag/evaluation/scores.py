"""Scores of predicted answers against gold ones.

Answers are compared as SQuAD compares them (arXiv 1606.05250): lower case, without punctuation and
articles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sac_rag.evaluation.questions import normalised, says

_RESAMPLES = 2000


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the prediction is one of the golds, once both are normalised, else 0.0."""
    return float(normalised(prediction) in map(normalised, golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, against the gold where it is highest."""
    return max((_f1(normalised(prediction).split(), gold) for gold in golds), default=0.0)


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


def _f1(words: list[str], gold: str) -> float:
    expected = normalised(gold).split()
    if not words or not expected:
        return float(words == expected)
    common = (Counter(words) & Counter(expected)).total()
    return 2 * common / (len(words) + len(expected))
