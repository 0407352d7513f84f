"""The tests' own Ctrl-C comes at every line, and finds what is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from support.interrupts import interrupted, interruptions

LOCK = threading.Lock()


def locks_by_hand() -> None:
    LOCK.acquire()
    try:
        sum(range(3))
    finally:
        LOCK.release()


def locks_with() -> int:
    with LOCK:
        return sum(range(3))


@contextmanager
def locked() -> Iterator[None]:
    with LOCK:
        yield


def locks_by_generator() -> int:
    with locked():
        return sum(range(3))


def swallow() -> None:
    with suppress(BaseException):
        sum(range(3))


def test_an_acquire_before_its_try_is_found_and_a_with_is_not() -> None:
    left_locked = []
    for line in interruptions(locks_by_hand, inside=[locks_by_hand]):
        if LOCK.locked():
            left_locked.append(line)
            LOCK.release()
    assert left_locked
    for action in (locks_with, locks_by_generator):
        for _ in interruptions(action, inside=[locks_with, locked, locks_by_generator]):
            assert not LOCK.locked()


def test_every_line_has_its_turn_and_the_last_run_is_whole() -> None:
    finished: list[int] = []

    def count() -> None:
        done = 0
        for _ in range(3):
            done += 1
        finished.append(done)

    lines = list(interruptions(count, inside=[count]))
    assert lines == list(range(len(lines))) and len(lines) >= 8
    assert finished == [3]
    assert list(interruptions(count, inside=[count], stride=3)) == lines[::3]


def test_a_swallowed_interrupt_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"test_interrupts.py:\d+ was swallowed"):
        interrupted(swallow, [swallow], at=1)
    assert interrupted(swallow, [swallow], at=1, swallows=True)
