"""Every store: what was put in comes out bit for bit; and the store in memory."""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stores import (
    key_of,
    make_kv,
    run_python,
)

from sac_rag.stores import AnchorStore, DiskStore, MemoryStore
from sac_rag.stores.base import as_document_store

KEY = "ab" * 32
OTHER = "cd" * 32


# What every store does.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_put_in_comes_out_bit_for_bit(store: AnchorStore, dtype: torch.dtype) -> None:
    kv = make_kv(1, dtype)
    kv.keys[0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    store[KEY] = kv
    assert store[KEY].bit_equal(kv)


def test_prefetching_changes_nothing_that_is_read(store: AnchorStore) -> None:
    documents = as_document_store(store)
    documents[KEY] = make_kv()
    documents.prefetch([KEY, OTHER])
    assert documents[KEY].bit_equal(make_kv())
    assert list(documents) == [KEY]


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


def test_every_store_is_a_mutable_mapping(store: AnchorStore) -> None:
    assert isinstance(store, MutableMapping)
    assert store.setdefault(KEY, make_kv()).bit_equal(make_kv())
    store.update({OTHER: make_kv(1)})
    assert store.pop(KEY).bit_equal(make_kv())
    assert [kv.num_tokens for kv in store.values()] == [20]


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
            kv = store.get(key_of((worker + i) % 20))
            assert kv is None or kv is kvs[(worker + i) % 20]
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
