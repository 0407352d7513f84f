"""Forks of a process with threads: what waits for them, and what is made again in the child."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count
from typing import Any, TypeAlias

_Act: TypeAlias = Callable[[Any], None]
# By number, since not every owner can be hashed.
_Acts: TypeAlias = dict[int, tuple[weakref.ref[Any], _Act]]

_befores: _Acts = {}
_renewals: _Acts = {}
_numbers = count()
# By thread; one that ends leaves its lock to the next one with its number.
_held_off: dict[int, Any] = {}
_adding = threading.RLock()


def lock(owner: Any, name: str, make: Callable[[], Any] = threading.Lock) -> Any:
    """A lock for the attribute of this name of its owner, which gets a new one in a child.

    A thread that held the parent's is not in the child.

    Args:
        owner: Any object.
        name: Of the attribute.
        make: Makes the lock.
    """
    in_child(owner, lambda owner: setattr(owner, name, make()))
    return make()


def in_child(owner: Any, renew: _Act) -> None:
    """Calls `renew` with an object, as long as it exists, in each forked child.

    Args:
        owner: Any object; `renew` must not refer to it.
        renew: Makes again what a child cannot inherit, before anything else runs there.
    """
    _register(_renewals, owner, renew)


def before(owner: Any, act: _Act) -> None:
    """Calls `act` with an object, as long as it exists, before each fork.

    Args:
        owner: Any object; `act` must not refer to it.
        act: Gives up what a child must not inherit. No other thread is in `held_off` meanwhile.
    """
    _register(_befores, owner, act)


def held_off() -> AbstractContextManager[Any]:
    """A lock of this thread: while it is held, no other thread forks the process.

    For calls of libraries with locks of their own, which a child would inherit as they are. It may
    be held more than once. What is called must not wait for a thread that forks.
    """
    thread = threading.get_ident()
    if thread not in _held_off:
        with _adding:
            _held_off[thread] = threading.RLock()
    held: AbstractContextManager[Any] = _held_off[thread]
    return held


def _register(acts: _Acts, owner: Any, act: _Act) -> None:
    number = next(_numbers)
    acts[number] = weakref.ref(owner, lambda _: acts.pop(number, None)), act


def _call_all(acts: _Acts) -> None:
    for alive, act in list(acts.values()):
        owner = alive()
        if owner is not None:
            act(owner)


def _hold_off_others() -> None:
    _adding.acquire()
    for held in _of_others():
        held.acquire()
    _call_all(_befores)


def _let_others_continue() -> None:
    for held in [*_of_others(), _adding]:
        with contextlib.suppress(RuntimeError):  # not held, where a Ctrl-C ended the waiting
            held.release()


def _renew_all() -> None:
    global _adding
    _adding = threading.RLock()
    for thread in _held_off.keys() - {threading.get_ident()}:
        del _held_off[thread]
    _call_all(_renewals)


def _of_others() -> list[Any]:
    this = threading.get_ident()
    return [held for thread, held in list(_held_off.items()) if thread != this]


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(
        before=_hold_off_others, after_in_parent=_let_others_continue, after_in_child=_renew_all
    )
