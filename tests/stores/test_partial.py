"""A chunk read at a higher ratio than it is stored at: the same bits, out of fewer bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.stores import age, file_of, flip, index_of, key_of, make_kv

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV, as_stored
from sac_rag.stores import DiskStore, MemoryStore
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.disk.files import Files
from sac_rag.stores.disk.index import IndexRow

KEY, OTHER = key_of(0), key_of(1)
CIPHER = Cipher(b"k" * 32)
LARGE = make_kv(anchors=4000)  # in an entry of 15 blocks of 64 KiB


def first(entries: int) -> Callable[[int], int]:
    return lambda num_tokens: entries


# Reading.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["memory", "disk", "encrypted"])
@pytest.mark.parametrize("entries", [1, 5000, 24_000, 10**9])
def test_what_is_read_is_the_beginning_of_what_is_stored_bit_for_bit(
    tmp_path: Path, kind: str, dtype: str, entries: int
) -> None:
    kv = as_stored(LARGE, dtype)
    store = (
        MemoryStore()
        if kind == "memory"
        else DiskStore(tmp_path, cipher=CIPHER if kind == "encrypted" else None)
    )
    store[KEY] = kv
    found = store.read(KEY, first(entries))
    assert type(found) is type(kv)
    assert found.num_entries == min(entries, 24_000)
    assert found.bit_equal(store[KEY].first(found.num_entries))
    assert found.bit_equal(kv.first(found.num_entries))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_how_much_is_wanted_depends_on_the_source_tokens(kind: str, disk: DiskStore) -> None:
    store = disk if kind == "disk" else MemoryStore()
    store[KEY] = make_kv()
    assert store.read(KEY, lambda num_tokens: num_tokens // 2).num_entries == 10
    with pytest.raises(ValueError, match="was: 0"):
        store.read(KEY, first(0))
    with pytest.raises(KeyError, match=OTHER):
        store.read(OTHER, first(1))
    assert store[KEY].bit_equal(make_kv())


class Counting(Files):
    """Counts the bytes that are read."""

    nbytes = 0

    @contextmanager
    def opened(self, row: IndexRow) -> Iterator[Callable[[int], memoryview]]:
        with super().opened(row) as read:

            def counted(nbytes: int) -> memoryview:
                data = read(nbytes)
                self.nbytes += len(data)
                return data

            yield counted


def bytes_read(store: DiskStore, read: Callable[[], object]) -> int:
    counting = store._entries.files = Counting(store.folder)
    read()
    store._entries.files = Files(store.folder)
    return counting.nbytes


def test_the_first_entries_are_read_out_of_fewer_bytes(disk: DiskStore) -> None:
    disk[KEY] = LARGE
    whole = bytes_read(disk, lambda: disk[KEY])
    assert whole == disk.nbytes + 4096  # the header first
    places = 24_000 * (4 + 2)  # positions and heads of all
    for entries in (1, 6000, 12_000):
        nbytes = bytes_read(disk, lambda n=entries: disk.read(KEY, first(n)))  # type: ignore[misc]
        assert places + entries * 32 < nbytes < places + entries * 32 + 64 * 1024 + 3 * 4096
    assert bytes_read(disk, lambda: disk.read(KEY, first(10**9))) == whole


def test_a_bit_behind_what_is_wanted_is_of_no_concern_until_all_is_read(disk: DiskStore) -> None:
    disk[KEY] = LARGE
    flip(disk, KEY)
    for _ in range(2):
        assert disk.read(KEY, first(6000)).bit_equal(LARGE.first(6000))
    assert disk.quarantined == 0
    with pytest.raises(CorruptEntryError, match="checksum"):
        disk[KEY]
    assert disk.quarantined == 1


@pytest.mark.parametrize("place", [0, 80, 400, 2000, 100_000, 300_000])
def test_a_bit_in_what_is_wanted_makes_it_a_miss(disk: DiskStore, place: int) -> None:
    disk[KEY] = LARGE
    flip(disk, KEY, place)
    with pytest.raises(CorruptEntryError) as error:
        disk.read(KEY, first(6000))
    assert error.value.reason == "corrupt"
    assert disk.quarantined == 1
    assert KEY not in disk
    assert disk.why_absent(KEY) == "corrupt"
    with pytest.raises(KeyError) as absent:
        disk.read(KEY, first(6000))
    assert not isinstance(absent.value, CorruptEntryError)


def test_a_file_that_is_cut_short_is_refused_whatever_is_wanted(disk: DiskStore) -> None:
    disk[KEY] = LARGE
    path = file_of(disk, KEY)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptEntryError, match="its file has"):
        disk.read(KEY, first(1))


def test_reading_in_part_counts_and_renews_as_reading_does(disk: DiskStore) -> None:
    disk[KEY] = make_kv()
    with index_of(disk) as index:
        index.execute("UPDATE Cache SET access_time = access_time - 3600")
    disk.read(KEY, first(1))
    with pytest.raises(KeyError):
        disk.read(OTHER, first(1))
    stats = disk.stats()
    assert (stats.hits, stats.misses) == (1, 1)
    assert stats.unused_s is not None
    assert stats.unused_s < 60
    memory = MemoryStore(max_bytes=2 * make_kv().nbytes)
    memory[KEY] = memory[OTHER] = make_kv()
    memory.read(KEY, first(1))  # renews
    memory.extent(OTHER)  # does not
    memory[key_of(2)] = make_kv()
    assert list(memory) == [KEY, key_of(2)]


def test_what_is_too_old_is_not_read_in_part_either(tmp_path: Path) -> None:
    with DiskStore(tmp_path, max_age_s=60) as store:
        store[KEY] = make_kv()
        age(store, KEY, 61)
        for read in (store.extent, lambda key: store.read(key, first(1))):
            with pytest.raises(KeyError):
                read(KEY)
        assert store.check() == []


# How much is stored.


@pytest.mark.parametrize("kind", ["memory", "disk", "encrypted"])
def test_how_much_is_stored_is_known_from_the_header(tmp_path: Path, kind: str) -> None:
    store: Any = MemoryStore()
    if kind != "memory":
        store = DiskStore(tmp_path, cipher=CIPHER if kind == "encrypted" else None)
    store[KEY] = make_kv()
    assert store.extent(KEY) == (20, 24)
    store[KEY] = make_kv().first(7)
    assert store.extent(KEY) == (20, 7)
    with pytest.raises(KeyError, match=OTHER):
        store.extent(OTHER)
    if kind != "memory":
        flip(store, KEY)
        assert store.extent(KEY) == (20, 7)
        assert store.stats().hits == 0
        file_of(store, KEY).write_bytes(b"")
        with pytest.raises(KeyError):
            store.extent(KEY)
    del store[KEY]
    with pytest.raises(KeyError):
        store.extent(KEY)


def test_how_much_is_stored_outlives_the_process_and_another_key(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        store[KEY] = make_kv().first(7)
    with DiskStore(tmp_path) as store:
        assert store.extent(KEY) == (20, 7)
        store.rekey(CIPHER)
        assert store.extent(KEY) == (20, 7)
        assert store.read(KEY, first(3)).bit_equal(make_kv().first(3))
        assert store.check() == []


# Storing more.


def test_more_entries_replace_fewer_and_keep_documents_and_pin(disk: DiskStore) -> None:
    disk.put(KEY, make_kv().first(7), ["a"], text_id="aa", fingerprint="bb")
    disk.pin([KEY])
    before = file_of(disk, KEY)
    disk.put(KEY, make_kv(), ["b"])
    assert disk[KEY].bit_equal(make_kv())
    assert disk.documents(KEY) == ("a", "b")
    assert disk.origin(KEY) == ("aa", "bb")
    assert disk.stats().pinned == 1
    assert not before.exists()
    assert disk.forget("a", "b") == 1


@pytest.mark.parametrize("entries", [1, 23, 24])
def test_as_many_entries_or_fewer_change_nothing_but_documents(
    disk: DiskStore, entries: int
) -> None:
    disk.put(KEY, make_kv(0), ["a"])
    before = file_of(disk, KEY)
    disk.put(KEY, make_kv(1).first(entries))
    disk.put(KEY, make_kv(1).first(entries), ["b"])
    assert file_of(disk, KEY) == before
    assert disk[KEY].bit_equal(make_kv(0))
    assert disk.documents(KEY) == ("a", "b")
    assert disk.extent(KEY) == (20, 24)


def test_fewer_entries_replace_more_where_that_is_said(disk: DiskStore) -> None:
    disk.put(KEY, make_kv())
    disk[KEY] = make_kv().first(7)
    assert disk[KEY].bit_equal(make_kv().first(7))


def test_fewer_entries_replace_more_that_are_too_old(tmp_path: Path) -> None:
    with DiskStore(tmp_path, max_age_s=60) as store:
        store.put(KEY, make_kv(0), ["a"])
        age(store, KEY, 61)
        store.put(KEY, make_kv(1).first(7))
        assert store[KEY].bit_equal(make_kv(1).first(7))
        assert store.check() == []


def test_more_entries_written_meanwhile_are_not_replaced_by_fewer(disk: DiskStore) -> None:
    class Overtaken(Files):
        @contextmanager
        def written(self, key: str, data: bytes, *known: Any) -> Iterator[str]:
            disk._entries.files = files
            with super().written(key, data, *known) as name:
                disk.put(KEY, make_kv(), ["faster"])
                yield name

    files = disk._entries.files
    disk._entries.files = Overtaken(disk.folder)
    disk.put(KEY, make_kv().first(7), ["slower"])
    assert disk[KEY].bit_equal(make_kv())
    assert disk.documents(KEY) == ("faster", "slower")


def test_of_many_who_put_at_once_the_one_with_most_entries_wins(disk: DiskStore) -> None:
    start = threading.Barrier(8)

    def put(worker: int) -> None:
        start.wait()
        for entries in range(worker + 1, 25, 8):
            disk.put(KEY, make_kv().first(entries), [f"{worker}"])
            kv: AnchorKV = disk.read(KEY, first(entries))
            assert kv.bit_equal(make_kv().first(entries))
        disk.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(8)))
    assert disk[KEY].bit_equal(make_kv())
    assert len(disk.documents(KEY)) == 8
    assert disk.quarantined == 0
