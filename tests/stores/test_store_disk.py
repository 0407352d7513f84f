"""A DiskStore on a disk that is full or read-only, and what its folder may be."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.stores import entry_files, file_of, flip, make_kv

from sac_rag.errors import CorruptEntryError
from sac_rag.stores import DiskStore
from sac_rag.stores.entry import encode

KEY = "ab" * 32
OTHER = "cd" * 32


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
    flip(disk, KEY)
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


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux says what is in memory")
def test_prefetched_entries_are_in_the_systems_memory(disk: DiskStore) -> None:
    disk[KEY] = make_kv(anchors=4096)
    path = file_of(disk, KEY)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        disk.prefetch([OTHER, KEY])
        buffer = bytearray(path.stat().st_size)
        deadline = time.monotonic() + 60
        while _read_without_waiting(file.fileno(), buffer) < len(buffer):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert buffer == path.read_bytes()


def _read_without_waiting(fileno: int, buffer: bytearray) -> int:
    """Bytes at the beginning of a file that are in the system's memory."""
    try:
        return os.preadv(fileno, [buffer], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    except OSError as error:
        pytest.skip(f"this file system does not say: {error}")


def test_a_prefetch_of_what_is_damaged_or_gone_raises_nothing(disk: DiskStore) -> None:
    disk[KEY], disk[OTHER] = make_kv(), make_kv()
    file_of(disk, OTHER).unlink()
    flip(disk, KEY)
    disk.prefetch([KEY, OTHER])
    with pytest.raises(CorruptEntryError):
        disk[KEY]
    with pytest.raises(CorruptEntryError):
        disk[OTHER]
