"""Forked children and how they end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

TIMEOUT_S = 60


def exit_of(work: Callable[[], bool]) -> int | None:
    """Exit status of a forked child that does work: 0 if it returns True; None if it hangs."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    ends = time.monotonic() + TIMEOUT_S
    while time.monotonic() < ends:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return None
