"""Stores: what was put in comes out bit for bit, or does not come out at all."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diskcache
import pytest
import torch
from support.stores import file_of, index_of, key_of, make_kv

from sac_rag.errors import CorruptEntryError
from sac_rag.stores import AnchorStore, DiskStore, MemoryStore
from sac_rag.stores.disk.files import Files
from sac_rag.stores.disk.index import Row
from sac_rag.stores.entry import decode, encode

KEY = "ab" * 32
OTHER = "cd" * 32


def entry_files(store: DiskStore) -> list[Path]:
    return sorted((store.folder / "entries").glob("*/*"))


# What every store does.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_put_in_comes_out_bit_for_bit(store: AnchorStore, dtype: torch.dtype) -> None:
    kv = make_kv(1, dtype)
    kv.keys[0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    store[KEY] = kv
    assert store[KEY].bit_equal(kv)


def test_an_entry_is_overwritten_by_the_next_of_its_key(store: AnchorStore) -> None:
    store[KEY] = make_kv(1)
    store[KEY] = make_kv(2, anchors=6)
    assert store[KEY].bit_equal(make_kv(2, anchors=6))
    assert len(store) == 1


def test_an_absent_key_is_a_key_error(store: AnchorStore) -> None:
    with pytest.raises(KeyError, match=KEY):
        store[KEY]
    with pytest.raises(KeyError, match=KEY):
        del store[KEY]
    assert KEY not in store
    assert "not a digest" not in store
    assert store.get(KEY) is None


def test_a_deleted_entry_is_absent_and_the_others_stay(store: AnchorStore) -> None:
    store[KEY], store[OTHER] = make_kv(1), make_kv(2)
    del store[KEY]
    assert KEY not in store
    assert store[OTHER].bit_equal(make_kv(2))


def test_iterating_gives_every_key_once(store: AnchorStore) -> None:
    keys = {key_of(i) for i in range(5)}
    for key in keys:
        store[key] = make_kv()
    assert sorted(store) == sorted(keys)
    assert len(store) == 5
    store.clear()
    assert list(store) == []
    assert len(store) == 0


def test_a_strided_view_of_a_batch_is_stored_as_the_chunk_it_shows(store: AnchorStore) -> None:
    kv = make_kv(dtype=torch.float32)
    batch = torch.randn(*kv.keys.shape, 7)
    kv = replace(kv, keys=batch[..., 2], values=batch[..., 3], positions=kv.positions[0].expand(24))
    store[KEY] = kv
    assert store[KEY].bit_equal(kv)


def test_keys_and_values_may_be_one_tensor(store: AnchorStore) -> None:
    same = make_kv().keys
    store[KEY] = replace(make_kv(), values=same, keys=same)
    assert torch.equal(store[KEY].values, same)


@pytest.mark.parametrize("make", [MemoryStore, DiskStore], ids=["memory", "disk"])
def test_a_store_refuses_what_is_not_an_anchor_kv(make: Any, tmp_path: Path) -> None:
    store = make() if make is MemoryStore else make(tmp_path)
    with pytest.raises(TypeError, match="holds AnchorKVs, got: Tensor"):
        store[KEY] = torch.zeros(3)
    assert len(store) == 0


@pytest.mark.parametrize("cap", [0, -1])
def test_a_cap_below_one_byte_is_refused(cap: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        MemoryStore(cap)
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        DiskStore(tmp_path / "store", max_bytes=cap)
    assert not (tmp_path / "store").exists()


def test_importing_the_stores_loads_neither_torch_nor_diskcache() -> None:
    code = (
        "import sys, sac_rag.stores as s; assert s.AnchorStore and s.__all__; "
        "sys.exit('torch' in sys.modules or 'diskcache' in sys.modules)"
    )
    assert run_python(code).wait() == 0


# The memory store.


def test_the_memory_store_drops_what_was_used_longest_ago() -> None:
    size = make_kv().nbytes
    store = MemoryStore(max_bytes=3 * size)
    for i in range(3):
        store[key_of(i)] = make_kv(i)
    store[key_of(0)]  # reading renews
    assert key_of(1) in store  # asking does not
    store[key_of(3)] = make_kv(3)
    assert list(store) == [key_of(2), key_of(0), key_of(3)]
    assert (store.nbytes, store.evictions) == (3 * size, 1)


def test_an_entry_larger_than_the_memory_cap_is_not_kept() -> None:
    store = MemoryStore(max_bytes=make_kv().nbytes)
    store[KEY] = make_kv()
    store[KEY] = make_kv(anchors=8)
    assert KEY not in store  # nor is the old value served in its place
    assert (store.nbytes, store.evictions) == (0, 1)


def test_the_memory_store_counts_bytes_through_overwriting_and_deleting() -> None:
    store = MemoryStore()
    store[KEY] = make_kv(anchors=8)
    store[KEY] = make_kv(anchors=4)
    store[OTHER] = make_kv(anchors=2)
    assert store.nbytes == make_kv(anchors=4).nbytes + make_kv(anchors=2).nbytes
    del store[KEY]
    assert store.nbytes == make_kv(anchors=2).nbytes
    store.clear()
    assert (store.nbytes, store.evictions) == (0, 0)


def test_a_chunk_cut_from_a_batch_does_not_keep_the_batch_in_memory() -> None:
    kv = make_kv(dtype=torch.float32, anchors=64)
    batch = torch.zeros(64, *kv.keys.shape)
    store = MemoryStore()
    store[KEY] = replace(kv, keys=batch[3], values=batch[4])
    assert store[KEY].keys.untyped_storage().nbytes() == batch[3].nbytes


def test_what_was_read_from_disk_is_not_copied_into_memory(disk: DiskStore) -> None:
    disk[KEY] = make_kv()
    kv = disk[KEY]
    store = MemoryStore()
    store[KEY] = kv
    assert store[KEY] is kv


def test_the_memory_store_may_be_shared_by_threads() -> None:
    store = MemoryStore(max_bytes=10 * make_kv().nbytes)
    kvs = [make_kv(i) for i in range(20)]

    def use(worker: int) -> None:
        for i in range(200):
            number = (worker + i * 7) % 20
            store[key_of(number)] = kvs[number]
            found = store.get(key_of((worker + i) % 20))
            assert found is None or found is kvs[(worker + i) % 20]
            store.pop(key_of((worker + 3 * i) % 20), None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert store.nbytes == sum(kv.nbytes for kv in store.values()) <= store.max_bytes


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_two_may_pop_one_entry(kind: str, disk: DiskStore) -> None:
    store = MemoryStore() if kind == "memory" else disk
    kv = make_kv()

    def pop(_: int) -> bool:
        start.wait()
        return store.pop(KEY, None) is not None

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            start = threading.Barrier(4)
            store[KEY] = kv
            assert any(list(pool.map(pop, range(4))))
            assert KEY not in store
    with pytest.raises(KeyError):
        store.pop(KEY)


# Damage on disk.


def edited(edit: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        edit(data)
        path.write_bytes(data)

    return damage


def flipped(place: int) -> Callable[[Path], None]:
    def edit(data: bytearray) -> None:
        data[place] ^= 4

    return edited(edit)


def future(data: bytearray) -> None:
    data[:] = data.replace(b'"format":3', b'"format":9')


DAMAGE = {
    "truncated to a half": edited(lambda data: data.__delitem__(slice(len(data) // 2, None))),
    "truncated by a byte": edited(lambda data: data.pop()),
    "emptied": edited(lambda data: data.clear()),
    "lengthened": edited(lambda data: data.append(0)),
    "bit flipped in the magic": flipped(12),
    "bit flipped in the key": flipped(60),
    "bit flipped in the first tensor": flipped(800),
    "bit flipped at the end": flipped(-1),
    "zeroed": edited(lambda data: data.__setitem__(slice(None), bytes(len(data)))),
    "of a future format": edited(future),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_a_miss_and_is_quarantined(disk: DiskStore, damage: str) -> None:
    disk[KEY], disk[OTHER] = make_kv(1), make_kv(2)
    DAMAGE[damage](file_of(disk, KEY))
    damaged = file_of(disk, KEY).read_bytes()
    assert len(disk.check()) >= 1

    with pytest.raises(CorruptEntryError) as error:
        disk[KEY]
    assert error.value.reason == ("format" if "format" in damage else "corrupt")
    assert disk.quarantined == 1
    assert (disk.folder / "quarantine" / KEY).read_bytes() == damaged
    with pytest.raises(KeyError) as absent:  # gone, and no longer called corrupt
        disk[KEY]
    assert not isinstance(absent.value, CorruptEntryError)
    assert KEY not in disk

    disk.put(KEY, make_kv(1))
    assert disk[KEY].bit_equal(make_kv(1))
    assert disk[OTHER].bit_equal(make_kv(2))


def test_a_file_grown_to_a_terabyte_is_not_read(disk: DiskStore) -> None:
    disk[KEY] = make_kv()
    os.truncate(file_of(disk, KEY), 2**40)  # of holes, which take no room
    with pytest.raises(CorruptEntryError, match="its file has 1099511627776 bytes"):
        disk[KEY]


def test_two_entries_whose_files_were_swapped_are_both_misses(disk: DiskStore) -> None:
    disk[KEY], disk[OTHER] = make_kv(1), make_kv(2)
    first, second = file_of(disk, KEY), file_of(disk, OTHER)
    swapped = second.read_bytes(), first.read_bytes()
    first.write_bytes(swapped[0])
    second.write_bytes(swapped[1])
    for key in (KEY, OTHER):
        with pytest.raises(CorruptEntryError, match="this is the entry of key"):
            disk[key]
    assert disk.quarantined == 2


def test_two_entries_whose_rows_were_swapped_are_misses_and_no_file_is_lost(
    disk: DiskStore,
) -> None:
    disk[KEY], disk[OTHER] = make_kv(1), make_kv(2)
    with index_of(disk) as index:
        (theirs,) = index.execute("SELECT filename FROM Cache WHERE key = ?", (OTHER,)).fetchone()
        (mine,) = index.execute("SELECT filename FROM Cache WHERE key = ?", (KEY,)).fetchone()
        index.execute("UPDATE Cache SET filename = ? WHERE key = ?", (theirs, KEY))
    with pytest.raises(CorruptEntryError, match="its row is not one of a DiskStore"):
        disk[KEY]
    assert disk[OTHER].bit_equal(make_kv(2))
    (disk.folder / "entries" / mine).unlink()  # nobody's now


def test_an_entry_whose_file_was_deleted_is_a_miss_and_can_be_put_again(disk: DiskStore) -> None:
    disk.put(KEY, make_kv(), documents=["a"])
    file_of(disk, KEY).unlink()
    assert f"{KEY}: its file is gone" in disk.check()
    with pytest.raises(CorruptEntryError, match="its file is gone"):
        disk[KEY]
    disk.put(KEY, make_kv(), documents=["a"])
    assert disk[KEY].bit_equal(make_kv())


def test_an_entry_replaced_while_it_is_being_read_is_read_again(disk: DiskStore) -> None:
    class ReplacedMeanwhile(Files):
        def read(self, row: Row) -> memoryview:
            disk._entries.files = files
            disk[KEY] = make_kv(2)
            return super().read(row)

    files = disk._entries.files
    disk[KEY] = make_kv(1)
    disk._entries.files = ReplacedMeanwhile(disk.folder)
    assert disk[KEY].bit_equal(make_kv(2))
    assert disk.quarantined == 0


def test_check_names_what_is_wrong_and_changes_nothing(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        for i in range(4):
            store.put(key_of(i), make_kv(i), documents=[f"document {i}"])
        flipped(-1)(file_of(store, key_of(0)))
        file_of(store, key_of(1)).unlink()
        stray = file_of(store, key_of(2)).with_name("stray")
        stray.write_bytes(b"?")
        with index_of(store) as index:
            index.execute("INSERT INTO Owner VALUES (x'ff', ?)", (key_of(3),))
            index.execute("UPDATE Settings SET value = 7 WHERE key = 'count'")
        problems = "\n".join(store.check())
        assert f"{key_of(0)}: checksum" in problems
        assert f"{key_of(1)}: its file is gone" in problems
        assert f"unknown file: {stray}" in problems
        assert f"{key_of(3)}: its document ids cannot be read" in problems
        assert "the count of all entries is noted as 7, is 4" in problems
        assert key_of(2) not in problems.replace(str(stray), "")
        assert "\n".join(store.check()) == problems
        assert store.quarantined == 0


# Things planted in the folder.


class Bomb:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


INSERT = "INSERT INTO Cache (key, raw, mode, filename, value, tag, size) VALUES (?,?,?,?,?,?,?)"


def plant_value(store: DiskStore, bomb: bytes) -> None:
    with index_of(store) as index:
        index.execute(INSERT, (KEY, 1, 4, None, bomb, None, 0))


def plant_value_file(store: DiskStore, bomb: bytes) -> None:
    name = f"{KEY[:2]}/{KEY}-{'0' * 16}.kv"
    path = store.folder / "entries" / name
    path.parent.mkdir()
    path.write_bytes(bomb)
    with index_of(store) as index:
        index.execute(INSERT, (KEY, 1, 4, name, None, None, len(bomb)))


def plant_key(store: DiskStore, bomb: bytes) -> None:
    with index_of(store) as index:
        index.execute(INSERT, (bomb, 0, 1, None, b"x", None, 0))


def plant_binary_key(store: DiskStore, bomb: bytes) -> None:
    with index_of(store) as index:
        index.execute(INSERT, (bomb, 1, 4, None, bomb, bomb, 0))


def plant_tag(store: DiskStore, bomb: bytes) -> None:
    store[KEY] = make_kv()
    with index_of(store) as index:
        index.execute("UPDATE Cache SET tag = ?", (bomb,))


def plant_tables(store: DiskStore, bomb: bytes) -> None:
    store[KEY] = make_kv()
    with index_of(store) as index:
        index.execute("INSERT INTO Owner VALUES (?, ?)", (bomb, KEY))
        index.execute("INSERT INTO Owner VALUES (?, ?)", (bomb, bomb))
        index.execute("INSERT INTO Origin VALUES (?, ?, ?, ?, ?, ?)", (bomb,) * 6)
        index.execute("UPDATE Origin SET num_tokens = ?, num_entries = ?", (bomb, bomb))
        index.execute("INSERT INTO Departed (digest, reason) VALUES (?, ?)", (bomb, bomb))
        for name in ("salt", "count.hits", bomb):
            index.execute("INSERT OR REPLACE INTO Meta VALUES (?, ?)", (name, bomb))


def plant_settings(store: DiskStore, bomb: bytes) -> None:
    store[KEY] = make_kv()
    names = [*diskcache.DEFAULT_SETTINGS, "count", "size", "_directory", "get", "row", "_sql"]
    names += ["sqlite_key", "sqlite_writable_schema=1;--", "disk_loads", "disk__directory", "_disk"]
    with index_of(store) as index:
        for name in names:
            index.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (name, bomb))


def plant_binary_setting(store: DiskStore, bomb: bytes) -> None:
    with index_of(store) as index:
        index.execute("INSERT INTO Settings VALUES (?, ?)", (bomb, bomb))


PLANTS = [
    plant_value,
    plant_value_file,
    plant_key,
    plant_binary_key,
    plant_tag,
    plant_tables,
    plant_settings,
    plant_binary_setting,
]


def use_everything(folder: Path) -> None:
    """Does with a store all that can be done; only what a caller must expect may be raised."""
    with DiskStore(folder) as store:
        for key in [KEY, OTHER, *store]:
            for use in (store.__contains__, store.__getitem__, store.documents):
                try:
                    use(key)
                except KeyError:
                    assert use != store.__contains__
        store.check()
        assert len(store) >= 0
        assert store.nbytes >= 0
        store.put(KEY, make_kv(), documents=["a"])
        store[OTHER] = make_kv()
        assert store[OTHER].bit_equal(make_kv())
        store.clear()
    with DiskStore(folder, max_bytes=3000) as store:
        for i in range(5):
            store[key_of(i)] = make_kv(i)
        assert store.evictions >= 1


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_nothing_planted_in_a_folder_is_ever_executed(
    plant: Callable[[DiskStore, bytes], None], tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    with DiskStore(tmp_path / "store") as store:
        plant(store, pickle.dumps(Bomb(marker)))
    try:
        use_everything(tmp_path / "store")
    except OSError as refused:
        assert plant is plant_binary_setting, refused
        assert "settings are not diskcache's" in str(refused)
    assert not marker.exists()


@pytest.mark.parametrize("plant", [plant_value, plant_value_file, plant_key])
def test_what_is_planted_here_would_be_executed_by_plain_diskcache(
    plant: Callable[[DiskStore, bytes], None], tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    with DiskStore(tmp_path / "store") as store:
        plant(store, pickle.dumps(Bomb(marker)))
    with diskcache.Cache(str(tmp_path / "store" / "entries")) as cache:
        [cache[key] for key in cache if isinstance(key, str)]
    assert marker.exists()


@pytest.mark.parametrize("plant", [plant_value, plant_value_file])
def test_a_pickled_value_is_quarantined_as_it_is(
    plant: Callable[[DiskStore, bytes], None], disk: DiskStore, tmp_path: Path
) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "marker"))
    plant(disk, bomb)
    with pytest.raises(CorruptEntryError, match="nothing was unpickled"):
        disk[KEY]
    assert disk.quarantined == 1
    if plant is plant_value:
        assert (disk.folder / "quarantine" / f"{KEY}.row").read_bytes() == bomb
    else:  # the row was not ours, and so no file is taken to be
        file_of(disk, KEY).unlink()


def test_planted_settings_do_not_change_the_store(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with DiskStore(tmp_path / "store") as store, index_of(store) as index:
        for name in ("_directory", "disk__directory", "directory"):
            index.execute("INSERT INTO Settings VALUES (?, ?)", (name, str(elsewhere)))
        index.execute("UPDATE Settings SET value = 'none' WHERE key = 'eviction_policy'")
        index.execute("UPDATE Settings SET value = 'off' WHERE key = 'sqlite_journal_mode'")
    with DiskStore(tmp_path / "store", max_bytes=3000) as store:
        for i in range(5):
            store[key_of(i)] = make_kv(i)
        assert store.nbytes <= 3000
        assert list(elsewhere.iterdir()) == []
        with index_of(store) as index:
            assert index.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store.check() == []


@pytest.mark.parametrize(
    "kind", ["relative", "absolute", "linked file", "linked folder", "pipe", "number"]
)
def test_a_path_out_of_the_folder_is_neither_read_nor_deleted(kind: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    name = f"{KEY}-{'0' * 16}.kv"
    (outside / name).write_bytes(encode(KEY, make_kv()))  # a good entry, if it were followed
    folder = tmp_path / "store"
    with DiskStore(folder) as store:
        within = store.folder / "entries" / KEY[:2]
        named: Any = f"{KEY[:2]}/{name}"
        if kind == "relative":
            named = f"../../outside/{name}"
        elif kind == "absolute":
            named = str(outside / name)
        elif kind == "linked folder":
            within.symlink_to(outside)
        elif kind == "number":
            named = 5
        else:
            within.mkdir()
            if kind == "pipe":
                os.mkfifo(within / name)  # reading it would wait for ever
            else:
                (within / name).symlink_to(outside / name)
        size = (outside / name).stat().st_size
        with index_of(store) as index:
            for _ in range(2):
                index.execute("DELETE FROM Cache")
                index.execute(INSERT, (KEY, 1, 2, named, None, None, size))
                with pytest.raises(CorruptEntryError):
                    store[KEY]
                assert KEY not in store
            index.execute(INSERT, (KEY, 1, 2, named, None, None, size))
        store.check()
        del store[KEY]
        with index_of(store) as index:
            index.execute(INSERT, (KEY, 1, 2, named, None, None, 10**9))
    with DiskStore(folder, max_bytes=3000) as store:
        store[OTHER] = make_kv()  # the planted row is evicted
        assert list(store) == [OTHER]
        if kind == "linked folder":
            with pytest.raises(NotADirectoryError, match="is something else"):
                store[KEY] = make_kv()
        else:
            store[KEY] = make_kv()
            assert store[KEY].bit_equal(make_kv())
    assert [path.name for path in outside.iterdir()] == [name]
    decode(KEY, (outside / name).read_bytes())


def test_a_linked_quarantine_is_refused(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store"):
        pass
    (tmp_path / "store" / "quarantine").rmdir()
    (tmp_path / "store" / "quarantine").symlink_to(tmp_path)
    with pytest.raises(NotADirectoryError, match="quarantine is something else"):
        DiskStore(tmp_path / "store")


# Documents.


def test_a_text_of_two_documents_is_stored_once(disk: DiskStore) -> None:
    disk.put(KEY, make_kv(), documents=["b"])
    path = file_of(disk, KEY)
    disk.put(KEY, make_kv(), documents=["c", "a"])
    assert disk.documents(KEY) == ("a", "b", "c")
    assert len(disk) == 1
    assert entry_files(disk) == [path]


def test_putting_what_is_there_already_writes_nothing(disk: DiskStore) -> None:
    disk.put(KEY, make_kv(), documents=["a", "b"])
    with index_of(disk) as index:
        version = index.execute("PRAGMA data_version").fetchone()
        disk.put(KEY, make_kv(), documents=["b"])
        disk.put(KEY, make_kv())
        assert index.execute("PRAGMA data_version").fetchone() == version
        disk.put(KEY, make_kv(), documents=["c"])
        assert index.execute("PRAGMA data_version").fetchone() != version


def test_overwriting_an_entry_keeps_its_documents(disk: DiskStore) -> None:
    disk.put(KEY, make_kv(1), documents=["a"])
    disk[KEY] = make_kv(2)
    assert disk.documents(KEY) == ("a",)
    assert disk[KEY].bit_equal(make_kv(2))


def test_documents_are_known_without_reading_the_entry(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        store.put(KEY, make_kv(), documents=["ä\ud800", ""])
        store[OTHER] = make_kv()
        file_of(store, KEY).unlink()
        assert store.documents(KEY) == ("", "ä\ud800")
        assert store.documents(OTHER) == ()
        with pytest.raises(KeyError):
            store.documents(key_of(1))


@pytest.mark.parametrize("documents", ["one id", [1], [None]])
def test_documents_must_be_several_str(disk: DiskStore, documents: Any) -> None:
    with pytest.raises(TypeError, match="document"):
        disk.put(KEY, make_kv(), documents=documents)
    assert KEY not in disk


# Room.


def test_the_disk_store_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    size = len(encode(KEY, make_kv()))
    with DiskStore(tmp_path, max_bytes=3 * size) as store:
        for i in range(3):
            store[key_of(i)] = make_kv(i)
        with index_of(store) as index:  # an hour later
            index.execute("UPDATE Cache SET access_time = access_time - 3600")
        store[key_of(0)]  # reading renews
        assert key_of(1) in store  # asking does not
        store[key_of(3)] = make_kv(3)
        assert sorted(store) == sorted(key_of(i) for i in (0, 2, 3))
        assert (store.nbytes, store.evictions, len(entry_files(store))) == (3 * size, 1, 3)
        assert store.check() == []


def test_a_small_entry_can_make_room_by_dropping_several_and_never_itself(tmp_path: Path) -> None:
    large = len(encode(KEY, make_kv(anchors=64)))
    with DiskStore(tmp_path, max_bytes=large) as store:
        for i in range(5):
            store[key_of(i)] = make_kv(i)
        store[KEY] = make_kv(anchors=64)
        assert list(store) == [KEY]
        assert store.evictions == 5
        assert store.check() == []


def test_a_clock_that_was_set_back_does_not_drop_the_newest_entry(tmp_path: Path) -> None:
    with DiskStore(tmp_path, max_bytes=3000) as store:
        store[key_of(0)], store[key_of(1)] = make_kv(0), make_kv(1)
        with index_of(store) as index:
            index.execute("UPDATE Cache SET access_time = access_time + 3600")
        store[KEY] = make_kv()
        assert sorted(store) == sorted([KEY, key_of(1)])
        assert store.check() == []


def test_an_entry_larger_than_the_disk_cap_is_not_kept(tmp_path: Path) -> None:
    with DiskStore(tmp_path, max_bytes=2500) as store:
        store[KEY], store[OTHER] = make_kv(1, anchors=2), make_kv(2, anchors=2)
        store[KEY] = make_kv(1, anchors=64)
        assert list(store) == [OTHER]  # nor is the old value served in its place
        assert store.evictions == 1
        assert store.check() == []


def test_reading_what_was_used_just_now_writes_nothing(disk: DiskStore) -> None:
    disk[KEY] = make_kv()
    with index_of(disk) as index:
        version = index.execute("PRAGMA data_version").fetchone()
        assert disk[KEY].bit_equal(make_kv())
        assert index.execute("PRAGMA data_version").fetchone() == version


def test_a_read_does_not_wait_for_a_writer(disk: DiskStore) -> None:
    disk[KEY] = make_kv()
    with index_of(disk) as index:
        index.execute("UPDATE Cache SET access_time = 0")
        index.execute("BEGIN IMMEDIATE")  # a writer would wait for it for a minute
        started = time.perf_counter()
        assert disk[KEY].bit_equal(make_kv())
        assert time.perf_counter() - started < 30
        index.execute("ROLLBACK")


# Trouble with the disk itself.


@contextmanager
def disk_full_beyond(size: int) -> Iterator[None]:
    """No file can grow past a size: the system refuses, in the middle of a write if need be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("place", ["the entry's file", "the index"])
def test_when_the_disk_is_full_nothing_changes(disk: DiskStore, place: str) -> None:
    disk.put(KEY, make_kv(1), documents=["a"])
    before = entry_files(disk)
    log = disk.folder / "entries" / "cache.db-wal"
    limit = 4096 if place == "the entry's file" else log.stat().st_size
    large = make_kv(2, anchors=64)
    assert 4096 < len(encode(KEY, large)) < log.stat().st_size
    with disk_full_beyond(limit):
        for write in (disk.put, disk.__setitem__):
            for key in (OTHER, KEY):
                if (write, key) != (disk.put, KEY):
                    with pytest.raises(OSError, match=str(disk.folder)):
                        write(key, large)
        if place == "the index":
            with pytest.raises(OSError, match=str(disk.folder)):
                disk.put(KEY, make_kv(1), documents=["b"])
            with pytest.raises(OSError, match=str(disk.folder)):
                del disk[KEY]
        assert OTHER not in disk
        assert entry_files(disk) == before
        assert disk[KEY].bit_equal(make_kv(1))
        assert disk.documents(KEY) == ("a",)
    disk[OTHER] = large  # and there is room again
    assert disk[OTHER].bit_equal(large)


def test_a_bad_entry_is_a_miss_even_where_it_cannot_be_moved(disk: DiskStore) -> None:
    disk[KEY] = make_kv()
    flipped(-1)(file_of(disk, KEY))
    with disk_full_beyond((disk.folder / "entries" / "cache.db-wal").stat().st_size):
        for _ in range(2):
            with pytest.raises(CorruptEntryError, match="checksum"):
                disk[KEY]
    with pytest.raises(CorruptEntryError):
        disk[KEY]
    assert disk.quarantined == 1


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user could look into."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for inner in path.rglob("*"):
        inner.chmod(0o700)
    shutil.rmtree(path)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:  # whom no permission stops
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o700 if path.is_dir() else 0o600)


def test_a_read_only_folder_cannot_be_opened_and_says_so(open_folder: Path) -> None:
    with DiskStore(open_folder / "store") as store:
        store[KEY] = make_kv()
    with read_only(open_folder), pytest.raises(OSError, match=f"{store.folder}.*readonly"):
        DiskStore(open_folder / "store")
    with read_only(open_folder), pytest.raises(PermissionError, match=str(open_folder)):
        DiskStore(open_folder / "new")


def test_a_folder_that_became_read_only_is_still_read(open_folder: Path) -> None:
    with DiskStore(open_folder / "store") as store:
        store[KEY] = make_kv()
        with read_only(open_folder):
            for key in (KEY, OTHER):
                with pytest.raises(PermissionError, match=str(store.folder)):
                    store[key] = make_kv(1)
            assert store[KEY].bit_equal(make_kv())
        assert list(store) == [KEY]
        assert store.check() == []


def test_an_index_that_is_no_database_is_an_error_that_names_it(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        store[KEY] = make_kv()
    for path in (tmp_path / "entries").glob("cache.db*"):
        path.write_bytes(b"no database at all, whatever its name may say" * 100)
    with pytest.raises(OSError, match=f"index of the store {store.folder} failed: file is not a"):
        DiskStore(tmp_path)


# The folder.


def test_a_store_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with DiskStore(tmp_path / "made" / "store") as store:
            store[KEY] = make_kv()
            assert store.check() == []
    finally:
        os.umask(before)
    folders = [store.folder, *(path for path in store.folder.rglob("*") if path.is_dir())]
    assert len(folders) == 4
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    files = [store.folder / "store.json", *entry_files(store)]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_store_is_found_again_by_another_object(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        store.put(KEY, make_kv(), documents=["a"])
    with DiskStore(str(tmp_path / "store"), max_bytes=10**6) as again:
        assert again[KEY].bit_equal(make_kv())
        assert again.documents(KEY) == ("a",)
        copy = pickle.loads(pickle.dumps(again))
        assert (copy.folder, copy.max_bytes) == (again.folder, 10**6)
        assert copy[KEY].bit_equal(make_kv())
        copy.close()
        assert again.check() == []


def test_a_store_of_a_later_format_is_refused_by_name(tmp_path: Path) -> None:
    with DiskStore(tmp_path):
        pass
    (tmp_path / "store.json").write_text('{"magic": "sac_rag.DiskStore", "format": 4}')
    with pytest.raises(ValueError, match=r"is a store of format 4, .* reads format 3; upgrade"):
        DiskStore(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', "\xff", "[" * 4000])
def test_a_folder_whose_store_json_is_another_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "store.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"store\.json"):
        DiskStore(tmp_path)
    assert not (tmp_path / "entries").exists()


def test_a_folder_of_other_things_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match=r"not empty and not a store \(it has 'thesis.tex'"):
        DiskStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("...")
    with pytest.raises(NotADirectoryError, match=str(path)):
        DiskStore(path)
    with pytest.raises(NotADirectoryError, match=str(path)):
        DiskStore(path / "store")


# Threads and processes.


def run_python(code: str, **environment: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(part for part in sys.path if part)
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, **environment})


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
        found = 0
        for i in range(200):
            key = key_of((i * 3 + worker) % 40)
            try:
                assert disk[key].bit_equal(kvs[key])
                found += 1
            except KeyError as absent:
                assert not isinstance(absent, CorruptEntryError)
        disk.close()
        return found

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


def test_every_store_is_a_mutable_mapping(store: AnchorStore) -> None:
    assert isinstance(store, MutableMapping)
    assert store.setdefault(KEY, make_kv()).bit_equal(make_kv())
    store.update({OTHER: make_kv(1)})
    assert store.pop(KEY).bit_equal(make_kv())
    assert [kv.num_tokens for kv in store.values()] == [20]
