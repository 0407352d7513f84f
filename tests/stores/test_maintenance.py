"""Keeping a store in order: check and repair, garbage, figures, another key."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from support.stores import age, bytes_in, file_of, flip, index_of, key_of, make_kv

from sac_rag.errors import CorruptEntryError
from sac_rag.stores import DiskStore
from sac_rag.stores.cipher import Cipher

OLD, NEW = Cipher(b"o" * 32), Cipher(b"n" * 32)
FIRST, SECOND = "01" * 32, "02" * 32


def leave_behind(store: DiskStore, number: int) -> Path:
    """What a writer leaves that is killed before its row is there."""
    child = os.fork()
    if child == 0:
        with store._entries.files.written(key_of(number), b"secret bytes"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return file_of(store, key_of(number))


# Check and repair.


def test_everything_that_is_wrong_is_repaired(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        for number in range(6):
            store.put(key_of(number), make_kv(number), [f"document {number}"])
        flip(store, key_of(0))
        file_of(store, key_of(1)).unlink()
        stray = file_of(store, key_of(2)).with_name("stray")
        stray.write_bytes(b"?")
        (tmp_path / "entries" / "link").symlink_to(tmp_path)
        with index_of(store) as index:
            index.execute("INSERT INTO Owner VALUES (x'ff', ?)", (key_of(3),))
            index.execute("INSERT INTO Owner VALUES (x'61', ?)", (key_of(50),))
            index.execute("INSERT INTO Origin (key, text_id) VALUES (?, 'aa')", (key_of(51),))
            index.execute("UPDATE Settings SET value = 7 WHERE key = 'count'")
            index.execute("UPDATE Settings SET value = 1e9 WHERE key = 'size'")
            index.execute(
                "INSERT INTO Cache (key, raw, mode, value, size) VALUES (?, 0, 4, ?, 0)",
                (b"a pickle", pickle.dumps(1)),
            )
    before = bytes_in(tmp_path)
    with DiskStore(tmp_path, read_only=True) as store:
        problems = store.check()
        assert len(problems) == 10
    assert bytes_in(tmp_path) == before
    with DiskStore(tmp_path) as store:
        assert len(store.check(fix=True)) >= len(problems) - 1  # one repair may mend another thing
        assert store.check() == []
        assert sorted(store) == sorted(key_of(number) for number in range(2, 6))
        assert store.documents(key_of(3)) == ("document 3",)
        assert store[key_of(4)].bit_equal(make_kv(4))
        assert store.stats().quarantined == 2  # the flipped one and the pickle
        assert [store.why_absent(key_of(number)) for number in (0, 1)] == ["corrupt", "corrupt"]
    assert not stray.exists()
    assert not (tmp_path / "entries" / "link").is_symlink()
    assert tmp_path.is_dir()


def test_repairing_leaves_alone_what_is_being_written(disk: DiskStore) -> None:
    with disk._entries.files.written(key_of(0), b"not there yet") as name:
        path = disk.folder / "entries" / name
        assert disk.check(fix=True) == [f"unknown file: {path}"]
        assert path.read_bytes() == b"not there yet"
    path.unlink()


def test_a_file_swept_before_it_was_locked_is_made_again(
    disk: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    swept = []

    def sweep_first(file: object, flags: int) -> None:
        if not swept:
            swept.append(True)
            monkeypatch.setattr(fcntl, "flock", lock)
            assert len(disk._entries.sweep()) == 1
        lock(file, flags)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    disk[key_of(0)] = make_kv()
    assert swept
    assert disk[key_of(0)].bit_equal(make_kv())


def test_verifying_reads_every_byte_and_changes_nothing(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        for number in range(3):
            store[key_of(number)] = make_kv(number)
        seen: list[int] = []
        assert store.verify(on_progress=seen.append) == []
        assert sum(seen) == store.nbytes
        flip(store, key_of(1))
        (problem,) = store.verify()
        assert problem.startswith(f"{key_of(1)}: checksum")
        assert len(store) == 3


# Garbage.


def test_what_killed_writers_left_is_collected(disk: DiskStore) -> None:
    disk[key_of(0)] = make_kv()
    path = leave_behind(disk, 1)
    assert path.exists()
    collected = disk.gc()
    assert (collected.leftovers, collected.nbytes) == (1, len(b"secret bytes"))
    assert not path.exists()
    assert list(disk) == [key_of(0)]
    assert disk.gc() == type(collected)(0, 0, 0, 0, 0)


def test_forgetting_sweeps_what_killed_writers_left(disk: DiskStore) -> None:
    """Nobody knows of which document it was."""
    path = leave_behind(disk, 1)
    assert disk.forget("a document whose first entry was never finished") == 0
    assert not path.exists()


def test_expired_and_superseded_entries_are_collected(tmp_path: Path) -> None:
    with DiskStore(tmp_path, max_age_s=60) as store:
        for number, fingerprint in enumerate([FIRST, FIRST, FIRST, SECOND, None]):
            store.put(key_of(number), make_kv(number), fingerprint=fingerprint)
        age(store, key_of(0), 61)
        store.pin([key_of(1)])
        size = store.nbytes // 5
        collected = store.gc()
        assert (collected.expired, collected.superseded) == (1, 0)
        collected = store.gc(keep_fingerprints=[SECOND])
        assert (collected.expired, collected.superseded) == (0, 1)
        assert abs(collected.nbytes - size) < 100
        assert sorted(store) == sorted(key_of(number) for number in (1, 3, 4))
        assert store.why_absent(key_of(0)) == "expired"
        assert store.why_absent(key_of(2)) == "evicted"
        assert store.check() == []


def test_what_was_in_quarantine_for_a_week_is_collected(
    disk: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk[key_of(0)] = make_kv()
    flip(disk, key_of(0))
    with pytest.raises(CorruptEntryError):
        disk[key_of(0)]
    assert disk.gc().quarantined == 0
    monkeypatch.setattr("sac_rag.stores.disk.maintenance._QUARANTINE_SECONDS", 0)
    assert disk.gc().quarantined == 1
    assert disk.stats().quarantined == 0


# Figures.


def test_the_figures_of_a_store(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        empty = store.stats()
        assert (empty.entries, empty.nbytes, empty.oldest_s, empty.hit_rate) == (0, 0, None, None)
        store.note(FIRST, {"config.ratio": "5"})
        store.put(key_of(0), make_kv(), ["a", "b"], fingerprint=FIRST)
        store.put(key_of(1), make_kv(), ["a"], fingerprint=FIRST)
        store.put(key_of(2), make_kv(), fingerprint=SECOND)
        store[key_of(3)] = make_kv()
        store.pin([key_of(1)])
        age(store, key_of(0), 1000)
        flip(store, key_of(3))
        with pytest.raises(CorruptEntryError):
            store[key_of(3)]
        stats = store.stats()
        assert (stats.entries, stats.documents, stats.pinned) == (3, 2, 1)
        assert stats.nbytes == store.nbytes
        assert stats.ratio == make_kv().ratio
        assert stats.index_nbytes > 10_000
        assert (stats.quarantined, stats.total_quarantined, stats.reasons) == (1, 1, {"corrupt": 1})
        assert stats.oldest_s is not None
        assert 1000 <= stats.oldest_s < 1060
        assert [(f.fingerprint, f.entries, f.fields) for f in stats.fingerprints] == [
            (FIRST, 2, {"config.ratio": "5"}),
            (SECOND, 1, None),
        ]
        assert stats.cipher is None


def test_the_ratio_is_the_mean_of_what_is_stored(tmp_path: Path) -> None:
    whole = make_kv()  # 20 tokens in 6 heads, 24 entries
    with DiskStore(tmp_path) as store:
        assert store.stats().ratio is None
        store.put(key_of(0), whole, fingerprint=FIRST)
        store.put(key_of(1), whole.first(6), fingerprint=FIRST)
        store.put(key_of(2), whole.first(10), fingerprint=SECOND)
        stats = store.stats()
        assert stats.ratio == 3 * 120 / 40
        assert [made.ratio for made in stats.fingerprints] == [240 / 30, 120 / 10]
        store.put(key_of(1), whole)
        assert [made.ratio for made in store.stats().fingerprints] == [5, 12]
        with index_of(store) as index:  # as it is of entries that format 2 wrote
            columns = "num_tokens = NULL, num_entries = NULL, num_heads = NULL"
            update = f"UPDATE Origin SET {columns} WHERE fingerprint = ?"
            index.execute(update, (SECOND,))
            assert store.stats().ratio == 5
            assert [made.ratio for made in store.stats().fingerprints] == [5, None]
            index.execute("UPDATE Origin SET num_entries = 'many', num_tokens = x'ff'")
            assert store.stats().ratio is None


# Keys.


def test_an_encrypted_store_shows_neither_text_nor_documents(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "a", cipher=OLD) as store:
        store.put(key_of(0), make_kv(), ["layoffs.docx", "\ud800"])
        assert store.documents(key_of(0)) == ("layoffs.docx", "\ud800")
        assert store.keys_of("layoffs.docx") == [key_of(0)]
        assert store.is_encrypted
        assert store.stats().cipher == OLD.id
        assert store.stats().documents == 2
        assert store.check() == []
    kv = make_kv().keys[0].view(torch.uint8).numpy().tobytes()
    everything = b"".join(bytes_in(tmp_path).values())
    assert b"layoffs" not in everything
    assert kv not in everything
    assert b"o" * 32 not in everything
    with DiskStore(tmp_path / "a", cipher=OLD) as store:
        assert store.forget("layoffs.docx") == 0
        assert store.forget("\ud800") == 1


@pytest.mark.parametrize(
    ("actual", "cipher", "message"),
    [
        (OLD, NEW, f"is encrypted with key {OLD.id}, and was opened with key {NEW.id}"),
        (OLD, None, f"is encrypted with key {OLD.id}, and was opened with no key"),
        (None, NEW, f"is not encrypted, and was opened with key {NEW.id}"),
    ],
    ids=["another", "none", "one too many"],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_wrong_key_is_a_clear_error(
    tmp_path: Path, actual: Cipher | None, cipher: Cipher | None, message: str, read_only: bool
) -> None:
    with DiskStore(tmp_path, cipher=actual) as store:
        store[key_of(0)] = make_kv()
    with pytest.raises(ValueError, match=message):
        DiskStore(tmp_path, cipher=cipher, read_only=read_only)
    with DiskStore(tmp_path, cipher=actual) as store:
        assert store[key_of(0)].bit_equal(make_kv())


@pytest.mark.parametrize(
    ("old", "new"), [(OLD, NEW), (None, NEW), (OLD, None)], ids=["other", "first", "none"]
)
def test_another_key_keeps_entries_documents_pins_and_ages(
    tmp_path: Path, old: Cipher | None, new: Cipher | None
) -> None:
    with DiskStore(tmp_path, cipher=old) as store:
        for number in range(4):
            store.put(key_of(number), make_kv(number), ["shared", f"{number}"], text_id="aa")
        store.pin([key_of(1)])
        age(store, key_of(2), 1000)
        flip(store, key_of(3))
        with pytest.raises(CorruptEntryError):
            store[key_of(3)]
        flip(store, key_of(0))
        assert store.rekey(new) == 2  # not those that are bad
        assert store[key_of(1)].bit_equal(make_kv(1))
        assert store.rekey(new) == 0
    with pytest.raises(ValueError, match="was opened with"):
        DiskStore(tmp_path, cipher=old)
    with DiskStore(tmp_path, cipher=new) as store:
        stats = store.stats()
        assert (stats.entries, stats.pinned, stats.quarantined) == (2, 1, 0)
        assert stats.oldest_s is not None
        assert stats.oldest_s >= 1000
        assert store.documents(key_of(2)) == ("2", "shared")
        assert store.origin(key_of(2)) == ("aa", None)
        assert store.why_absent(key_of(0)) == "corrupt"
        assert store.forget("shared", "1") == 1
        assert store.check() == []
