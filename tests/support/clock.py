"""A clock that a test sets, so that no claim depends on how busy the machine is."""

from __future__ import annotations

TICK_S = 0.001


class Clock:
    """Shows the seconds that a test has added, and a thousandth more at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += TICK_S
        return self.now
