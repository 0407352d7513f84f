"""What happens around a store that is open: its folder is moved, its index locked or replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import PROSE, make_compressor
from support.stores import (
    age,
    bytes_in,
    entry_files,
    flip,
    held_by_another_process,
    index_of,
    key_of,
    make_kv,
)

from sac_rag import SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.lm.generator import Generator
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import DiskStore

QUESTION = "Who counted the ships?"
SHORT = Decoding(max_new_tokens=4)
ENTRIES = 4


def fill(folder: Path, seed: int = 0) -> None:
    with DiskStore(folder) as store:
        for number in range(ENTRIES):
            store.put(key_of(number), make_kv(seed + number), ["a"])


def require_all(folder: Path, seed: int = 0) -> None:
    with DiskStore(folder) as store:
        for number in range(ENTRIES):
            assert store[key_of(number)].bit_equal(make_kv(seed + number))
        assert store.check() == []


# Moved.

USES: dict[str, Callable[[DiskStore], Any]] = {
    "read": lambda store: store[key_of(0)],
    "read a part": lambda store: store.read(key_of(0), lambda _: 1),
    "in": lambda store: key_of(0) in store,
    "extent": lambda store: store.extent(key_of(0)),
    "list": list,
    "put": lambda store: store.put(key_of(0), make_kv(), ["b"]),
    "put more": lambda store: store.put(key_of(9), make_kv(), ["b"]),
    "offer": lambda store: store.offer(key_of(9), make_kv()),
    "overwrite": lambda store: store.__setitem__(key_of(0), make_kv(5)),
    "delete": lambda store: store.__delitem__(key_of(0)),
    "forget": lambda store: store.forget("a"),
    "note": lambda store: store.note("ab" * 32, {"a": "1"}),
    "check": lambda store: store.check(fix=True),
    "gc": lambda store: store.gc(),
    "clear": lambda store: store.clear(),
    "rekey": lambda store: store.rekey(None),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_folder_that_is_gone_is_an_error_and_nothing_is_lost_or_made_again(
    tmp_path: Path, use: str, how: str
) -> None:
    fill(tmp_path / "store")
    store = DiskStore(tmp_path / "store")
    assert store[key_of(0)].bit_equal(make_kv(0))
    if how == "moved":
        (tmp_path / "store").rename(tmp_path / "moved")
    else:
        shutil.rmtree(tmp_path / "store")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "store")):
        USES[use](store)
    store.close()
    assert not (tmp_path / "store").exists()
    if how == "moved":
        require_all(tmp_path / "moved")


def test_another_store_that_was_moved_to_the_path_is_read_in_place_of_the_first(
    tmp_path: Path,
) -> None:
    fill(tmp_path / "store")
    fill(tmp_path / "next", seed=10)
    with DiskStore(tmp_path / "store") as store:
        assert store[key_of(0)].bit_equal(make_kv(0))
        (tmp_path / "store").rename(tmp_path / "last")
        (tmp_path / "next").rename(tmp_path / "store")
        assert store[key_of(0)].bit_equal(make_kv(10))
        store.put(key_of(9), make_kv(9))
        assert len(store) == ENTRIES + 1
    require_all(tmp_path / "last")
    require_all(tmp_path / "store", seed=10)


def test_a_folder_moved_while_an_entry_is_read_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its row and its file."""
    fill(tmp_path / "store")
    store = DiskStore(tmp_path / "store")
    opened = store._entries.files.opened

    def moved_first(row: Any) -> Any:
        (tmp_path / "store").rename(tmp_path / "moved")
        return opened(row)

    monkeypatch.setattr(store._entries.files, "opened", moved_first)
    with pytest.raises(FileNotFoundError):
        store[key_of(0)]
    store.close()
    require_all(tmp_path / "moved")


def test_a_question_is_answered_while_the_store_is_away(llama: Generator, tmp_path: Path) -> None:
    compressor = make_compressor(llama, "sac")
    store = DiskStore(tmp_path / "store")
    rag = SacRAG(CachedCompressor(compressor, store))
    expected = rag.answer(QUESTION, PROSE[:2], SHORT).text
    (tmp_path / "store").rename(tmp_path / "moved")
    answer = rag.answer(QUESTION, PROSE[:2], SHORT)
    assert answer.text == expected
    assert [chunk.status for chunk in answer.chunks] == ["unreadable"] * 2
    assert rag.compressor.store_failures == 2
    (tmp_path / "moved").rename(tmp_path / "store")
    answer = rag.answer(QUESTION, PROSE[:2], SHORT)
    assert [chunk.status for chunk in answer.chunks] == ["hit"] * 2
    assert store.check() == []
    store.close()


# Locked.


def test_an_answer_waits_once_for_a_moment_where_another_process_keeps_the_lock(
    llama: Generator, disk: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes without storing its chunks; what is only tidied up does not wait either."""
    rag = SacRAG(CachedCompressor(make_compressor(llama, "sac"), disk))
    rag.answer(QUESTION, PROSE[:2], SHORT)
    flip(disk, next(iter(disk)))
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with held_by_another_process(disk):
        monkeypatch.setattr("sac_rag.stores.disk.database.time.monotonic", lambda: now)
        monkeypatch.setattr("sac_rag.stores.disk.database.time.sleep", sleep)
        answer = rag.answer(QUESTION, PROSE[:5], SHORT)
        assert 0 < now < 2
        assert [chunk.status for chunk in answer.chunks].count("hit") == 1
        assert rag.compressor.store_failures == 3  # the bad one is still in its place
        with pytest.raises(OSError, match="locked"):  # a write that was asked for does wait
            disk.put(key_of(0), make_kv())
        assert now >= 60
        monkeypatch.undo()
    answer = rag.answer(QUESTION, PROSE[:5], SHORT)
    assert rag.compressor.store_failures == 3
    assert all(text in rag.compressor for text in PROSE[:5])


def test_an_expired_entry_is_a_miss_without_waiting(tmp_path: Path) -> None:
    with DiskStore(tmp_path, max_age_s=60) as store:
        store[key_of(0)] = make_kv()
        age(store, key_of(0), 61)
        store._entries.index.database._is_stuck = True  # a wait was in vain before
        with held_by_another_process(store):
            assert store.get(key_of(0)) is None
        store._entries.index.database.lock_seconds = 60
        assert store.get(key_of(0)) is None
        assert entry_files(store) == []


# Replaced by something else.


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def pipe(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("replace", [link, pipe, folder])
@pytest.mark.parametrize("name", ["cache.db", "cache.db-wal", "cache.db-shm", "cache.db-journal"])
def test_an_index_that_is_no_plain_file_is_refused_and_not_followed(
    tmp_path: Path, name: str, replace: Callable[[Path, Path], None], read_only: bool
) -> None:
    fill(tmp_path / "theirs")
    fill(tmp_path / "ours")
    before = bytes_in(tmp_path / "theirs")
    replace(tmp_path / "ours" / "entries" / name, tmp_path / "theirs" / "entries" / "cache.db")
    with pytest.raises(OSError, match=f"must be a plain file.*{name}"):
        DiskStore(tmp_path / "ours", max_bytes=1, read_only=read_only)
    assert bytes_in(tmp_path / "theirs") == before


def test_an_index_replaced_by_a_link_while_the_store_is_open_is_not_followed(
    tmp_path: Path,
) -> None:
    fill(tmp_path / "theirs")
    fill(tmp_path / "ours")
    before = bytes_in(tmp_path / "theirs")
    with DiskStore(tmp_path / "ours") as store:
        assert len(store) == ENTRIES
        path = store.folder / "entries" / "cache.db"
        link(path, tmp_path / "theirs" / "entries" / "cache.db")
        with pytest.raises(OSError, match="must be a plain file"):
            store.clear()
        path.unlink()
    assert bytes_in(tmp_path / "theirs") == before


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("replace", [link, pipe, folder])
def test_a_store_json_that_is_no_plain_file_is_refused(
    tmp_path: Path, replace: Callable[[Path, Path], None], read_only: bool
) -> None:
    fill(tmp_path / "store")
    outside = tmp_path / "outside"
    shutil.copy(tmp_path / "store" / "store.json", outside)
    replace(tmp_path / "store" / "store.json", outside)
    with pytest.raises(OSError, match=r"store\.json"):
        DiskStore(tmp_path / "store", read_only=read_only)


@pytest.mark.parametrize("replace", [link, pipe, folder])
def test_fields_of_a_fingerprint_that_are_no_plain_file_are_not_read(
    disk: DiskStore, tmp_path: Path, replace: Callable[[Path, Path], None]
) -> None:
    disk.note("ab" * 32, {"a": "1"})
    path = disk.folder / "fingerprints" / f"{'ab' * 32}.json"
    shutil.copy(path, tmp_path / "outside")
    replace(path, tmp_path / "outside")
    with DiskStore(disk.folder) as other:
        assert other.fields("ab" * 32) is None


def test_linked_entries_are_refused_by_a_reader_too(tmp_path: Path) -> None:
    fill(tmp_path / "theirs")
    fill(tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "entries")
    (tmp_path / "ours" / "entries").symlink_to(tmp_path / "theirs" / "entries")
    for read_only in (False, True):
        with pytest.raises(NotADirectoryError, match="entries is something else"):
            DiskStore(tmp_path / "ours", read_only=read_only)


def test_a_row_and_a_sparse_file_of_a_terabyte_are_a_miss(disk: DiskStore) -> None:
    disk[key_of(0)] = make_kv()
    (path,) = entry_files(disk)
    os.truncate(path, 2**40)  # of holes, which take no room
    with index_of(disk) as index:
        index.execute("UPDATE Cache SET size = ?", (2**40,))
    assert key_of(0) not in disk
    assert disk.get(key_of(0)) is None
    assert disk.quarantined == 1
    for left in disk.folder.glob("quarantine/*"):
        left.unlink()
