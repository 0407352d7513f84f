"""Calls are counted and in turn; no test here depends on how long anything takes."""

from __future__ import annotations

import pytest

from sac_rag.benchmarks.timing import Times, in_turn, time_in_turn, time_over, time_repeated


def test_functions_are_called_in_turn_and_the_first_round_warms_up() -> None:
    calls: list[str] = []

    def call(name: str) -> int:
        calls.append(name)
        return len(calls)

    results = in_turn([lambda: call("a"), lambda: call("b")], 2, warm_up=True)
    assert calls == ["a", "b"] * 3
    assert results == [[3, 5], [4, 6]]
    assert in_turn([lambda: call("c")], 1) == [[7]]


def test_every_call_is_timed() -> None:
    numbers: list[int] = []
    (first, second) = time_in_turn([lambda: numbers.append(0), lambda: None], 4)
    assert (len(numbers), len(first.seconds), len(second.seconds)) == (4, 4, 4)
    assert len(time_repeated(lambda: None, 3).seconds) == 3
    assert len(time_over(numbers.append, [7, 8]).seconds) == 2
    assert numbers[-2:] == [7, 8]
    assert min(first.seconds) > 0


def test_figures_are_the_best_the_median_and_the_median_of_pairs() -> None:
    ours, theirs = Times((1.0, 5.0, 2.0)), Times((2.0, 5.0, 8.0))
    assert (ours.best, ours.median) == (1.0, 2.0)
    assert ours.speed_relative_to(theirs) == 2.0
    with pytest.raises(ValueError, match="longer"):
        ours.speed_relative_to(Times((1.0,)))
