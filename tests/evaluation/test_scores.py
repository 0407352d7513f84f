"""Scores equal the formulas they are named after."""

from __future__ import annotations

import pytest

from sac_rag.evaluation.scores import (
    exact_match,
    f1,
    interval,
    paired_interval,
    raw_exact_match,
    rouge1,
)


# By the formula of the official script (2.0, whose F1 of two empty answers is 1).
@pytest.mark.parametrize(
    ("prediction", "golds", "em", "expected"),
    [
        ("The  Titanic!", ["titanic"], 1.0, 1.0),
        ("an apple a day", ["apple day"], 1.0, 1.0),
        ("15 April 1912", ["April 15, 1912"], 0.0, 1.0),
        ("in 1912", ["1912"], 0.0, 2 / 3),
        ("1912", ["in 1912", "April 1912", "1912"], 1.0, 1.0),
        ("", ["nothing"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
        ("U.S.", ["US"], 1.0, 1.0),
        ("forty-one", ["forty one"], 0.0, 0.0),
        ("to to be", ["to be or not to be"], 0.0, 2 * 1 * (3 / 6) / (1 + 3 / 6)),
        ("Zürich", ["Zurich"], 0.0, 0.0),
        ("theory", ["ory"], 0.0, 0.0),
        ("rock'n'roll", ["rocknroll"], 1.0, 1.0),
        ("“quoted”", ["quoted"], 0.0, 0.0),
    ],
)
def test_em_and_f1_are_squads(
    prediction: str, golds: list[str], em: float, expected: float
) -> None:
    assert exact_match(prediction, golds) == em
    assert f1(prediction, golds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "golds", "expected", "raw"),
    [
        ("The Titanic", ["titanic"], 2 * 0.5 / 1.5, 0.0),
        ("titanic", ["The Titanic", "titanic"], 1.0, 1.0),
        (" titanic\n", ["titanic"], 1.0, 1.0),
        ("forty-one", ["forty one"], 1.0, 0.0),
        ("a b", ["b c"], 0.5, 0.0),
        ("", ["x"], 0.0, 0.0),
    ],
)
def test_rouge_and_raw_em_keep_articles(
    prediction: str, golds: list[str], expected: float, raw: float
) -> None:
    assert rouge1(prediction, golds) == pytest.approx(expected)
    assert raw_exact_match(prediction, golds) == raw


def test_a_paired_interval_is_that_of_the_differences() -> None:
    hard = [0.0, 0.1, 0.9, 1.0] * 25
    better = [value + 0.05 for value in hard]
    low, high = paired_interval(better, hard)
    assert low == pytest.approx(0.05)
    assert high == pytest.approx(0.05)
    assert interval(better)[1] - interval(better)[0] > 0.1
    with pytest.raises(ValueError, match="argument 2 is longer"):
        paired_interval([1.0], [1.0, 2.0])
