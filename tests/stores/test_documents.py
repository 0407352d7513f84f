"""Documents in a store: what is forgotten is gone to the last byte, what is shared stays."""

from __future__ import annotations

import errno
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stores import bytes_in, entry_files, file_of, flip, index_of, key_of, make_kv

from sac_rag.errors import CorruptEntryError
from sac_rag.namespace import Namespace
from sac_rag.stores import DiskStore
from sac_rag.stores.disk.index import Extent, NewEntry

KEY = "ab" * 32
OTHER = "cd" * 32
TEXT_ID = "5e" * 32
FINGERPRINT = "f1" * 32


def traces(folder: Path, *needles: bytes) -> list[Path]:
    """Files in whose bytes or names one of these can be found."""
    return [
        path for path, data in bytes_in(folder).items() if any(needle in data for needle in needles)
    ]


def kv_bytes(seed: int) -> bytes:
    """Bytes that are in the entry of `make_kv(seed)` and in no other."""
    return make_kv(seed).keys[0].view(torch.uint8).numpy().tobytes()


def test_forgetting_a_document_deletes_what_only_it_uses(disk: DiskStore) -> None:
    disk.put(key_of(0), make_kv(0), documents=["a"])
    disk.put(key_of(1), make_kv(1), documents=["a", "b"])
    disk.put(key_of(2), make_kv(2), documents=["b"])
    disk[key_of(3)] = make_kv(3)
    assert disk.forget("a") == 1
    assert sorted(disk) == sorted(key_of(i) for i in (1, 2, 3))
    assert disk.documents(key_of(1)) == ("b",)
    assert disk[key_of(1)].bit_equal(make_kv(1))
    assert (disk.forget("a"), disk.forget("nobody knows it")) == (0, 0)
    assert disk.forget("b") == 2
    assert list(disk) == [key_of(3)]


def test_several_documents_are_forgotten_at_once(disk: DiskStore) -> None:
    disk.put(key_of(0), make_kv(0), documents=["a", "b"])
    disk.put(key_of(1), make_kv(1), documents=["c"])
    assert disk.forget("a", "b") == 1
    assert list(disk) == [key_of(1)]


def test_a_document_that_changed_keeps_the_entries_it_still_has(disk: DiskStore) -> None:
    for i in range(3):
        disk.put(key_of(i), make_kv(i), documents=["report"])
    disk.put(key_of(1), make_kv(1), documents=["summary"])
    disk.put(key_of(9), make_kv(9), documents=["report"])  # what is new in it
    assert disk.replace_document("report", [key_of(0), key_of(9)]) == 1
    assert sorted(disk) == sorted(key_of(i) for i in (0, 1, 9))
    assert disk.documents(key_of(1)) == ("summary",)
    assert disk.keys_of("report") == sorted([key_of(0), key_of(9)])
    assert disk.why_absent(key_of(2)) == "forgotten"


def test_many_documents_are_replaced_at_once(disk: DiskStore) -> None:
    for number in range(4):
        disk.put(key_of(number), make_kv(number), ["a", "b"] if number < 2 else ["b"])
    assert disk.replace_documents({"a": [key_of(0)], "b": [key_of(3)]}) == 2
    assert disk.documents(key_of(0)) == ("a",)
    assert disk.documents(key_of(3)) == ("b",)
    assert len(disk) == 2
    with pytest.raises(TypeError, match="document ids must be str"):
        disk.replace_documents({5: []})  # type: ignore[dict-item]


def test_what_another_compressor_made_of_a_text_that_stayed_is_kept(disk: DiskStore) -> None:
    for number, text in enumerate(["aa", "bb"]):
        disk.put(key_of(number), make_kv(), ["report"], text_id=text, fingerprint="01")
        disk.put(key_of(10 + number), make_kv(), ["report"], text_id=text, fingerprint="02")
    assert disk.replace_document("report", [key_of(10)]) == 2  # without the second text
    assert sorted(disk) == sorted([key_of(0), key_of(10)])


@pytest.mark.parametrize("documents", [[5], [None], ["a", b"b"]])
def test_what_is_forgotten_must_be_str(disk: DiskStore, documents: list[object]) -> None:
    with pytest.raises(TypeError, match="document ids must be str"):
        disk.forget(*documents)  # type: ignore[arg-type]


def test_no_byte_of_a_forgotten_document_stays_in_the_folder(tmp_path: Path) -> None:
    name, other = "memo-of-the-board-1848", "lexicon"
    with DiskStore(tmp_path / "store") as store:
        store.note(FINGERPRINT, {"config.ratio": "5"})
        store.put(key_of(0), make_kv(0), [name], text_id=TEXT_ID, fingerprint=FINGERPRINT)
        store.put(key_of(1), make_kv(1), [name], text_id=TEXT_ID[:-1] + "f")
        store.put(key_of(2), make_kv(2), [name, other])
        store.put(key_of(3), make_kv(3), [other])
        store.pin([key_of(0)])
        # One of its entries is in quarantine, one was evicted, one was overwritten.
        flip(store, key_of(1))
        with pytest.raises(CorruptEntryError):
            store[key_of(1)]
        store[key_of(0)] = make_kv(0)
        gone = [name.encode(), key_of(0).encode(), key_of(1).encode(), TEXT_ID[:-1].encode()]
        gone += [kv_bytes(0), kv_bytes(1)]
        assert all(traces(store.folder, needle) for needle in gone)  # found as long as it is there
        assert store.forget(name) == 1
        assert traces(store.folder, *gone) == []
        assert traces(store.folder, kv_bytes(2)) != []
        assert (store.why_absent(key_of(0)), store.why_absent(key_of(1))) == ("forgotten",) * 2
        assert store.why_absent(key_of(1), text_id=TEXT_ID, fingerprint="aa") == "forgotten"
        assert store.check() == []
    assert traces(tmp_path, *gone) == []


def test_no_byte_stays_where_thousands_are_forgotten_among_thousands(tmp_path: Path) -> None:
    """Deleted cells of a B-tree that is split, merged and balanced are overwritten too."""
    order = random.Random(0)
    names = {i: f"document {i} {'x' * order.randrange(200)}" for i in range(600)}
    with DiskStore(tmp_path) as store, store._entries.index.database.transaction():
        extent = Extent(num_tokens=20, num_entries=24, num_heads=6)
        for i, name in names.items():
            entry = NewEntry(key_of(i), extent, [name], key_of(10_000 + i), FINGERPRINT)
            store._entries.index.add(entry, "no file", 0)
    gone = order.sample(sorted(names), 400)
    with DiskStore(tmp_path) as store:
        for start in range(0, 400, 50):
            store.forget(*(names[i] for i in gone[start : start + 50]))
        everything = b"".join(bytes_in(tmp_path).values())
    assert not [i for i in gone if f"document {i} ".encode() in everything]
    assert not [
        i
        for i in gone
        if key_of(i).encode() in everything or key_of(10_000 + i).encode() in everything
    ]
    assert all(f"document {i} ".encode() in everything for i in set(names) - set(gone))


def test_an_evicted_entry_leaves_nothing_that_forgetting_would_not_find(tmp_path: Path) -> None:
    size = 2500
    with DiskStore(tmp_path, max_bytes=size) as store:
        store.put(key_of(0), make_kv(0), ["secret"])
        flip(store, key_of(0))
        with pytest.raises(CorruptEntryError):
            store[key_of(0)]
        store.put(key_of(0), make_kv(0), ["secret"])  # and its bad bytes are in quarantine
        store.put(key_of(1), make_kv(1, anchors=8), ["other"])
        assert list(store) == [key_of(1)]
        store.forget("secret")
        assert traces(store.folder, kv_bytes(0), b"secret", key_of(0).encode()) == []
        assert store.check() == []


def test_forgetting_says_so_where_a_reader_keeps_the_log(disk: DiskStore) -> None:
    disk.put(key_of(0), make_kv(0), ["a"])
    disk._entries.index.database.lock_seconds = 0
    with index_of(disk) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM Owner").fetchall()
        with pytest.raises(OSError, match="log of the index") as error:
            disk.forget("a")
        assert error.value.errno == errno.EBUSY
        assert key_of(0) not in disk
        reader.execute("ROLLBACK")
    disk.gc()
    assert traces(disk.folder, key_of(0).encode()) == []


def test_an_id_planted_in_the_index_leads_nowhere(disk: DiskStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    with index_of(disk) as index:
        for key in ("../../outside", str(outside), b"\xff", 5):
            index.execute("INSERT INTO Owner VALUES (?, ?)", (b"a", key))
    assert disk.forget("a") == 0
    assert outside.read_bytes() == b"mine"


def test_a_store_of_format_1_keeps_its_documents(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        store.put(key_of(0), make_kv(0))
        store[key_of(1)] = make_kv(1)
    with index_of(store) as index:  # as format 1 had it
        for table in ("Owner", "Origin", "Departed", "Meta"):
            index.execute(f"DROP TABLE {table}")
        index.execute("DROP INDEX Cache_evictable")
        index.execute("PRAGMA user_version = 0")
        update = "UPDATE Cache SET tag = ? WHERE key = ?"
        index.execute(update, ('["a", "\\ud800"]', key_of(0)))
    (tmp_path / "store.json").write_text('{"magic": "sac_rag.DiskStore", "format": 1}')
    with pytest.raises(ValueError, match=r"format 1, .* open it once with write permission"):
        DiskStore(tmp_path, read_only=True)
    for _ in range(2):
        with DiskStore(tmp_path) as store:
            assert store.documents(key_of(0)) == ("a", "\ud800")
            assert store.documents(key_of(1)) == ()
            assert store.stats().pinned == 0
            assert store.check() == []
    assert '"format": 3' in (tmp_path / "store.json").read_text()


def test_a_store_of_format_2_keeps_everything_but_its_entries_bytes(tmp_path: Path) -> None:
    old = (Path(__file__).parents[1] / "data" / "entry-2-bfloat16.kv").read_bytes()
    key = "ab" * 32
    with DiskStore(tmp_path) as store:
        store.put(key, make_kv(), ["a"], text_id=TEXT_ID, fingerprint=FINGERPRINT)
        store.pin([key])
        path = file_of(store, key)
    path.write_bytes(old)
    with index_of(store) as index:  # as format 2 had it
        for column in ("num_tokens", "num_entries", "num_heads"):
            index.execute(f"ALTER TABLE Origin DROP COLUMN {column}")
        index.execute("UPDATE Cache SET size = ?", (len(old),))
        index.execute("UPDATE Settings SET value = ? WHERE key = 'size'", (len(old),))
        index.execute("PRAGMA user_version = 2")
    (tmp_path / "store.json").write_text('{"magic": "sac_rag.DiskStore", "format": 2}')
    with pytest.raises(ValueError, match=r"format 2, .* open it once with write permission"):
        DiskStore(tmp_path, read_only=True)
    for _ in range(2):
        with DiskStore(tmp_path) as store:
            stats = store.stats()
            assert (stats.entries, stats.pinned, stats.ratio) == (1, 1, None)
            assert store.documents(key) == ("a",)
            assert store.origin(key) == (TEXT_ID, FINGERPRINT)
            assert key not in store  # it cannot be read, and so it is put again
            with pytest.raises(KeyError):
                store.extent(key)
    with DiskStore(tmp_path) as store:
        with pytest.raises(CorruptEntryError) as error:
            store.read(key, lambda _: 1)
        assert error.value.reason == "format"
        assert store.why_absent(key) == "format"
        store.put(key, make_kv())
        assert store.documents(key) == ("a",)
        assert store.extent(key) == (20, 24)
        assert store.check() == []


def test_an_entry_of_format_2_is_replaced_by_the_next_that_is_put(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        store.put(key_of(0), make_kv(0), ["a"])
        with index_of(store) as index:
            index.execute("UPDATE Origin SET num_entries = NULL")
        store.put(key_of(0), make_kv(1).first(3), ["b"])
        assert store[key_of(0)].bit_equal(make_kv(1).first(3))
        assert store.documents(key_of(0)) == ("a", "b")
        assert store.check() == []


# Of entries that are put.


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


def test_many_may_forget_and_collect_garbage_at_once(tmp_path: Path) -> None:
    """Of two that empty the log, SQLite tells one at once that it is busy: it tries again."""
    start = threading.Barrier(4)

    def forget(worker: int) -> int:
        deleted = 0
        with DiskStore(tmp_path / "store") as store:
            for number in range(8):
                store.put(key_of(8 * worker + number), make_kv(number), [f"{worker}/{number}"])
            start.wait(timeout=60)
            for number in range(8):
                deleted += store.forget(f"{worker}/{number}")
                store.gc()
        return deleted

    DiskStore(tmp_path / "store").close()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(forget, range(4))) == [8] * 4
    with DiskStore(tmp_path / "store") as store:
        assert store.check() == []


def test_no_document_has_the_id_of_one_in_another_namespace(disk: DiskStore) -> None:
    theirs, public = Namespace("tenant"), Namespace("")
    disk.put(key_of(0), make_kv(), [theirs.document_id("pay.txt")])
    named_alike = public.document_id(theirs.document_id("pay.txt"))
    assert disk.forget(named_alike) == 0
    disk.put(key_of(1), make_kv(), [named_alike])
    assert disk.forget(named_alike) == 1
    assert public.document_id("pay.txt") == "pay.txt"
    assert disk.forget(theirs.document_id("pay.txt")) == 1


def test_the_store_of_a_collection_is_opened_by_the_folder_of_the_collection(
    tmp_path: Path,
) -> None:
    """As `sac-rag precompress --store FOLDER --no-index` makes it."""
    (tmp_path / "collection.json").write_text("{}")
    with DiskStore(tmp_path / "anchors") as store:
        store[key_of(0)] = make_kv()
    with DiskStore(tmp_path) as store:
        assert store.folder == (tmp_path / "anchors").resolve()
        assert store[key_of(0)].bit_equal(make_kv())
    with DiskStore(tmp_path / "store") as store:  # a store of its own is not looked past
        (tmp_path / "store" / "collection.json").write_text("{}")
    with DiskStore(tmp_path / "store") as store:
        assert store.folder == (tmp_path / "store").resolve()
