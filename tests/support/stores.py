"""What tests of stores share: small values, keys, and a look into a store's folder."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
import xxhash

from sac_rag.kv import AnchorKV
from sac_rag.stores import DiskStore


def make_kv(seed: int = 0, dtype: torch.dtype = torch.bfloat16, *, anchors: int = 4) -> AnchorKV:
    """A value whose heads keep different numbers of tokens, about `anchors`; one keeps none."""
    random = torch.Generator().manual_seed(seed)
    counts = torch.tensor([2 * anchors, 0, anchors, anchors * 3 // 2, anchors, anchors // 2])
    heads = torch.arange(6, dtype=torch.int16).repeat_interleave(counts)
    entries = len(heads)
    return AnchorKV(
        keys=torch.randn(entries, 8, generator=random).to(dtype),
        values=torch.randn(entries, 8, generator=random).to(dtype),
        positions=torch.randint(5 * anchors, (entries,), generator=random, dtype=torch.int32),
        heads=heads[torch.randperm(entries, generator=random)],
        num_layers=2,
        num_kv_heads=3,
        num_tokens=5 * anchors,
    )


def key_of(number: int) -> str:
    return xxhash.xxh3_128_hexdigest(str(number).encode())


def file_of(store: DiskStore, key: str) -> Path:
    (path,) = (store.folder / "entries").glob(f"*/{key}-*.kv")
    return path


def index_of(store: DiskStore) -> closing[sqlite3.Connection]:
    """The store's index, as anybody who can write the folder gets at it."""
    path = store.folder / "entries" / "cache.db"
    return closing(sqlite3.connect(path, isolation_level=None))


def flip(store: DiskStore, key: str, place: int = -1) -> None:
    """Flips a bit of an entry's file."""
    path = file_of(store, key)
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def age(store: DiskStore, key: str, seconds: float) -> None:
    """Makes an entry older."""
    with index_of(store) as index:
        update = "UPDATE Cache SET store_time = store_time - ? WHERE key = ?"
        index.execute(update, (seconds, key))


def bytes_in(folder: Path) -> dict[Path, bytes]:
    """Every byte in a folder, names included."""
    return {
        path: str(path.relative_to(folder)).encode() + (b"" if path.is_dir() else path.read_bytes())
        for path in folder.rglob("*")
    }


def entry_files(store: DiskStore) -> list[Path]:
    """Files of all entries."""
    return sorted((store.folder / "entries").glob("*/*"))


def run_python(code: str, **environment: str) -> subprocess.Popen[bytes]:
    """Runs code in another process that can import what this one can."""
    path = os.pathsep.join(part for part in sys.path if part)
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, **environment})


_HOLD = """
import sqlite3, sys
index = sqlite3.connect(sys.argv[1], isolation_level=None)
index.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another_process(store: DiskStore) -> Iterator[None]:
    """Another process writes to the store's index, and does not end while the block lasts."""
    command = [sys.executable, "-c", _HOLD, str(store.folder / "entries" / "cache.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        yield
        other.communicate()
