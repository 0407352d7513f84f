"""A store whose index is lost or damaged gets another from its entries."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.stores import age, entry_files, file_of, index_of, key_of, make_kv

from sac_rag.stores import DiskStore
from sac_rag.stores.cipher import Cipher

A, B = Cipher(b"a" * 32), Cipher(b"b" * 32)
FINGERPRINT = "ef" * 32


def lost(path: Path) -> None:
    for part in path.parent.glob("cache.db*"):
        part.unlink()


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(10_000))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = [lost, garbage, empty, cut_short]


def fill(folder: Path, cipher: Cipher | None = None) -> None:
    with DiskStore(folder, cipher=cipher) as store:
        for number in range(3):
            kv = make_kv(number)
            store.put(key_of(number), kv, ["a"], text_id="aa" * 32, fingerprint=FINGERPRINT)


def index(folder: Path) -> Path:
    return folder / "entries" / "cache.db"


@pytest.mark.parametrize("cipher", [None, A], ids=["plain", "encrypted"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_every_entry_is_there_again_and_documents_once_they_are_put(
    tmp_path: Path, damage: Callable[[Path], None], cipher: Cipher | None
) -> None:
    fill(tmp_path, cipher)
    damage(index(tmp_path))
    seen: list[int] = []
    rebuilt = DiskStore.rebuild(tmp_path, cipher=cipher, on_progress=seen.append)
    with DiskStore(tmp_path, cipher=cipher) as store:
        assert (rebuilt.entries, rebuilt.left_out) == (3, ())
        assert sum(seen) == rebuilt.nbytes == store.nbytes
        for number in range(3):
            assert store[key_of(number)].bit_equal(make_kv(number))
            assert store.extent(key_of(number)) == (20, 24)
            assert store.origin(key_of(number)) == (None, FINGERPRINT)
        assert store.check() == []
        assert store.forget("a") == 0
        assert len(store) == 3
        store.put(key_of(0), make_kv(0), ["a"], text_id="aa" * 32, fingerprint=FINGERPRINT)
        assert store.origin(key_of(0)) == ("aa" * 32, FINGERPRINT)
        assert store.forget("a") == 1
        assert store.check() == []
    assert not (tmp_path / "index.new").exists()


def test_a_store_whose_index_is_lost_says_what_to_do_and_sweeps_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    lost(index(tmp_path))
    for read_only in (False, True):
        with pytest.raises(OSError, match="index"):
            DiskStore(tmp_path, read_only=read_only)
    with pytest.raises(FileNotFoundError, match="sac-rag store rebuild"):
        DiskStore(tmp_path)
    garbage(index(tmp_path))
    with pytest.raises(OSError, match="sac-rag store rebuild"):
        DiskStore(tmp_path)
    with DiskStore(tmp_path / "other") as other:
        assert len(entry_files(other)) == 0
    assert DiskStore.rebuild(tmp_path).entries == 3


def test_an_index_that_is_intact_is_not_rebuilt(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(ValueError, match="is intact"):
        DiskStore.rebuild(tmp_path)
    with DiskStore(tmp_path) as store:
        assert store.documents(key_of(0)) == ("a",)


def test_a_folder_that_is_no_store_is_not_rebuilt(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(ValueError, match="not empty and not a store"):
        DiskStore.rebuild(tmp_path)


def test_with_another_key_nothing_is_rebuilt(tmp_path: Path) -> None:
    fill(tmp_path, A)
    lost(index(tmp_path))
    for cipher in (B, None):
        with pytest.raises(ValueError, match=f"encrypted with key {A.id}"):
            DiskStore.rebuild(tmp_path, cipher=cipher)
    assert DiskStore.rebuild(tmp_path, cipher=A).entries == 3


def test_what_is_no_entry_is_left_out_and_named(tmp_path: Path) -> None:
    fill(tmp_path)
    with DiskStore(tmp_path) as store:
        bad, linked = file_of(store, key_of(0)), file_of(store, key_of(1))
        good = file_of(store, key_of(2))
        older = good.with_name(f"{key_of(2)}-{'0' * 16}.kv")
        older.write_bytes(good.read_bytes())
        os.utime(older, (1000, 1000))
    bad.write_bytes(b"?")
    linked.unlink()
    linked.symlink_to(older)
    lost(index(tmp_path))
    rebuilt = DiskStore.rebuild(tmp_path)
    assert rebuilt.entries == 1
    assert len(rebuilt.left_out) == 3
    with DiskStore(tmp_path) as store:
        assert file_of_row(store) == good.name
        assert store[key_of(2)].bit_equal(make_kv(2))
        store.check(fix=True)
        assert store.check() == []


def file_of_row(store: DiskStore) -> str:
    with index_of(store) as rows:
        ((name,),) = rows.execute("SELECT filename FROM Cache").fetchall()
    return Path(name).name


def test_entries_stay_as_old_as_their_files(tmp_path: Path) -> None:
    fill(tmp_path)
    with DiskStore(tmp_path) as store:
        path = file_of(store, key_of(0))
    os.utime(path, (1000, 1000))
    lost(index(tmp_path))
    DiskStore.rebuild(tmp_path)
    with DiskStore(tmp_path, max_age_s=3600) as store:
        assert sorted(store) == sorted([key_of(1), key_of(2)])


def test_an_entry_of_a_clock_that_was_ahead_does_not_last_until_that_date(tmp_path: Path) -> None:
    with DiskStore(tmp_path, max_age_s=3600) as store:
        for number in range(2):
            store[key_of(number)] = make_kv(number)
        age(store, key_of(0), -10 * 365 * 24 * 3600)
        age(store, key_of(1), -60)
        assert list(store) == [key_of(1)]
        assert store.get(key_of(0)) is None
        assert store.why_absent(key_of(0)) == "expired"
        store.put(key_of(0), make_kv(0))
        assert store[key_of(0)].bit_equal(make_kv(0))
