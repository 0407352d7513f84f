"""Tokens per second of compressing and storing, beside a plain prefill of the same tokens."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sac_rag.benchmarks.first_token import cut, full, untrained
from sac_rag.benchmarks.timing import Times, in_turn, seconds_of
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.batching import passes
from sac_rag.lm.generator import Generator
from sac_rag.precompress.job import precompress
from sac_rag.stores.disk import DiskStore


@dataclass(frozen=True)
class ThroughputRow:
    """Throughput of one compressor.

    Attributes:
        method: "full", or the compressor's with LoRA as it is trained, or merged as it compresses
            chunks for a store.
        ratio: Source tokens per anchor.
        dtype: Dtype that the model computes in.
        batch_tokens: Most tokens of a pass, on both sides.
        source_tokens: Tokens of the chunks.
        padding: Share of pads and sinks in the tokens that the compressor reads.
        plain_tokens_per_s: Source tokens per second of a plain prefill, pads included in its time.
        tokens_per_s: Source tokens per second of compressing.
        relative: tokens_per_s over plain_tokens_per_s: the median over repeats, each of which
            measures both, one after the other.
        stored_tokens_per_s: Source tokens per second of precompressing into a DiskStore, everything
            included; None for unmerged LoRA, which fills no store.
        stored_relative: stored_tokens_per_s over plain_tokens_per_s, likewise.
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
    compressor: Compressor | None = None,
    chunks: int = 16,
    chunk_tokens: int = 256,
    batch_tokens: int = 2048,
    repeats: int = 5,
    seed: int = 0,
) -> Iterator[ThroughputRow]:
    """Times compressors in this process, in turn with a plain prefill.

    Args:
        generator: Model, dtype and threads that all rows share.
        texts: Prose to cut the chunks from.
        compressor: With LoRA, for the rows beside that of "full". Default: SAC without trained
            weights, which has no scorer.
        chunks: Number of chunks.
        chunk_tokens: Tokens of the longest; the shortest have half as many.
        batch_tokens: Most tokens of a pass, pads included.
        repeats: Measurements of both sides; the median counts.
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
    for method, timed, is_stored in _compressors(generator, compressor):
        timed.batch_tokens = batch_tokens
        tokens = sum(map(len, ids))
        # A short pass of each warms up; whole ones would take as long as a repeat.
        timed.compress_tokens(ids[:1])
        plain_prefill(generator, batches[-1:])
        ways = [
            partial(seconds_of, partial(plain_prefill, generator, batches)),
            partial(seconds_of, partial(timed.compress_tokens, ids)),
        ]
        if is_stored:
            ways.append(partial(_stored_seconds, generator, timed, ids))
        plain, ours, *stored = (Times(tuple(times)) for times in in_turn(ways, repeats))
        yield ThroughputRow(
            method=method,
            ratio=timed.config.ratio,
            dtype=generator.dtype_name,
            batch_tokens=batch_tokens,
            source_tokens=tokens,
            padding=1 - tokens / timed.tokens_read([len(row) for row in ids]),
            plain_tokens_per_s=tokens / plain.median,
            tokens_per_s=tokens / ours.median,
            relative=ours.speed_relative_to(plain),
            stored_tokens_per_s=tokens / stored[0].median if stored else None,
            stored_relative=stored[0].speed_relative_to(plain) if stored else None,
        )


@torch.inference_mode()
def plain_prefill(generator: Generator, batches: Sequence[Sequence[Sequence[int]]]) -> None:
    """KV of texts without any compressor: the HF model over padded batches."""
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


def _compressors(
    generator: Generator, trained: Compressor | None
) -> Iterator[tuple[str, Compressor, bool]]:
    yield "full", full(generator), True
    lora = (trained or untrained(generator).at_ratio(5)).storing(generator.dtype_name)  # type: ignore[arg-type]
    yield f"{lora.config.method}, LoRA apart", lora, False
    yield lora.config.method, lora.merged(), True


def _stored_seconds(
    generator: Generator, compressor: Compressor, ids: Sequence[Sequence[int]]
) -> float:
    chunks = [Chunk(generator.tokenizer.decode(row), id=str(n)) for n, row in enumerate(ids)]
    with tempfile.TemporaryDirectory() as folder, DiskStore(Path(folder) / "anchors") as store:
        cached = CachedCompressor(compressor, store, guard=False)
        return seconds_of(lambda: precompress(cached, chunks))
