"""A process is killed in the middle of what it does to a store."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from scenes import SCENES, Scene, make, require
from support.stores import key_of, make_kv

from sac_rag.stores import DiskStore

STORES = str(Path(sys.modules[DiskStore.__module__].__file__ or "").parents[1])
# Of each scene; of "put" eight times as many.
KILLS = 14


def killed_at_line(number: int, work: Callable[[], object]) -> int:
    """Does work and is killed at a line of the package's stores; or says how many there are."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(STORES):
            return None
        if event == "line":
            lines += 1
            if lines == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return lines


def child(work: Callable[[int], object]) -> tuple[int, bytes]:
    """Does work in a forked process, with a pipe to say something; its status, and what it said.

    The parent has no open connection to an index while it forks: SQLite allows none across.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ours)
            work(theirs)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 (else pytest would continue in here)
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    os.close(theirs)
    with os.fdopen(ours, "rb") as said:
        data = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), data


def act(folder: Path, scene: Scene, line: int) -> Callable[[int], object]:
    def work(pipe: int) -> None:
        def open_and_act() -> None:
            with DiskStore(folder, scene.max_bytes, cipher=scene.cipher) as store:
                scene.act(store)
                os.write(pipe, b"done")

        lines = killed_at_line(line, open_and_act)
        os.write(pipe, b" %d" % lines)

    return work


@pytest.mark.parametrize("name", SCENES)
def test_a_store_survives_a_kill_at_any_line(
    name: str, tmp_path: Path, counts: Counter[str], times: int
) -> None:
    scene = SCENES[name]
    make(tmp_path / "before", scene)

    def run(line: int) -> tuple[int, bytes]:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "store")
        return child(act(tmp_path / "store", scene, line))

    status, said = run(0)
    assert status == 0
    require(tmp_path / "store", name, finished=True)
    lines = int(said.split()[1])
    kills = KILLS * times * (8 if name == "put" else 1)
    step = max(1, lines // kills)
    for line in range(1, lines + 1, step):
        status, said = run(line)
        assert status == -signal.SIGKILL
        require(tmp_path / "store", name, finished=said == b"done")
        counts["kills at a line of a write, all states right"] += 1


def test_a_folder_survives_a_kill_while_it_is_made(
    tmp_path: Path, counts: Counter[str], times: int
) -> None:
    def work(line: int) -> Callable[[int], object]:
        def make_it(pipe: int) -> None:
            lines = killed_at_line(line, lambda: DiskStore(tmp_path / str(line)).close())
            os.write(pipe, b"%d" % lines)

        return make_it

    lines = int(child(work(0))[1])
    for line in range(1, lines + 1, max(1, lines // (KILLS * times))):
        assert child(work(line))[0] == -signal.SIGKILL
        with DiskStore(tmp_path / str(line)) as store:
            store[key_of(0)] = make_kv()
            store.check(fix=True)
            assert store.check() == []
        counts["kills while a folder is made, usable afterwards"] += 1


def test_what_was_acknowledged_before_a_kill_is_there(
    tmp_path: Path, counts: Counter[str], times: int
) -> None:
    """Killed at any moment, in the middle of a system call too."""
    order = random.Random(0)
    acknowledged = 0
    for attempt in range(30 * times):
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            store = DiskStore(tmp_path)
            for number in range(1000 * attempt, 1000 * attempt + 1000):
                store.put(key_of(number), make_kv(number % 50), [str(number)])
                os.write(theirs, b"%d\n" % number)
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours, "rb") as said:
            first = said.readline()  # it has begun
            time.sleep(order.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            numbers = list(map(int, (first + said.read()).split()))
        os.waitpid(pid, 0)
        with DiskStore(tmp_path) as store:
            for number in numbers:
                assert store[key_of(number)].bit_equal(make_kv(number % 50))
                assert store.documents(key_of(number)) == (str(number),)
        acknowledged += len(numbers)
    with DiskStore(tmp_path) as store:
        assert acknowledged <= len(store) <= acknowledged + 30 * times
        store.check(fix=True)
        assert store.check() == []
    counts["kills at any moment"] += 30 * times
    counts["acknowledged entries found after kills at any moment"] += acknowledged
