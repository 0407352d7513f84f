"""Pieces of prompts to prompts that can be answered. Knows nothing of what is asked, or why."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice

from sac_rag.assemble import Part, assemble, require_room
from sac_rag.cached import CachedCompressor, Fetched, OnMiss
from sac_rag.chunk import Chunk
from sac_rag.generate import Decoding, Generation
from sac_rag.kv import AnchorKV
from sac_rag.metrics import Meter
from sac_rag.prefix import Prefixes
from sac_rag.reports import ChunkReport
from sac_rag.stream import Run
from sac_rag.telemetry import Trace
from sac_rag.template import Markup, Piece


def tokenize(piece: Piece, compressor: CachedCompressor) -> list[int]:
    """Token ids of a piece, a chunk's being the very tokens that are compressed.

    Special tokens count in the template's own words alone.
    """
    if isinstance(piece, Chunk):
        return [] if piece.is_empty else compressor.compressor.tokenize(piece.text)
    if isinstance(piece, Markup):
        return compressor.compressor.generator.tokenize(piece.text, special=True)
    return compressor.compressor.generator.tokenize(piece)


def token_ids(pieces: Iterable[Piece], compressor: CachedCompressor) -> list[int]:
    """Token ids of pieces, one after the other, chunks as text."""
    return [token for piece in pieces for token in tokenize(piece, compressor)]


def evictions(compressor: CachedCompressor) -> int:
    """Entries that the store has dropped for want of room, if it counts them."""
    return int(getattr(compressor.store, "evictions", 0))


def prepare(
    rows: Sequence[Sequence[Piece]],
    beginning: list[int],
    decoding: Decoding,
    *,
    stops: Sequence[Sequence[str]],
    ratio: int | None,
    compressor: CachedCompressor,
    on_miss: OnMiss,
    prefixes: Prefixes,
    meter: Meter,
    trace: Trace,
) -> Run:
    """Prepares one prompt for each row of pieces, all to be answered together.

    Args:
        rows: Prompts in reading order.
        beginning: Token ids that they are likely to begin with.
        decoding: How to answer.
        stops: Stop texts of each row, used where the decoding gives none.
        ratio: Of chunks that have none of their own. Default: the compressor's own.
        compressor: Gives the chunks' KV.
        on_miss: What to do with a chunk that is not in the store.
        prefixes: Reads what the prompts begin with, once.
        meter: Told what was fetched, and by the run what was written.
        trace: The call that this is part of; the run ends it.

    Raises:
        PromptTooLong: if a prompt and its answer pass the model's last position.
        ChunkMiss: with on_miss="raise", if a chunk is not in the store.
        ValueError: for a ratio that the compressor does not have.
    """
    ratio = compressor.ratio_for(ratio)
    generator, config = compressor.compressor.generator, compressor.compressor.config
    # Text becomes token ids, chunks stay as they are until their KV is there.
    plain = [
        [piece if isinstance(piece, Chunk) else tokenize(piece, compressor) for piece in row]
        for row in rows
    ]
    chunks = [[p for p in row if isinstance(p, Chunk) and not p.is_empty] for row in plain]

    def accept(lengths: list[int]) -> None:
        of_chunk = iter(lengths)
        for number, row in enumerate(plain):
            text = sum(len(p) for p in row if not isinstance(p, Chunk))
            inside = sum(islice(of_chunk, len(chunks[number])))
            positions = config.first_position + text + inside
            require_room(number, positions, decoding.max_new_tokens, generator)

    flat = [chunk for row in chunks for chunk in row]
    prepare_s = time.perf_counter() - trace.started
    fetched = compressor.fetch(
        [chunk.text for chunk in flat],
        ratios=[ratio if chunk.ratio is None else chunk.ratio for chunk in flat],
        on_miss=on_miss,
        documents=[chunk.id for chunk in flat],
        accept=accept,
    )
    _count(fetched, compressor, meter)
    started = time.perf_counter()
    results = zip(fetched.kvs, fetched.misses, strict=True)
    parts: list[list[Part]] = []
    reports: list[list[ChunkReport]] = []
    for row in plain:
        parts.append([])
        reports.append([])
        for piece in row:
            if not isinstance(piece, Chunk):
                parts[-1].append(piece)
            elif piece.is_empty:
                reports[-1].append(ChunkReport(piece, "empty", "nothing", 0, 0, 0, 0.0))
            else:
                kv, miss = next(results)
                part = kv if kv is not None else tokenize(piece, compressor)
                parts[-1].append(part)
                reports[-1].append(_report(piece, part, miss))
    for number, row_parts in enumerate(parts):
        # Before the prefix is read: what does not fit must not cost a forward pass.
        positions = sum(p.num_tokens if isinstance(p, AnchorKV) else len(p) for p in row_parts)
        positions += config.first_position
        require_room(number, positions, decoding.max_new_tokens, generator)
    prepare_s += time.perf_counter() - started
    started = time.perf_counter()
    split = prefixes.split(beginning, parts)
    prefix_s = time.perf_counter() - started
    started = time.perf_counter()
    prompt = assemble(
        split.rows,
        generator,
        prefix=split.prefix,
        cue=compressor.compressor.cue,
        adapter=compressor.compressor.generator_adapter,
        reserve=decoding.max_new_tokens,
        first_position=config.first_position,
    )
    return Run(
        generation=Generation(generator, prompt, decoding, stops),
        prompt=prompt,
        reports=reports,
        meter=meter,
        trace=trace,
        prefix_tokens=split.prefix.num_tokens if split.prefix is not None else 0,
        prefix_reused=split.reused,
        load_s=fetched.load_s,
        compress_s=fetched.compress_s,
        relocate_s=prepare_s + time.perf_counter() - started,
        prefix_s=prefix_s,
    )


def _count(fetched: Fetched, compressor: CachedCompressor, meter: Meter) -> None:
    meter.add(
        hits=fetched.misses.count(None),
        loads=fetched.loads,
        load_seconds=fetched.load_s,
        load_bytes=fetched.load_bytes,
        computed_chunks=fetched.computed,
        computed_tokens=fetched.computed_tokens,
        compute_seconds=fetched.compress_s,
        store_failures=fetched.failed_writes,
    )
    for reason in fetched.misses:
        if reason is not None:
            meter.missed(reason)
    meter.evicted(evictions(compressor))


def _report(chunk: Chunk, part: Part, miss: str | None) -> ChunkReport:
    status = miss or "hit"
    if isinstance(part, AnchorKV):
        tokens, anchors = part.num_tokens, part.num_anchors
        return ChunkReport(chunk, status, "anchors", tokens, anchors, part.nbytes, part.ratio)
    return ChunkReport(chunk, status, "text", len(part), len(part), 0, 1.0)
