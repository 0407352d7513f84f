"""Locks that are new in a forked child: a thread that held the parent's is not in the child."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

_Renew = Callable[[Any], None]

# By number, since not every owner can be hashed.
_renewals: dict[int, tuple[weakref.ref[Any], _Renew]] = {}
_numbers = count()


def lock(owner: Any, name: str, make: Callable[[], Any] = threading.Lock) -> Any:
    """A lock for the attribute of this name of its owner, which gets a new one in a child.

    Args:
        owner: Any object.
        name: Of the attribute.
        make: Makes the lock.
    """
    in_child(owner, lambda owner: setattr(owner, name, make()))
    return make()


def in_child(owner: Any, renew: _Renew) -> None:
    """Calls `renew` with an object, as long as it exists, in each forked child.

    Args:
        owner: Any object; `renew` must not refer to it.
        renew: Makes again what a child cannot inherit, before anything else runs there.
    """
    number = next(_numbers)
    alive = weakref.ref(owner, lambda _: _renewals.pop(number, None))
    _renewals[number] = alive, renew


def _renew_all() -> None:
    for alive, renew in list(_renewals.values()):
        owner = alive()
        if owner is not None:
            renew(owner)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew_all)
