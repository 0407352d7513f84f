"""Timing: warm-up, repetition in turn, and the median or the best of what was measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

T = TypeVar("T")


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(
    ways: Sequence[Callable[[], T]], repeats: int, *, warm_up: bool = False
) -> list[list[T]]:
    """Results of calling several functions in turn, so that a disturbance meets all of them.

    Args:
        ways: What is called; each returns what is measured of it.
        repeats: How often each is called.
        warm_up: Whether each is called once before, its result dropped.

    Returns:
        The results of each function, in order.
    """
    rounds = [[way() for way in ways] for _ in range(warm_up + repeats)][warm_up:]
    return [list(results) for results in zip(*rounds, strict=True)]


@dataclass(frozen=True)
class Times:
    """Seconds of repeated calls of one function."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The least disturbed call."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The usual call."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, object]:
        """Median, spread and all seconds, as JSON values."""
        spread = {"median_s": self.median, "best_s": self.best, "worst_s": max(self.seconds)}
        return {**spread, "seconds": list(self.seconds)}

    def speed_relative_to(self, other: Times) -> float:
        """Median of how much faster this was than the other, call by call, taken in turn."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def time_in_turn(
    ways: Sequence[Callable[[], object]], repeats: int, *, warm_up: bool = False
) -> list[Times]:
    """Times several functions in turn; see `in_turn`."""
    timed = [partial(seconds_of, way) for way in ways]
    return [Times(tuple(seconds)) for seconds in in_turn(timed, repeats, warm_up=warm_up)]


def time_repeated(work: Callable[[], object], repeats: int) -> Times:
    """Times one function."""
    return time_in_turn([work], repeats)[0]


def time_over(work: Callable[[T], object], items: Iterable[T]) -> Times:
    """Times one function, called with each item."""
    return Times(tuple(seconds_of(partial(work, item)) for item in items))
