"""How long a chunk takes to be read: from a store, and its bare bytes. Knows no models."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sac_rag.kv import AnchorKV
from sac_rag.quantize import as_stored
from sac_rag.stores.disk import DiskStore
from sac_rag.stores.entry import decode
from sac_rag.stores.payload import stored_dtype, to_bytes

# 510 tokens at 5x in SmolLM2-135M.
_SHAPE = (30, 3, 102, 64)
_KEY = "ab" * 32


@dataclass(frozen=True)
class ReadSpeed:
    """One chunk, read over and over from files that are in memory; the best of many.

    Seconds are those until every byte of its tensors was used once, by copying it: safetensors maps
    a file, and reads nothing of it before that.

    Attributes:
        stored_dtype: What its keys and values are kept in.
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
        """The store's time in terms of safetensors'."""
        return self.store_s / self.safetensors_s


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
        folder: On the disk to measure; what is written there stays.
        kv: The chunk. Default: one of 510 tokens at 5x.
        encrypted: Whether to encrypt it, with a key made for this; needs the "encrypt" extra.
        repeats: Best of so many.
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
        seconds = _best(ways, repeats)
        return ReadSpeed(stored_dtype(kv), encrypted, store.nbytes, *seconds)


def _use(tensors: Mapping[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.clone()


def _best(ways: tuple[Callable[[], object], ...], repeats: int) -> list[float]:
    """The shortest time of each way; in turn, so that all are disturbed alike."""
    best = [float("inf")] * len(ways)
    for _ in range(repeats):
        for number, way in enumerate(ways):
            started = time.perf_counter()
            way()
            best[number] = min(best[number], time.perf_counter() - started)
    return best
