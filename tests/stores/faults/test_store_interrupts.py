"""Ctrl-C at any line of what a store does."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from scenes import SCENES, Scene, make, require
from support.interrupts import interruptions
from support.stores import entry_files, held_by_another_process, index_of, key_of, make_kv

from sac_rag.archive import Archive, export
from sac_rag.compressors.full import Full
from sac_rag.kv import AnchorKV
from sac_rag.origin import Origin
from sac_rag.stores import DiskStore, MemoryStore
from sac_rag.stores.disk import checks, database, entries, files, folder, index, keys, maintenance
from sac_rag.stores.disk import store as facade

MODULES = [checks, database, entries, files, folder, index, keys, maintenance, facade]
# From one interrupted line to the next: primes, so that it is another one in each round of a loop.
# The narrower tests below take every line.
STRIDES = {"re-encrypt": 151, "forget": 61}
CONFIG = Full.default_config()
ORIGIN = Origin(CONFIG.fingerprint_fields(), CONFIG)


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no power cut in these tests, and flushing takes most of the time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def require_free(folder: Path) -> None:
    """No transaction was left open: others can write at once."""
    path = folder / "entries" / "cache.db"
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")


@pytest.mark.parametrize("name", SCENES)
def test_ctrl_c_at_any_line_leaves_a_store_as_it_was_or_as_it_should_be(
    name: str, tmp_path: Path, counts: Counter[str], times: int
) -> None:
    scene = SCENES[name]
    make(tmp_path / "before", scene)
    store: DiskStore

    def begin() -> None:
        nonlocal store
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "store")
        store = DiskStore(tmp_path / "store", scene.max_bytes, cipher=scene.cipher)

    begin()
    stride = max(1, STRIDES.get(name, 41) // times)
    for _ in interruptions(lambda: scene.act(store), inside=MODULES, stride=stride):
        require_free(tmp_path / "store")
        require_usable(store, scene)
        store.close()
        require(tmp_path / "store", name, finished=False)
        counts["Ctrl-C at a line of a write, all states right"] += 1
        begin()
    store.close()
    require(tmp_path / "store", name, finished=True)


def require_usable(store: DiskStore, scene: Scene) -> None:
    """The same thread writes and reads on, unless the store has another key by now."""
    try:
        assert store.pin([key_of(1)]) == store.unpin([key_of(1)]) == 1
    except PermissionError:
        assert scene.new_cipher is not None
    with suppress(KeyError):  # in the new key already
        assert store[key_of(1)].num_entries


def test_no_committed_entry_loses_its_file(disk: DiskStore) -> None:
    inside = [files.Files, entries.Entries, database.Database]
    for _ in interruptions(lambda: disk.__setitem__(key_of(0), make_kv()), inside=inside):
        with index_of(disk) as rows:
            names = {name for (name,) in rows.execute("SELECT filename FROM Cache")}
        assert names <= {
            str(path.relative_to(disk.folder / "entries")) for path in entry_files(disk)
        }
        disk.clear()
        disk.gc()
        assert entry_files(disk) == []


def test_garbage_collection_is_repeated_after_ctrl_c(tmp_path: Path) -> None:
    def fill() -> None:
        for number in range(3):
            store.put(key_of(number), make_kv(number), fingerprint=f"{number}" * 64)

    with DiskStore(tmp_path / "store") as store:
        fill()
        for _ in interruptions(
            lambda: store.gc(["1" * 64]), inside=[database, entries, maintenance, facade], stride=17
        ):
            require_free(store.folder)
            store.gc(["1" * 64])
            assert list(store) == [key_of(1)]
            assert store.check() == []
            fill()
        assert list(store) == [key_of(1)]


def test_an_archive_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    import sac_rag.archive as module

    with DiskStore(tmp_path / "store") as store:
        for number in range(2):
            store.put(key_of(number), make_kv(number), fingerprint=ORIGIN.fingerprint)
        path = tmp_path / "archive"
        for _ in interruptions(lambda: export(store, path, ORIGIN), inside=[module], stride=3):
            if path.exists():
                assert Archive(path).verify() == []
                path.unlink()
            assert [other.name for other in tmp_path.iterdir()] == ["store"]
        archive = Archive(path)
        target = DiskStore(tmp_path / "target")
        for _ in interruptions(lambda: archive.copy_to(target), inside=[module], stride=3):
            require_free(target.folder)
            assert target.check() == []
            target.clear()
        assert sorted(target) == sorted(store)
        target.close()


def test_the_memory_store_counts_right_after_ctrl_c() -> None:
    store = MemoryStore(max_bytes=3 * make_kv().nbytes)

    def use() -> None:
        for number in range(5):
            store[key_of(number)] = make_kv(number)
        store.pop(key_of(3), None)
        store.clear()

    for _ in interruptions(use, inside=[MemoryStore]):
        kvs: list[AnchorKV] = [store[key] for key in store]
        assert store.nbytes == sum(kv.nbytes for kv in kvs)


@pytest.mark.parametrize("write", ["put", "forget", "delete"])
def test_ctrl_c_while_another_process_writes_ends_the_wait_and_nothing_else(
    write: str, disk: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.put(key_of(0), make_kv(0), ["a"])
    actions: dict[str, Callable[[], object]] = {
        "put": lambda: disk.put(key_of(1), make_kv(1)),
        "forget": lambda: disk.forget("a"),
        "delete": lambda: disk.__delitem__(key_of(0)),
    }

    def interrupt(seconds: float) -> None:
        # In the wait for the lock; a signal of the real kind, to this thread.
        monkeypatch.undo()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        threading.Event().wait(0.01)

    with held_by_another_process(disk), pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr("time.sleep", interrupt)
        actions[write]()
    disk.put(key_of(2), make_kv(2))
    assert disk[key_of(0)].bit_equal(make_kv(0))
    assert disk.forget("a") == 1
    assert disk[key_of(2)].bit_equal(make_kv(2))
