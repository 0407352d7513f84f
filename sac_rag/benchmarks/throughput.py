"""How fast chunks are compressed and stored: against a plain prefill of the same tokens."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sac_rag.benchmarks.first_token import cut
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.batching import passes
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.full import Full
from sac_rag.compressors.sac import SAC
from sac_rag.lm.generator import Generator
from sac_rag.precompress.job import precompress
from sac_rag.prompts.chat import opening
from sac_rag.stores.disk import DiskStore


@dataclass(frozen=True)
class ThroughputRow:
    """One compressor, measured.

    Attributes:
        method: "full", or "sac" with LoRA as it is trained, or merged as it compresses chunks for a
            store.
        ratio: Source tokens per anchor.
        dtype: What the model computes in.
        batch_tokens: Most tokens of a pass, on both sides.
        source_tokens: Tokens of the chunks.
        padding: Share of what the compressor read that was pads and sinks.
        plain_tokens_per_s: Source tokens a second of a plain prefill, pads included in its time.
        tokens_per_s: The same of compressing.
        relative: The latter over the former: the median over repeats, each of which measures both,
            one after the other.
        stored_tokens_per_s: The same of precompressing into a DiskStore, everything included; None
            for LoRA unmerged, as no store is filled.
        stored_relative: That over the plain one, likewise.
    """

    method: str
    ratio: int
    dtype: str
    batch_tokens: int
    source_tokens: int
    padding: float
    plain_tokens_per_s: float
    tokens_per_s: float
    relative: float
    stored_tokens_per_s: float | None
    stored_relative: float | None


def measure(
    generator: Generator,
    texts: Iterable[str],
    *,
    chunks: int = 16,
    chunk_tokens: int = 256,
    batch_tokens: int = 2048,
    repeats: int = 5,
    seed: int = 0,
) -> Iterator[ThroughputRow]:
    """Times compressors in this one process, by turns with a plain prefill.

    SAC runs without trained weights: its speed does not depend on them.

    Args:
        generator: Model, dtype and threads that all rows share.
        texts: Prose to cut the chunks from.
        chunks: How many.
        chunk_tokens: Tokens of the longest; the shortest have half as many.
        batch_tokens: Most tokens of a pass, pads included.
        repeats: Times that both sides are measured; the median counts.
        seed: Of the chunks' lengths.

    Raises:
        ValueError: if there is too little prose.
    """
    lengths = random.Random(seed)
    ids = [
        generator.tokenize(text)[: lengths.randint(chunk_tokens // 2, chunk_tokens)]
        for text in cut(generator, texts, chunks, chunk_tokens)
    ]
    batches = [
        [ids[segment.chunk] for segment in batch]
        for batch in passes(
            [len(row) for row in ids],
            segment_tokens=chunk_tokens,
            sink=0,
            batch_tokens=batch_tokens,
        )
    ]
    for method, compressor, is_stored in _compressors(generator):
        compressor.batch_tokens = batch_tokens
        tokens = sum(map(len, ids))
        plain, ours, stored = [], [], []
        compressor.compress_tokens(ids[:1])
        plain_prefill(generator, batches[-1:])
        for _ in range(repeats):
            plain.append(_seconds(lambda: plain_prefill(generator, batches)))
            ours.append(_seconds(lambda c=compressor: c.compress_tokens(ids)))  # type: ignore[misc]
            if is_stored:
                stored.append(_stored_seconds(generator, compressor, ids))
        yield ThroughputRow(
            method=method,
            ratio=compressor.config.ratio,
            dtype=generator.dtype_name,
            batch_tokens=batch_tokens,
            source_tokens=tokens,
            padding=1 - tokens / compressor.tokens_read([len(row) for row in ids]),
            plain_tokens_per_s=tokens / statistics.median(plain),
            tokens_per_s=tokens / statistics.median(ours),
            relative=_median_ratio(plain, ours),
            stored_tokens_per_s=tokens / statistics.median(stored) if stored else None,
            stored_relative=_median_ratio(plain, stored) if stored else None,
        )


@torch.inference_mode()
def plain_prefill(generator: Generator, batches: Sequence[Sequence[Sequence[int]]]) -> None:
    """What anyone would do to have the KV of texts: the HF model over padded batches."""
    for batch in batches:
        longest = max(map(len, batch))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        with generator.running() as model:
            model(
                input_ids=ids.to(generator.device),
                attention_mask=mask.to(generator.device),
                use_cache=True,
                logits_to_keep=1,
            )
    if generator.device.type == "cuda":
        torch.cuda.synchronize()


def _compressors(generator: Generator) -> Iterator[tuple[str, Compressor, bool]]:
    sink, dtype = opening(generator.tokenizer), generator.dtype_name
    yield "full", Full(generator, Full.default_config(sink=sink, stored_dtype=dtype)), True
    lora = SAC(generator, CompressorConfig(sink=sink, stored_dtype=dtype))  # type: ignore[arg-type]
    yield "sac, LoRA apart", lora, False
    yield "sac", lora.merged(), True


def _stored_seconds(
    generator: Generator, compressor: Compressor, ids: Sequence[Sequence[int]]
) -> float:
    chunks = [Chunk(generator.tokenizer.decode(row), id=str(n)) for n, row in enumerate(ids)]
    with tempfile.TemporaryDirectory() as folder, DiskStore(Path(folder) / "anchors") as store:
        cached = CachedCompressor(compressor, store, guard=False)
        return _seconds(lambda: precompress(cached, chunks))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _median_ratio(plain: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(p / o for p, o in zip(plain, ours, strict=True))
