"""What precompressing will take, before it is done. Knows nothing of files or processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk

# So many characters are tokenized, about a minute's work; of what follows, every so manieth
# document.
_COUNTED = 50_000_000
_SAMPLED = 16


@dataclass(frozen=True)
class Estimate:
    """What a precompression will take on this machine.

    Attributes:
        chunks: All of them.
        hits: Those whose text is in the store at their ratio, or comes up twice.
        empty: Those without text.
        bad: Those longer than the model's context.
        source_tokens: Tokens of those to be computed.
        nbytes: Bytes of their anchors, at the compressor's own ratio.
        seconds: Time to compute them, at the rate that was measured.
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
    """Counts what is to be done and measures how fast one batch of it goes; stores nothing.

    Args:
        compressor: With the store that would be filled.
        documents: Everything that would be read.
        split: Cuts a document into chunks.
        counted_characters: What comes after so many is counted in part.
    """
    plain = compressor.compressor
    characters = counted = chunks = hits = empty = bad = tokens = 0
    seen: set[str] = set()
    batch: list[list[int]] = []
    for number, document in enumerate(documents):
        characters += len(document.text)
        if characters > counted_characters and number % _SAMPLED:
            continue
        counted += len(document.text)
        for chunk in split(document):
            chunks += 1
            if chunk.is_empty:
                empty += 1
                continue
            key, ratio = compressor.key(chunk.text), compressor.kept_ratio(chunk.ratio)
            if key in seen or compressor.is_stored(chunk.text, ratio):
                hits += 1
                continue
            ids = plain.tokenize(chunk.text)
            if len(ids) > plain.generator.max_positions:
                bad += 1
                continue
            seen.add(key)
            tokens += len(ids)
            if plain.tokens_read([len(ids) for ids in (*batch, ids)]) <= plain.batch_tokens or (
                not batch
            ):
                batch.append(ids)
    rate, nbytes_per_token = _measure(compressor, batch) if batch else (None, 0.0)
    scale = characters / counted if counted else 1.0
    return Estimate(
        chunks=round(chunks * scale),
        hits=round(hits * scale),
        empty=round(empty * scale),
        bad=round(bad * scale),
        source_tokens=round(tokens * scale),
        nbytes=round(tokens * scale * nbytes_per_token),
        seconds=tokens * scale / rate if rate else 0.0,
        tokens_per_s=rate,
        counted=1 / scale,
    )


def _measure(compressor: CachedCompressor, batch: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Source tokens a second and bytes a source token, of one batch."""
    # The first pass of a process also sets up the kernels, and merges LoRA.
    compressor.compressor.compress_tokens(batch[-1:])
    started = time.perf_counter()
    kvs = compressor.compressor.compress_tokens(batch)
    seconds = time.perf_counter() - started
    tokens = sum(kv.num_tokens for kv in kvs)
    return tokens / seconds, sum(kv.nbytes for kv in kvs) / tokens
