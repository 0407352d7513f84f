"""Random reads of an ObjectStore: seconds and requests per read, of small synthetic entries."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sac_rag.benchmarks.store import key_of, small
from sac_rag.benchmarks.timing import seconds_of
from sac_rag.stores.objects import ObjectStore


@dataclass(frozen=True)
class ObjectReads:
    """Figures of an ObjectStore of synthetic entries.

    Attributes:
        entries: In the store.
        entry_nbytes: Bytes of one.
        shards: Objects that hold them.
        open_s: Seconds to open it, which reads the index.
        open_requests: Requests for that.
        p50_ms: Median milliseconds of a read.
        p99_ms: Milliseconds that 99 in 100 reads stay below.
        requests_per_read: Requests, mean over the reads.
    """

    entries: int
    entry_nbytes: int
    shards: int
    open_s: float
    open_requests: int
    p50_ms: float
    p99_ms: float
    requests_per_read: float

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as JSON holds them."""
        return asdict(self)


def measure_object_reads(
    url: str,
    entries: int = 100_000,
    reads: int = 2000,
    shard_bytes: int = 64 * 2**20,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> ObjectReads:
    """Fills a new store with entries of equal content and reads some at random.

    Args:
        url: Of an empty folder, as fsspec takes it; what is written there stays.
        entries: To fill it with.
        reads: To time.
        shard_bytes: Of a shard.
        seed: Of the order.
        on_progress: Called with the number of entries written since the last call.
    """
    kv = small()
    with ObjectStore(url, shard_bytes=shard_bytes) as writer:
        for number in range(entries):
            writer.put(key_of(number), kv, [f"document {number}"])
            if on_progress is not None:
                on_progress(1)
    opened: list[ObjectStore] = []
    open_s = seconds_of(lambda: opened.append(ObjectStore(url, read_only=True)))
    (store,) = opened
    open_requests = store.objects.requests
    draw = random.Random(seed)
    keys = [key_of(draw.randrange(entries)) for _ in range(reads)]
    seconds = sorted(seconds_of(partial(store.__getitem__, key)) for key in keys)
    return ObjectReads(
        entries=len(store),
        entry_nbytes=store.nbytes // len(store),
        shards=store.num_shards,
        open_s=open_s,
        open_requests=open_requests,
        p50_ms=1000 * seconds[reads // 2],
        p99_ms=1000 * seconds[reads * 99 // 100],
        requests_per_read=(store.objects.requests - open_requests) / reads,
    )
