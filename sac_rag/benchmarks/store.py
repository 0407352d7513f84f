"""Times of a store: reading an entry beside its bare bytes, looking up among many entries."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from sac_rag.benchmarks.timing import (
    Times,
    in_turn,
    seconds_of,
    time_in_turn,
    time_over,
    time_repeated,
)
from sac_rag.kv import AnchorKV, as_stored
from sac_rag.stores.disk import DiskStore, Progress
from sac_rag.stores.entry import decode, stored_dtype, to_bytes

# 510 tokens at 5x in SmolLM2-135M.
_SHAPE = (30, 3, 102, 64)
_KEY = "ab" * 32


@dataclass(frozen=True)
class ReadSpeed:
    """Best times of reading one chunk, from files that are in memory.

    Seconds are those until every byte of its tensors is used once, by copying it: safetensors maps
    a file, and reads nothing of it before that.

    Attributes:
        stored_dtype: Dtype of its stored keys and values.
        encrypted: Whether the store has a key.
        nbytes: Of its entry.
        store_s: Seconds to read it from the store, everything verified.
        half_s: Seconds to read the first half of its KV entries from the store.
        safetensors_s: Seconds for safetensors to load the same tensors, nothing verified.
        unused_s: Seconds for safetensors to map them, and not use them.
        read_s: Seconds to read the entry's file at once and decode it.
        mapped_s: Seconds to map the entry's file and decode it.
    """

    stored_dtype: str
    encrypted: bool
    nbytes: int
    store_s: float
    half_s: float
    safetensors_s: float
    unused_s: float
    read_s: float
    mapped_s: float

    @property
    def ratio(self) -> float:
        """The store's time over that of safetensors."""
        return self.store_s / self.safetensors_s

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as JSON holds them."""
        return {**asdict(self), "ratio": self.ratio}


def chunk(shape: tuple[int, int, int, int] = _SHAPE) -> AnchorKV:
    """Random anchors of a given shape, five tokens each."""
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(shape, generator=random).bfloat16() for _ in range(2))
    positions = torch.arange(shape[2], dtype=torch.int32) * 5
    return AnchorKV.uniform(keys, values, positions, 5 * shape[2])


def measure_reads(
    folder: Path, kv: AnchorKV | None = None, *, encrypted: bool = False, repeats: int = 200
) -> list[ReadSpeed]:
    """Times reading a chunk in bfloat16 and in int8.

    Args:
        folder: On the disk to measure; the files written there stay.
        kv: The chunk. Default: one of 510 tokens at 5x.
        encrypted: Whether to encrypt it, with a key made for this; needs the "encrypt" extra.
        repeats: Measurements of each; the best counts.
    """
    kv = chunk() if kv is None else kv
    stored = (kv, as_stored(kv, "int8"))
    return [_measure(folder / stored_dtype(value), value, encrypted, repeats) for value in stored]


def _measure(folder: Path, kv: AnchorKV, encrypted: bool, repeats: int) -> ReadSpeed:
    cipher = None
    if encrypted:
        from sac_rag.stores.cipher import Cipher

        cipher = Cipher(os.urandom(32))
    with DiskStore(folder, cipher=cipher) as store:
        store[_KEY] = kv
        (path,) = store.folder.glob("entries/*/*.kv")
        bare = folder.with_suffix(".safetensors")
        bare.write_bytes(to_bytes(kv))

        def read() -> AnchorKV:
            return decode(_KEY, np.fromfile(path, dtype=np.uint8).data, cipher)

        def mapped() -> AnchorKV:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return decode(_KEY, memoryview(data), cipher)

        ways: tuple[Callable[[], object], ...] = (
            lambda: _use(store[_KEY].tensors()),
            lambda: _use(store.read(_KEY, lambda _: kv.num_entries // 2).tensors()),
            lambda: _use(load_file(bare)),
            lambda: load_file(bare),
            lambda: _use(read().tensors()),
            lambda: _use(mapped().tensors()),
        )
        # In turn, so that all are disturbed alike.
        seconds = [times.best for times in time_in_turn(ways, repeats)]
        return ReadSpeed(stored_dtype(kv), encrypted, store.nbytes, *seconds)


@dataclass(frozen=True)
class PrefetchSpeed:
    """Median milliseconds of reading eight chunks, as `measure_reads` has them, from a DiskStore.

    Attributes:
        warm_ms: Of files in the system's memory.
        cold_ms: Of files on the disk alone.
        prefetched_ms: Of files on the disk alone, prefetched a moment before.
    """

    warm_ms: float
    cold_ms: float
    prefetched_ms: float


def measure_prefetch(folder: Path, *, ahead_s: float = 0.2, repeats: int = 10) -> PrefetchSpeed:
    """Times reading entries with and without a prefetch, in turn.

    Args:
        folder: Of the store, which stays.
        ahead_s: Seconds between the prefetch and reading.
        repeats: Measurements of each.
    """
    kv, keys = chunk(), [key_of(number) for number in range(8)]
    with DiskStore(folder) as store:
        for key in keys:
            store[key] = kv

        def seconds(*, is_dropped: bool = True, is_prefetched: bool = False) -> float:
            if is_dropped:
                drop_from_memory(folder)
            if is_prefetched:
                store.prefetch(keys)
                time.sleep(ahead_s)
            return seconds_of(lambda: [store[key] for key in keys])

        ways: list[Callable[[], float]] = [
            partial(seconds, is_dropped=False),
            seconds,
            partial(seconds, is_prefetched=True),
        ]
        medians = [statistics.median(times) for times in in_turn(ways, repeats, warm_up=True)]
    return PrefetchSpeed(*(1000 * median for median in medians))


def drop_from_memory(folder: Path) -> None:
    """Drops the files of entries from the system's memory, on Linux."""
    for path in folder.rglob("*.kv"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _use(tensors: Mapping[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.clone()


@dataclass(frozen=True)
class LookupSpeed:
    """Median times of a store of many entries.

    Attributes:
        entries: In the store.
        entry_nbytes: Bytes of one.
        index_nbytes: Bytes of the index.
        open_ms: To open and close the store.
        hit_ms: To read an entry that is there.
        read_ms: To read the bytes of its file and decode them, without a store.
        miss_ms: To look up an entry that is not there.
        put_ms: To write an entry so that it survives a power cut.
        forget_ms: To forget a document that has one entry, to the last byte.
    """

    entries: int
    entry_nbytes: int
    index_nbytes: int
    open_ms: float
    hit_ms: float
    read_ms: float
    miss_ms: float
    put_ms: float
    forget_ms: float

    @property
    def lookup_ms(self) -> float:
        """Milliseconds that the store adds to reading an entry."""
        return self.hit_ms - self.read_ms

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as JSON holds them."""
        return {**asdict(self), "lookup_ms": self.lookup_ms}


def measure_lookups(
    folder: Path, entries: int = 10_000, repeats: int = 200, on_progress: Progress | None = None
) -> LookupSpeed:
    """Fills a new store with small entries and measures it.

    Args:
        folder: Of the store, which stays.
        entries: Number of entries to fill it with.
        repeats: Of each measurement.
        on_progress: Called with the number of entries written since the last call.
    """
    kv = small()
    puts = []
    with DiskStore(folder) as store:
        for number in range(entries):
            put = partial(store.put, key_of(number), kv, [f"document {number}"])
            puts.append(seconds_of(put))
            if on_progress is not None:
                on_progress(1)
    opens = time_repeated(lambda: DiskStore(folder).close(), min(repeats, 20))
    with DiskStore(folder) as store:
        keys = [key_of(number) for number in range(0, entries, max(1, entries // repeats))]
        paths = {path.name.partition("-")[0]: path for path in folder.glob("entries/*/*.kv")}
        for key in keys:  # warms up: from now on the files are in memory in either case
            store[key]
        hits = time_over(store.__getitem__, keys)
        reads = time_over(lambda key: decode(key, paths[key].read_bytes()), keys)
        misses = time_over(store.get, [key_of(-number) for number in range(1, repeats)])
        stats = store.stats()
        forgets = time_over(store.forget, [f"document {n}" for n in range(min(entries, 5))])
    return LookupSpeed(
        entries=stats.entries,
        entry_nbytes=stats.nbytes // stats.entries,
        index_nbytes=stats.index_nbytes,
        open_ms=1000 * opens.median,
        hit_ms=1000 * hits.median,
        read_ms=1000 * reads.median,
        miss_ms=1000 * misses.median,
        put_ms=1000 * Times(tuple(puts)).median,
        forget_ms=1000 * forgets.median,
    )


def key_of(number: int) -> str:
    """The key of a synthetic entry."""
    return xxhash.xxh3_128_hexdigest(str(number).encode())


def small() -> AnchorKV:
    """An entry so small that the disk's bandwidth does not matter."""
    tensor = torch.zeros(2, 2, 4, 16, dtype=torch.bfloat16)
    return AnchorKV.uniform(tensor, tensor, torch.arange(4, dtype=torch.int32), 20)
