"""Scores equal those worked out by hand from SQuAD's rules."""

from __future__ import annotations

import pytest

from sac_rag.evaluation.scores import contains, exact_match, f1, interval


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "overlap", "contained"),
    [
        ("The Owls!", ["owls"], 1.0, 1.0, 1.0),
        ("barn owls", ["owls"], 0.0, 2 / 3, 1.0),  # precision 1/2, recall 1
        ("barn owls of Orsk", ["owls at night", "the barn owls"], 0.0, 2 / 3, 1.0),  # 2/4, 2/2
        ("a cat", ["owls"], 0.0, 0.0, 0.0),
        ("", ["owls"], 0.0, 0.0, 0.0),
        ("owls owls", ["owls owls owls"], 0.0, 0.8, 0.0),  # 2/2, 2/3
        ("41", ["41 metres", "41"], 1.0, 1.0, 1.0),
        ("141", ["41"], 0.0, 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0, 0.0),  # both are nothing, once normalised
    ],
)
def test_scores_are_those_worked_out_by_hand(
    prediction: str, golds: list[str], em: float, overlap: float, contained: float
) -> None:
    assert exact_match(prediction, golds) == em
    assert f1(prediction, golds) == pytest.approx(overlap)
    assert contains(prediction, golds) == contained


def test_an_interval_holds_the_mean_and_narrows_with_more_values() -> None:
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 1000
    low, high = interval(few)
    assert low < 0.5 < high
    assert interval(few) == (low, high) != interval(few, seed=1)
    narrow = interval(many)
    # 1.96 standard errors of a fair coin on each side.
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * 0.5 / 2000**0.5, rel=0.1)
    assert interval([0.3]) == (0.3, 0.3)
    with pytest.raises(ValueError, match="at least one value, got none"):
        interval([])
