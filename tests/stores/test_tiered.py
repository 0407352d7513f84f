"""TieredStore: fills, writes through or back, skips a tier that fails, and forgets everywhere."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.models import PROSE, make_compressor
from support.stores import key_of, make_kv

from sac_rag import archive
from sac_rag.cached import CachedCompressor
from sac_rag.compressors.full import Full
from sac_rag.lm.generator import Generator
from sac_rag.origin import Origin
from sac_rag.stores import DiskStore, MemoryStore, TieredStore

KEY, OTHER = "ab" * 32, "cd" * 32


class Failing(DiskStore):
    """A disk that can be taken away."""

    fails = False

    def _named_errors(self) -> Any:
        if self.fails:
            raise OSError(errno.EIO, "the disk is gone")
        return super()._named_errors()


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Failing]:
    with Failing(tmp_path / "far") as store:
        yield store
        store.fails = False
        assert store.check() == []


@pytest.fixture
def near(tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore(tmp_path / "near") as store:
        yield store
        assert store.check() == []


def test_what_a_later_tier_has_fills_the_earlier(near: DiskStore, far: Failing) -> None:
    far.put(KEY, make_kv(), ["a"], text_id="5e", fingerprint="f1")
    memory = MemoryStore()
    with TieredStore([memory, near, far]) as store:
        assert store[KEY].bit_equal(make_kv())
        assert KEY in memory
        assert near[KEY].bit_equal(make_kv())
        assert near.origin(KEY) == ("5e", "f1")
        far.fails = True
        assert store[KEY].bit_equal(make_kv())
        assert (store.hits, store.failures) == ([1, 0, 1], [0, 0, 0])
        far.fails = False


def test_a_copy_of_what_was_read_in_part_is_whole(far: Failing) -> None:
    far[KEY] = make_kv(1, anchors=500)
    memory = MemoryStore()
    with TieredStore([memory, far]) as store:
        assert store.read(KEY, lambda _: 3).bit_equal(make_kv(1, anchors=500).first(3))
        store.flush()
        assert memory[KEY].bit_equal(make_kv(1, anchors=500))


def test_a_tier_with_too_few_entries_does_not_hide_one_with_more(far: Failing) -> None:
    whole = make_kv(1, anchors=8)
    far[KEY] = whole
    memory = MemoryStore()
    memory[KEY] = whole.first(3)
    with TieredStore([memory, far]) as store:
        assert store.read(KEY, lambda _: 3).bit_equal(whole.first(3))
        assert store.read(KEY, lambda _: 9).bit_equal(whole.first(9))
        assert store.extent(KEY) == (whole.num_tokens, whole.num_entries)


@pytest.mark.parametrize("write_back", [False, True], ids=["through", "back"])
def test_a_write_reaches_every_tier(near: DiskStore, far: Failing, write_back: bool) -> None:
    memory = MemoryStore()
    with TieredStore([memory, near, far], write_back=write_back) as store:
        store.put(KEY, make_kv(), ["a"], fingerprint="f1")
        assert KEY in memory
        assert store.documents(KEY) == ("a",)
    for tier in (near, far):
        assert tier[KEY].bit_equal(make_kv())
        assert tier.documents(KEY) == ("a",)


def test_writing_back_waits_for_nobody(far: Failing) -> None:
    reached, go = threading.Event(), threading.Event()

    class Waiting(MemoryStore):
        def __setitem__(self, key: str, kv: Any) -> None:
            reached.set()
            assert go.wait(60)
            super().__setitem__(key, kv)

    slow = Waiting()
    with TieredStore([MemoryStore(), slow], write_back=True, most_pending=2) as store:
        store[KEY] = make_kv()
        assert reached.wait(60)
        assert store.tiers[0][KEY].bit_equal(make_kv())
        assert KEY not in slow
        go.set()
        store.flush()
        assert KEY in slow


def test_a_tier_that_fails_is_skipped_and_counted(near: DiskStore, far: Failing) -> None:
    with TieredStore([near, far]) as store:
        near[KEY] = make_kv()
        far.fails = True
        store[OTHER] = make_kv(2)
        assert store[OTHER].bit_equal(make_kv(2))
        assert sorted(store) == sorted([KEY, OTHER])
        assert store.failures[0] == 0 and store.failures[1] >= 2
        with pytest.raises(OSError, match="gone"):
            store[key_of(7)]  # it may be in the tier that failed
        far.fails = False
        assert OTHER not in far
        near_fails = TieredStore([far, near])
        far.fails = True
        assert near_fails[KEY].bit_equal(make_kv())
        far.fails = False


def test_forgetting_reaches_every_tier_and_copies_without_documents(
    near: DiskStore, far: Failing
) -> None:
    memory = MemoryStore()
    far.put(KEY, make_kv(), ["a"])
    far.put(OTHER, make_kv(1), ["a", "b"])
    with TieredStore([memory, near, far]) as store:
        for key in (KEY, OTHER):
            store[key]
        assert near.documents(KEY) == ()
        assert store.forget("a") == 1
        assert [KEY in tier for tier in (memory, near, far)] == [False] * 3
        assert [OTHER in tier for tier in (memory, near, far)] == [True] * 3
        assert store.why_absent(KEY) == "forgotten"
        del store[OTHER]
        assert [len(tier) for tier in (memory, near, far)] == [0] * 3
        with pytest.raises(KeyError):
            del store[OTHER]


def test_forgetting_says_so_where_a_tier_cannot_be_reached(near: DiskStore, far: Failing) -> None:
    with TieredStore([MemoryStore(), near, far]) as store:
        store.put(KEY, make_kv(), ["a"])
        far.fails = True
        with pytest.raises(OSError, match="gone"):
            store.forget("a")
        assert KEY not in near and KEY not in store.tiers[0]
        far.fails = False
        assert store.forget("a") == 1
        assert KEY not in far


def test_what_was_read_before_it_was_forgotten_fills_nothing(near: DiskStore) -> None:
    reading, forgotten = threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def read_many(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
            entries = super().read_many(wanted)
            reading.set()
            assert forgotten.wait(60)
            return entries

    slow = Slow()
    slow[KEY] = make_kv()
    store = TieredStore([near, slow])
    thread = threading.Thread(target=lambda: store.get(KEY))
    thread.start()
    assert reading.wait(60)
    del store[KEY]
    forgotten.set()
    thread.join()
    assert KEY not in near


def test_prefetched_entries_are_in_the_first_tier(far: Failing) -> None:
    memory = MemoryStore()
    for i in range(3):
        far[key_of(i)] = make_kv(i)
    with TieredStore([memory, far]) as store:
        store.prefetch(key_of(i) for i in range(4))
        store.flush()
        assert len(memory) == 3
        with pytest.raises(TypeError, match="keys must be several str"):
            store.prefetch(KEY)


class Gated(MemoryStore):
    """A store that waits, in each read of several entries, until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[list[str]] = []
        self.reached, self.go = threading.Event(), threading.Event()

    def read_many(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        self.reads.append(list(wanted))
        self.reached.set()
        assert self.go.wait(60)
        return super().read_many(wanted)


def test_what_is_being_prefetched_is_waited_for_and_read_once() -> None:
    far = Gated()
    far[KEY] = make_kv()
    with TieredStore([MemoryStore(), far]) as store, ThreadPoolExecutor(1) as pool:
        store.prefetch([KEY])
        assert far.reached.wait(60)
        asked = pool.submit(store.__getitem__, KEY)
        far.go.set()
        assert asked.result(60).bit_equal(make_kv())
        assert far.reads == [[KEY]]


def test_a_prefetch_that_has_not_begun_is_not_waited_for() -> None:
    far = Gated()
    far[KEY] = far[OTHER] = make_kv()
    with TieredStore([MemoryStore(), far]) as store, ThreadPoolExecutor(1) as pool:
        store.prefetch([KEY])
        assert far.reached.wait(60)
        store.prefetch([OTHER])
        far.reached.clear()
        asked = pool.submit(store.__getitem__, OTHER)
        assert far.reached.wait(60)  # in the thread that asks
        far.go.set()
        assert asked.result(60).bit_equal(make_kv())
        store.flush()
        assert far.reads == [[KEY], [OTHER]]


def test_a_prefetch_that_fails_leaves_the_answer_to_itself(far: Failing) -> None:
    far[KEY] = make_kv()
    with TieredStore([MemoryStore(), far]) as store:
        far.fails = True
        store.prefetch([KEY])
        store.flush()
        far.fails = False
        assert store[KEY].bit_equal(make_kv())


def test_an_answer_comes_from_the_tiers_that_are_there(far: Failing, llama: Generator) -> None:
    store = TieredStore([MemoryStore(), far])
    cached = CachedCompressor(make_compressor(llama, "learned"), store)
    cached.compress(PROSE)
    far.fails = True
    assert cached.fetch(PROSE[:3]).misses == [None] * 3
    store.tiers[0].clear()
    assert cached.fetch(PROSE[:3]).misses == ["unreadable"] * 3
    assert cached.fetch(PROSE[:3]).misses == [None] * 3
    far.fails = False


def test_a_store_without_tiers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tier"):
        TieredStore([])


def test_an_archive_may_be_the_last_tier(tmp_path: Path) -> None:
    config = Full.default_config()
    origin = Origin(config.fingerprint_fields(), config)
    archive.write(tmp_path / "archive", origin, [(KEY, make_kv(), ["a"], "5e")])
    memory = MemoryStore()
    with TieredStore([memory, archive.Archive(tmp_path / "archive")]) as store:
        assert store[KEY].bit_equal(make_kv())
        assert store.origin_of(KEY) == ("5e", origin.fingerprint)
        store[OTHER] = make_kv(1)
        assert sorted(memory) == sorted([KEY, OTHER])
        with pytest.raises(OSError, match="can only be read"):
            del store[KEY]
        assert KEY not in memory
