"""Threads and processes share one DiskStore."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.stores import (
    entry_files,
    key_of,
    make_kv,
    run_python,
)

from sac_rag.errors import CorruptEntryError
from sac_rag.stores import DiskStore

KEY = "ab" * 32
OTHER = "cd" * 32


FILL = """
import sys, torch
sys.path.insert(0, {tests!r})
from sac_rag.stores import DiskStore
from support.stores import key_of, make_kv
with DiskStore({folder!r}) as store:
    for i in range({count}):
        store.put(key_of(i), make_kv(i), documents=["child"])
        store[key_of(i)] = make_kv(i)
"""


def test_what_one_process_wrote_another_reads(disk: DiskStore) -> None:
    code = FILL.format(tests=str(Path(__file__).parents[1]), folder=str(disk.folder), count=10)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    assert run_python(code, PYTHONHASHSEED=seed).wait() == 0
    assert len(disk) == 10
    assert all(disk[key_of(i)].bit_equal(make_kv(i)) for i in range(10))


def test_two_processes_may_write_the_same_keys_at_once(disk: DiskStore) -> None:
    code = FILL.format(tests=str(Path(__file__).parents[1]), folder=str(disk.folder), count=200)
    child = run_python(code)
    i = 0
    while child.poll() is None:
        i = (i + 1) % 200
        disk[key_of(i)] = make_kv(i)
        assert disk[key_of(i)].bit_equal(make_kv(i))
    assert child.returncode == 0
    assert len(disk) == len(entry_files(disk)) == 200
    assert disk.quarantined == 0


def test_eight_writers_and_eight_readers_may_share_a_folder(disk: DiskStore) -> None:
    kvs = {key_of(i): make_kv(i) for i in range(40)}
    start = threading.Barrier(16)
    written = threading.Event()

    def write(worker: int) -> int:
        start.wait()
        for i in range(40):
            key = key_of((i + 5 * worker) % 40)
            if i % 2:
                disk[key] = kvs[key]
            else:
                disk.put(key, kvs[key], documents=[str(worker)])
            written.set()
        disk.close()
        return 0

    def read(worker: int) -> int:
        start.wait()
        assert written.wait(timeout=60)
        hits = 0
        for i in range(200):
            key = key_of((i * 3 + worker) % 40)
            try:
                assert disk[key].bit_equal(kvs[key])
                hits += 1
            except KeyError as absent:
                assert not isinstance(absent, CorruptEntryError)
        disk.close()
        return hits

    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(write, i) for i in range(8)] + [pool.submit(read, i) for i in range(8)]
        assert sum(job.result() for job in jobs) > 0
    assert sorted(disk) == sorted(kvs)
    assert all(len(disk.documents(key)) == 4 for key in kvs)
    assert len(entry_files(disk)) == 40
    assert disk.quarantined == 0


def test_many_may_open_a_new_folder_at_once(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def open_it(worker: int) -> None:
        start.wait()
        with DiskStore(tmp_path / "store") as store:
            store[key_of(worker)] = make_kv(worker)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_it, range(8)))
    with DiskStore(tmp_path / "store") as store:
        assert len(store) == 8
        assert store.check() == []
