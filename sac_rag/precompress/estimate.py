"""Estimate, the time and bytes that precompressing documents will take on this machine."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk

# All documents are tokenized up to this number of characters, about a minute's work; after it,
# every 16th.
_COUNTED = 50_000_000
_SAMPLED = 16


@dataclass(frozen=True)
class Estimate:
    """What a precompression will take on this machine.

    Attributes:
        chunks: Number of chunks.
        hits: Chunks whose text is in the store at their ratio, or is that of an earlier one.
        empty: Chunks without text.
        bad: Chunks longer than the model's context.
        source_tokens: Tokens of the chunks that must be computed.
        nbytes: Bytes of their anchors, at the compressor's own ratio.
        seconds: Time to compute them, at the measured rate.
        tokens_per_s: That rate; None if there is nothing to compute.
        counted: Share of the text that was tokenized, by characters; counts are scaled up if it is
            below 1.
    """

    chunks: int
    hits: int
    empty: int
    bad: int
    source_tokens: int
    nbytes: int
    seconds: float
    tokens_per_s: float | None
    counted: float


def estimate(
    compressor: CachedCompressor,
    documents: Iterable[Chunk],
    split: Callable[[Chunk], Sequence[Chunk]],
    *,
    counted_characters: int = _COUNTED,
) -> Estimate:
    """Counts what must be computed and measures the speed of one batch of it; stores nothing.

    Args:
        compressor: With the store that would be filled.
        documents: Everything that would be read.
        split: Cuts a document into chunks.
        counted_characters: Documents after this number of characters are counted in part.
    """
    counts = _Counts(compressor)
    characters = counted = 0
    for number, document in enumerate(documents):
        characters += len(document.text)
        if characters > counted_characters and number % _SAMPLED:
            continue
        counted += len(document.text)
        for chunk in split(document):
            counts.add(chunk)
    rate, nbytes_per_token = _measure(compressor, counts.batch) if counts.batch else (None, 0.0)
    scale = characters / counted if counted else 1.0
    return Estimate(
        chunks=round(counts.chunks * scale),
        hits=round(counts.hits * scale),
        empty=round(counts.empty * scale),
        bad=round(counts.bad * scale),
        source_tokens=round(counts.tokens * scale),
        nbytes=round(counts.tokens * scale * nbytes_per_token),
        seconds=counts.tokens * scale / rate if rate else 0.0,
        tokens_per_s=rate,
        counted=1 / scale,
    )


class _Counts:
    """Counts of chunks, and a first batch of those that must be computed."""

    def __init__(self, compressor: CachedCompressor) -> None:
        self.chunks = self.hits = self.empty = self.bad = self.tokens = 0
        self.batch: list[list[int]] = []
        self._compressor = compressor
        self._seen: set[str] = set()

    def add(self, chunk: Chunk) -> None:
        compressor = self._compressor
        self.chunks += 1
        if chunk.is_empty:
            self.empty += 1
            return
        key = compressor.key(chunk.text)
        if key in self._seen or compressor.is_stored(
            chunk.text, compressor.kept_ratio(chunk.ratio)
        ):
            self.hits += 1
            return
        ids = compressor.tokenize(chunk.text)
        if len(ids) > compressor.generator.max_positions:
            self.bad += 1
            return
        self._seen.add(key)
        self.tokens += len(ids)
        read = compressor.tokens_read([len(row) for row in (*self.batch, ids)])
        if read <= compressor.batch_tokens or not self.batch:
            self.batch.append(ids)


def _measure(compressor: CachedCompressor, batch: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Source tokens per second and bytes per source token, of one batch."""
    # The first pass of a process also sets up the kernels, and merges LoRA.
    compressor.inner.compress_tokens(batch[-1:])
    started = time.perf_counter()
    kvs = compressor.inner.compress_tokens(batch)
    seconds = time.perf_counter() - started
    tokens = sum(kv.num_tokens for kv in kvs)
    return tokens / seconds, sum(kv.nbytes for kv in kvs) / tokens


def shortages(expected: Estimate, store: object, folder: Path) -> list[str]:
    """Sentences about too little room for the anchors, in a store or on its disk.

    Args:
        expected: With the bytes that will be added.
        store: Asked for its `max_bytes` and `nbytes`, if it has them.
        folder: Where the store is, or will be made.
    """
    room = getattr(store, "max_bytes", sys.maxsize) - getattr(store, "nbytes", 0)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return [
        f"{what} only {left:,} bytes more, the anchors will take {expected.nbytes:,}: "
        "the least recently used will be dropped, or the run fail"
        for what, left in (("the store may grow by", room), ("the disk has", free))
        if expected.nbytes > left
    ]
