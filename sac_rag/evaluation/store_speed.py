"""How long a chunk takes to be read: from a store, and its bare bytes. Knows no models."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from sac_rag.kv import AnchorKV
from sac_rag.quantize import as_stored
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.disk import DiskStore
from sac_rag.stores.entry import decode
from sac_rag.stores.payload import stored_dtype, to_bytes

# 510 tokens at 5x in SmolLM2-135M.
_SHAPE = (30, 3, 102, 64)
_KEY = "ab" * 32


@dataclass(frozen=True)
class ReadSpeed:
    """One chunk, read over and over from files that are in memory; the best of many.

    Attributes:
        stored_dtype: What its keys and values are kept in.
        encrypted: Whether the store has a key.
        nbytes: Of its entry.
        store_s: Seconds to read it from the store, everything verified.
        safetensors_s: Seconds for safetensors to read the same tensors, nothing verified.
        read_s: Seconds to read the entry's file at once and decode it.
        mapped_s: Seconds to map the entry's file and decode it.
    """

    stored_dtype: str
    encrypted: bool
    nbytes: int
    store_s: float
    safetensors_s: float
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
    return AnchorKV(keys, values, positions, 5 * shape[2])


def measure_reads(
    folder: Path, kv: AnchorKV | None = None, *, encrypted: bool = False, repeats: int = 200
) -> list[ReadSpeed]:
    """Times reading a chunk in bfloat16 and in int8.

    Args:
        folder: On the disk to measure; what is written there stays.
        kv: The chunk. Default: one of 510 tokens at 5x.
        encrypted: Whether to encrypt it with a key made for this.
        repeats: Best of so many.
    """
    cipher = Cipher(os.urandom(32)) if encrypted else None
    kv = chunk() if kv is None else kv
    rows = []
    for stored in (kv, as_stored(kv, "int8")):
        name = stored_dtype(stored)
        bare = folder / f"{name}.safetensors"
        bare.write_bytes(to_bytes(stored))
        with DiskStore(folder / name, cipher=cipher) as store:
            store[_KEY] = stored
            (path,) = store.folder.glob("entries/*/*.kv")

            def read(path: Path = path) -> AnchorKV:
                return decode(_KEY, np.fromfile(path, dtype=np.uint8).data, cipher)

            def mapped(path: Path = path) -> AnchorKV:
                with path.open("rb") as file:
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                return decode(_KEY, memoryview(data), cipher)

            rows.append(
                ReadSpeed(
                    stored_dtype=name,
                    encrypted=encrypted,
                    nbytes=store.nbytes,
                    store_s=_best(lambda store=store: store[_KEY], repeats),  # type: ignore[misc]
                    safetensors_s=_best(
                        lambda bare=bare: safetensors.torch.load_file(bare),  # type: ignore[misc]
                        repeats,
                    ),
                    read_s=_best(read, repeats),
                    mapped_s=_best(mapped, repeats),
                )
            )
    return rows


def _best(work: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
