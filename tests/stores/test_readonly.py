"""A store that is only read: never written, and opened where nothing can be."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.stores import age, bytes_in, flip, index_of, key_of, make_kv

from sac_rag.errors import CorruptEntryError
from sac_rag.stores import DiskStore


@pytest.fixture
def folder() -> Iterator[Path]:
    """A store that another user may look into."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    with DiskStore(path / "store") as store:
        store.put(key_of(0), make_kv(0), ["a"])
        store[key_of(1)] = make_kv(1)
    yield path / "store"
    for inner in path.rglob("*"):
        inner.chmod(0o700)
    shutil.rmtree(path)


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    for path in [folder.parent, folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:  # whom no permission stops
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path in [folder.parent, folder, *folder.rglob("*")]:
            path.chmod(0o700 if path.is_dir() else 0o600)


def require_readable(folder: Path) -> None:
    with DiskStore(folder, read_only=True) as store:
        assert store[key_of(0)].bit_equal(make_kv(0))
        assert store.documents(key_of(0)) == ("a",)
        assert store.read(key_of(1), lambda _: 5).bit_equal(make_kv(1).first(5))
        assert store.extent(key_of(1)) == (20, 24)
        assert sorted(store) == sorted([key_of(0), key_of(1)])
        assert (len(store), store.stats().entries) == (2, 2)
        assert store.why_absent(key_of(7)) == "absent"
        assert store.check() == []
        assert store.verify() == []


def test_reading_writes_no_byte(folder: Path) -> None:
    age_of_folder = folder.stat().st_mtime_ns, (folder / "entries").stat().st_mtime_ns
    before = bytes_in(folder)
    require_readable(folder)
    with DiskStore(folder, read_only=True, max_age_s=1e-9) as store:
        assert store.get(key_of(0)) is None
        assert store.why_absent(key_of(0)) == "expired"
    assert bytes_in(folder) == before
    after = folder.stat().st_mtime_ns, (folder / "entries").stat().st_mtime_ns
    assert after == age_of_folder  # not even a file that came and went


def test_a_folder_without_write_permission_is_read(folder: Path) -> None:
    with unwritable(folder):
        require_readable(folder)


def test_a_folder_that_cannot_be_written_is_read_while_its_owner_has_it_open(folder: Path) -> None:
    with DiskStore(folder) as writer:
        writer[key_of(1)] = make_kv(1)
        for path in (folder / "entries").glob("cache.db*"):
            path.chmod(0o644)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        folder.chmod(0o755)
        with unwritable(folder):
            require_readable(folder)


def test_what_others_write_is_seen(folder: Path) -> None:
    """Whether the writer was there before or comes later, closes, or comes back."""
    with DiskStore(folder, read_only=True) as reader:
        assert reader[key_of(0)].bit_equal(make_kv(0))
        for number in range(2, 6):
            with DiskStore(folder) as writer:
                writer[key_of(number)] = make_kv(number)
                assert reader[key_of(number)].bit_equal(make_kv(number))
                writer[key_of(0)] = make_kv(number)
                assert reader[key_of(0)].bit_equal(make_kv(number))
            assert reader[key_of(number)].bit_equal(make_kv(number))
        assert len(reader) == 6


def test_a_store_whose_writer_was_killed_is_read_or_says_what_to_do(folder: Path) -> None:
    child = os.fork()
    if child == 0:
        DiskStore(folder)[key_of(2)] = make_kv(2)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with unwritable(folder):
        try:
            with DiskStore(folder, read_only=True) as store:
                assert store[key_of(2)].bit_equal(make_kv(2))
        except OSError as error:
            assert "open the store once with write permission" in str(error)
    with DiskStore(folder) as store:
        assert store[key_of(2)].bit_equal(make_kv(2))
    with unwritable(folder), DiskStore(folder, read_only=True) as store:
        assert store[key_of(2)].bit_equal(make_kv(2))


def test_whatever_would_change_it_is_a_clear_error(folder: Path) -> None:
    with DiskStore(folder, read_only=True) as store:
        changes = [
            lambda: store.__setitem__(key_of(5), make_kv()),
            lambda: store.__delitem__(key_of(0)),
            lambda: store.put(key_of(5), make_kv()),
            lambda: store.put(key_of(0), make_kv(), ["b"]),
            lambda: store.put(key_of(0), make_kv(anchors=5)),
            lambda: store.pop(key_of(0)),
            lambda: store.forget("a"),
            lambda: store.replace_document("a", []),
            lambda: store.pin([key_of(0)]),
            lambda: store.unpin([key_of(0)]),
            lambda: store.check(fix=True),
            lambda: store.rekey(None),
            store.gc,
            store.clear,
        ]
        for change in changes:
            with pytest.raises(OSError, match="opened with read_only=True") as error:
                change()
            assert error.value.errno == errno.EROFS
            assert error.value.filename == str(store.folder)
        store.put(key_of(0), make_kv(), ["a"])  # changes nothing
        assert len(store) == 2


def test_a_bad_entry_is_a_miss_and_stays_where_it_is(folder: Path) -> None:
    with DiskStore(folder, read_only=True) as store:
        flip(store, key_of(0))
        before = bytes_in(folder)
        for _ in range(2):
            with pytest.raises(CorruptEntryError, match="checksum"):
                store[key_of(0)]
        assert store.quarantined == 0
        assert len(store.check()) == 1
        assert bytes_in(folder) == before


def test_a_folder_that_is_no_store_is_not_made_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no store at"):
        DiskStore(tmp_path / "missing", read_only=True)
    with pytest.raises(ValueError, match="an empty folder and not a store"):
        DiskStore(tmp_path, read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_lacks_its_index_is_not_given_one(folder: Path) -> None:
    for path in (folder / "entries").glob("cache.db*"):
        path.unlink()
    with pytest.raises(OSError, match=str(folder)):
        DiskStore(folder, read_only=True)
    assert not list((folder / "entries").glob("cache.db*"))


def test_an_index_of_other_tables_is_refused_by_name(folder: Path) -> None:
    with DiskStore(folder) as store, index_of(store) as index:
        index.execute("PRAGMA user_version = 9")
    with pytest.raises(OSError, match="its tables are of version 9, expected 3"):
        DiskStore(folder, read_only=True)


def test_entries_too_old_are_not_deleted(folder: Path) -> None:
    with DiskStore(folder) as store:
        age(store, key_of(0), 100)
    with DiskStore(folder, read_only=True, max_age_s=50) as store:
        with pytest.raises(KeyError):
            store[key_of(0)]
        assert list(store) == [key_of(1)]
    with DiskStore(folder) as store:
        assert len(store) == 2
