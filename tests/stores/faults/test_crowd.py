"""Many processes use one folder at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from scenes import SIZE
from support.stores import key_of, make_kv

from sac_rag.errors import CorruptEntryError
from sac_rag.stores import DiskStore


def crowd(work: list[Callable[[], int]]) -> list[int]:
    """Does all at once, a process each; a process that raises fails the test."""
    children = []
    for job in work:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(theirs, b"%d" % job())
                os._exit(0)
            except BaseException as error:  # noqa: BLE001 (else pytest would continue in here)
                os.write(2, f"{error!r}\n".encode())
                os._exit(1)
        os.close(theirs)
        children.append((pid, ours))
    results = []
    for pid, ours in children:
        with os.fdopen(ours, "rb") as said:
            results.append(int(said.read() or b"-1"))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return results


@pytest.mark.parametrize(
    ("room", "keys"),
    [(2**30, 12), (5 * SIZE, 12), (2**30, 1)],
    ids=["room for all", "evicting", "one key"],
)
def test_eight_writers_and_eight_readers_in_processes_of_their_own(
    room: int, keys: int, tmp_path: Path, counts: Counter[str], times: int
) -> None:
    rounds = 25 * times

    def write(worker: int) -> int:
        with DiskStore(tmp_path, room) as store:
            for i in range(rounds):
                number = (i + worker) % keys
                if i % 3:
                    store.put(key_of(number), make_kv(number), [f"{worker}"])
                else:
                    store[key_of(number)] = make_kv(number)
        return rounds

    def read(worker: int) -> int:
        hits = 0
        with DiskStore(tmp_path, room, read_only=worker == 7) as store:
            for i in range(8 * rounds):
                number = (i * 5 + worker) % keys
                try:
                    assert store[key_of(number)].bit_equal(make_kv(number))
                    hits += 1
                except KeyError as absent:
                    assert not isinstance(absent, CorruptEntryError)
            assert store.quarantined == 0
        return hits

    DiskStore(tmp_path).close()
    jobs = [lambda w=w: write(w) for w in range(8)] + [lambda w=w: read(w) for w in range(8)]
    results = crowd(jobs)
    with DiskStore(tmp_path, room) as store:
        assert store.nbytes <= room
        assert len(store) == (keys if room > 10**6 else 5)
        assert all(kv.bit_equal(make_kv(n)) for n in range(keys) if (kv := store.get(key_of(n))))
        assert store.check() == []
        assert store.stats().total_quarantined == 0
        assert not list(tmp_path.rglob("*.new"))
    counts["writes of 8 processes beside 8 reading ones"] += sum(results[:8])
    counts["right reads of 8 processes beside 8 writing ones"] += sum(results[8:])
