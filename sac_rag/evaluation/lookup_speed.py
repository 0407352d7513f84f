"""How long a DiskStore takes to open, to look up, to write and to forget. Knows no models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from sac_rag.kv import AnchorKV
from sac_rag.stores.disk import DiskStore
from sac_rag.stores.entry import decode
from sac_rag.stores.upkeep import Progress


@dataclass(frozen=True)
class LookupSpeed:
    """A store of many entries, measured; medians.

    Attributes:
        entries: In the store.
        entry_nbytes: Bytes of one.
        index_nbytes: Bytes of the index.
        open_ms: To open the store, and close it.
        hit_ms: To read an entry that is there.
        read_ms: To read the bytes of its file and decode them, without a store.
        miss_ms: To find out that an entry is not there.
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
        """What the store adds to reading an entry."""
        return self.hit_ms - self.read_ms


def measure_lookups(
    folder: Path, entries: int = 10_000, repeats: int = 200, on_progress: Progress | None = None
) -> LookupSpeed:
    """Fills a new store with small entries and measures it.

    Args:
        folder: Where; its store is left there.
        entries: How many to fill it with.
        repeats: Of each measurement.
        on_progress: Called with the entries written since the last call.
    """
    kv = _small()
    puts = []
    with DiskStore(folder) as store:
        for number in range(entries):
            puts.append(_timed(lambda n=number: store.put(_key(n), kv, [f"document {n}"])))  # type: ignore[misc]
            if on_progress is not None:
                on_progress(1)
    opening = [_timed(lambda: DiskStore(folder).close()) for _ in range(min(repeats, 20))]
    with DiskStore(folder) as store:
        step = max(1, entries // repeats)
        keys = [_key(number) for number in range(0, entries, step)]
        paths = {path.name.partition("-")[0]: path for path in folder.glob("entries/*/*.kv")}
        for key in keys:  # the second time, the files are in memory in either case
            store[key]
        hits = [_timed(lambda key=key: store[key]) for key in keys]  # type: ignore[misc]
        reads = [_timed(lambda key=key: decode(key, paths[key].read_bytes())) for key in keys]  # type: ignore[misc]
        misses = [_timed(lambda n=n: store.get(_key(-n))) for n in range(1, repeats)]  # type: ignore[misc]
        stats = store.stats()
        forgotten = range(min(entries, 5))
        forgets = [_timed(lambda n=n: store.forget(f"document {n}")) for n in forgotten]  # type: ignore[misc]
    return LookupSpeed(
        entries=stats.entries,
        entry_nbytes=stats.nbytes // stats.entries,
        index_nbytes=stats.index_nbytes,
        open_ms=statistics.median(opening),
        hit_ms=statistics.median(hits),
        read_ms=statistics.median(reads),
        miss_ms=statistics.median(misses),
        put_ms=statistics.median(puts),
        forget_ms=statistics.median(forgets),
    )


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def _key(number: int) -> str:
    return xxhash.xxh3_128_hexdigest(str(number).encode())


def _small() -> AnchorKV:
    """So small that what is measured is not the disk."""
    tensor = torch.zeros(2, 2, 4, 16, dtype=torch.bfloat16)
    return AnchorKV.uniform(tensor, tensor, torch.arange(4, dtype=torch.int32), 20)
