"""Nothing that others write into a store's folder is executed or followed out of it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diskcache
import pytest
from support.stores import (
    file_of,
    index_of,
    key_of,
    make_kv,
)

from sac_rag.errors import CorruptEntryError
from sac_rag.stores import DiskStore
from sac_rag.stores.entry import decode, encode

KEY = "ab" * 32
OTHER = "cd" * 32


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
