"""What a store keeps and lets go: pins, the cap, ages; nothing goes unseen."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from support.stores import age, entry_files, file_of, flip, index_of, key_of, make_kv

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.stores import DiskStore
from sac_rag.stores.entry import encode

KEY = "ab" * 32
OTHER = "cd" * 32
SIZE = len(encode(key_of(0), make_kv()))


def older(store: DiskStore, seconds: float = 3600) -> None:
    with index_of(store) as index:
        index.execute("UPDATE Cache SET access_time = access_time - ?", (seconds,))


# Pins.


def test_a_pinned_entry_is_never_evicted_even_by_another_process(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        store[key_of(0)] = make_kv()
        assert store.pin([key_of(0), key_of(7)]) == 1  # one of them is not there
    with DiskStore(tmp_path, max_bytes=2 * SIZE) as store:
        for i in range(1, 6):
            older(store)
            store[key_of(i)] = make_kv(i)
        assert sorted(store) == sorted([key_of(0), key_of(5)])
        assert store.stats().pinned == 1
        assert store.unpin([key_of(0)]) == 1
        older(store)
        store[key_of(6)] = make_kv(6)
        store[key_of(7)] = make_kv(7)
        assert key_of(0) not in store
        assert store.check() == []


def test_a_pin_stays_when_its_entry_is_overwritten(tmp_path: Path) -> None:
    with DiskStore(tmp_path, max_bytes=2 * SIZE) as store:
        store[key_of(0)] = make_kv()
        store.pin([key_of(0)])
        store[key_of(0)] = make_kv(1)
        for i in range(1, 4):
            store[key_of(i)] = make_kv(i)
        assert store[key_of(0)].bit_equal(make_kv(1))


def test_where_pinned_entries_leave_no_room_a_new_one_is_not_kept_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DiskStore(tmp_path, max_bytes=2 * SIZE) as store:
        for i in range(2):
            store[key_of(i)] = make_kv(i)
        store.pin([key_of(0), key_of(1)])
        store.put(key_of(2), make_kv(2), ["a"])
        assert sorted(store) == sorted([key_of(0), key_of(1)])
        assert store.nbytes == 2 * SIZE
        assert f"{key_of(2)} not kept" in caplog.text
        assert (store.evictions, store.stats().evicted) == (1, 1)
        assert store.why_absent(key_of(2)) == "evicted"
        assert store.check() == []


# The cap.


def test_eviction_is_logged_counted_and_remembered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "sac_rag.stores"),
        DiskStore(tmp_path, max_bytes=2 * SIZE) as store,
    ):
        for i in range(5):
            store[key_of(i)] = make_kv(i)
    said = [record for record in caplog.records if "evicted" in record.getMessage()]
    assert [record.levelno for record in said] == [logging.INFO] * 3
    assert key_of(0) in said[0].getMessage()
    with DiskStore(tmp_path) as store:  # the count is the folder's, not the object's
        assert (store.evictions, store.stats().evicted) == (0, 3)
        assert store.stats().evicted_nbytes == 3 * SIZE
        assert [store.why_absent(key_of(i)) for i in range(3)] == ["evicted"] * 3
        store[key_of(0)] = make_kv()
        del store[key_of(0)]
        assert store.why_absent(key_of(0)) == "absent"


def test_what_is_remembered_of_departed_entries_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sac_rag.stores.disk.index._TOMBSTONES", 10)
    with DiskStore(tmp_path, max_bytes=SIZE) as store:
        for i in range(30):
            store[key_of(i)] = make_kv(i)
        with index_of(store) as index:
            assert index.execute("SELECT COUNT(*) FROM Departed").fetchone() == (10,)
        reasons = [store.why_absent(key_of(i)) for i in range(29)]
        assert reasons == ["absent"] * 19 + ["evicted"] * 10


# Age.


def test_an_entry_that_is_too_old_is_not_there(tmp_path: Path) -> None:
    with DiskStore(tmp_path, max_age_s=60) as store:
        for i in range(3):
            store.put(key_of(i), make_kv(i), ["a"])
        age(store, key_of(0), 61)
        age(store, key_of(1), 59)
        age(store, key_of(2), -60)  # a clock that was set back
        assert store.why_absent(key_of(0)) == "expired"
        assert key_of(0) not in store
        assert sorted(store) == sorted([key_of(1), key_of(2)])
        assert len(store) == 2
        path = file_of(store, key_of(0))
        with pytest.raises(KeyError) as absent:
            store[key_of(0)]
        assert not isinstance(absent.value, CorruptEntryError)
        assert not path.exists()
        assert store.why_absent(key_of(0)) == "expired"
        assert store[key_of(1)].bit_equal(make_kv(1))
        assert store.check() == []


def test_putting_an_entry_that_is_too_old_writes_it_again(tmp_path: Path) -> None:
    with DiskStore(tmp_path, max_age_s=60) as store:
        store.put(key_of(0), make_kv(1))
        age(store, key_of(0), 61)
        store.put(key_of(0), make_kv(2))
        assert store[key_of(0)].bit_equal(make_kv(2))


def test_without_a_greatest_age_nothing_is_too_old(disk: DiskStore) -> None:
    disk[key_of(0)] = make_kv()
    age(disk, key_of(0), 10 * 365 * 24 * 3600)
    assert disk[key_of(0)].bit_equal(make_kv())


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_greatest_age_that_is_none_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="max_age_s must be more than 0"):
        DiskStore(tmp_path / "store", max_age_s=seconds)
    assert not (tmp_path / "store").exists()


# Reasons.


OLD, NEW = "01" * 32, "02" * 32
TEXT_ID = "5e" * 32


def put(store: DiskStore, number: int, kv: AnchorKV, fingerprint: str | None = OLD) -> None:
    store.put(key_of(number), kv, text_id=TEXT_ID, fingerprint=fingerprint)


def why(store: DiskStore, number: int = 9) -> str:
    return store.why_absent(key_of(number), text_id=TEXT_ID, fingerprint=NEW)


def test_the_fields_that_differ_are_named(disk: DiskStore) -> None:
    assert why(disk) == "absent"
    put(disk, 0, make_kv())
    assert why(disk) == f"fingerprint: was {OLD[:12]}, is {NEW[:12]}"  # nothing was noted
    disk.note(OLD, {"config.ratio": "5", "weights": "aa" * 32, "gone": "x", "same": "y"})
    disk.note(NEW, {"config.ratio": "4", "weights": "bb" * 32, "new": "z", "same": "y"})
    assert why(disk) == (
        "fingerprint: config.ratio was 5, is 4; gone was x, is not there; new was not there, is z; "
        f"weights was {'aa' * 12}…, is {'bb' * 12}…"
    )
    assert disk.why_absent(key_of(9), text_id="77" * 32, fingerprint=NEW) == "absent"
    assert disk.why_absent(key_of(9)) == "absent"


def test_of_several_other_fingerprints_the_most_similar_is_named(disk: DiskStore) -> None:
    disk.note(NEW, {"a": "1", "b": "1", "c": "1"})
    for i, fields in enumerate([{"a": "1"}, {"a": "1", "b": "1", "c": "2"}, {}]):
        disk.note(f"{i}" * 64, fields)
        put(disk, i, make_kv(), f"{i}" * 64)
    assert why(disk) == "fingerprint: c was 2, is 1"


def test_what_befell_the_very_entry_comes_before_its_fingerprint(disk: DiskStore) -> None:
    put(disk, 0, make_kv())
    put(disk, 9, make_kv(), NEW)
    flip(disk, key_of(9))
    with pytest.raises(CorruptEntryError):
        disk[key_of(9)]
    assert why(disk) == "corrupt"
    put(disk, 9, make_kv(), NEW)
    del disk[key_of(9)]
    assert why(disk).startswith("fingerprint: ")


def test_manifests_outlive_the_process_and_are_written_once(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        store.note(OLD, {"a": "1"})
        path = tmp_path / "fingerprints" / f"{OLD}.json"
        before = path.stat()
        store.note(OLD, {"a": "1"})
        assert path.stat().st_ino == before.st_ino
        assert before.st_mode & 0o777 == 0o600
    with DiskStore(tmp_path, read_only=True) as store:
        assert store.fields(OLD) == {"a": "1"}
        assert store.fields(NEW) is None
        store.note(NEW, {"a": "2"})  # remembered, and not written
        assert store.fields(NEW) == {"a": "2"}
    assert [path.name for path in (tmp_path / "fingerprints").iterdir()] == [f"{OLD}.json"]


@pytest.mark.parametrize("text", [b"", b"[]", b'{"a": 1}', b"\xff", b"[" * 5000])
def test_a_manifest_that_is_none_is_not_believed(disk: DiskStore, text: bytes) -> None:
    disk.note(OLD, {"a": "1"})
    with DiskStore(disk.folder) as other:
        (disk.folder / "fingerprints" / f"{OLD}.json").write_bytes(text)
        put(other, 0, make_kv())
        other.note(NEW, {"a": "2"})
        assert other.fields(OLD) is None
        assert why(other).startswith("fingerprint: was ")
        other.note(OLD, {"a": "1"})
        assert why(other) == "fingerprint: a was 1, is 2"


@pytest.mark.parametrize("fingerprint", ["", "../x", "A" * 64, 5])
def test_a_fingerprint_that_is_no_digest_is_refused(disk: DiskStore, fingerprint: str) -> None:
    with pytest.raises(ValueError, match="must be a lower-case hex digest"):
        disk.note(fingerprint, {})
    with pytest.raises(TypeError, match="fields must be str"):
        disk.note(OLD, {"a": 1})  # type: ignore[dict-item]


# Counts.


def test_hits_and_misses_are_counted_across_processes(tmp_path: Path) -> None:
    for _ in range(2):
        with DiskStore(tmp_path) as store:
            store[key_of(0)] = make_kv()
            for i in range(4):
                store.get(key_of(0))
                if store.get(key_of(1)) is None and i:
                    store.why_absent(key_of(1))
            assert key_of(1) not in store  # asking does not count
    with DiskStore(tmp_path) as store:
        stats = store.stats()
    assert (stats.hits, stats.misses, stats.hit_rate) == (8, 8, 0.5)
    assert stats.reasons == {"absent": 6}


def test_counting_writes_nothing_at_every_read(disk: DiskStore) -> None:
    disk[key_of(0)] = make_kv()
    with index_of(disk) as index:
        version = index.execute("PRAGMA data_version").fetchone()
        for _ in range(100):
            disk[key_of(0)]
        assert index.execute("PRAGMA data_version").fetchone() == version
        for _ in range(1000):
            disk[key_of(0)]
        assert index.execute("PRAGMA data_version").fetchone() != version
    assert disk.stats().hits == 1100


def test_noting_that_an_entry_was_used_is_not_flushed(disk: DiskStore) -> None:
    """It would make a read a hundred times slower; what is written is flushed."""
    disk[key_of(0)] = make_kv()
    assert disk._entries.index.database.sql("PRAGMA synchronous") == [(2,)]
    older(disk)
    disk[key_of(0)]
    assert disk._entries.index.database.sql("PRAGMA synchronous") == [(1,)]
    assert disk.stats().unused_s is not None
    assert disk.stats().unused_s < 60


def test_a_reader_that_cannot_count_reads_all_the_same(disk: DiskStore) -> None:
    disk[key_of(0)] = make_kv()
    with index_of(disk) as index:
        index.execute("BEGIN IMMEDIATE")
        started = time.perf_counter()
        for _ in range(1001):
            disk[key_of(0)]
        assert time.perf_counter() - started < 30
        index.execute("ROLLBACK")
    assert disk.stats().hits == 1001


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
