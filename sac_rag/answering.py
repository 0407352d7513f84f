"""Pieces of prompts to prompts that can be answered. Knows nothing of what is asked, or why."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from sac_rag.cached import CachedCompressor, Fetched, OnMiss
from sac_rag.chunk import Chunk
from sac_rag.kv import AnchorKV
from sac_rag.prefix_cache import Prefixes
from sac_rag.prompts.assemble import Part, Prompt, assemble, require_room
from sac_rag.prompts.chat import Markup, Piece
from sac_rag.prompts.generate import Decoding, Generation
from sac_rag.reports import Answer, ChunkReport, Timings, Usage
from sac_rag.telemetry import Meter, Trace


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
        PromptTooLongError: if a prompt and its answer pass the model's last position.
        ChunkMissError: with on_miss="raise", if a chunk is not in the store.
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


@dataclass
class Run:
    """Answers being written to one prompt, with what is reported about them.

    Attributes:
        generation: Writes the answers.
        prompt: What they answer, one row each.
        reports: What became of each row's chunks.
        meter: Told what was written, once that has ended.
        trace: The call that this is the rest of; ended with it.
        prefix_tokens: Tokens at the start of each row that are in the prompt as KV.
        prefix_reused: How many of them an earlier call has read.
        load_s, compress_s, relocate_s: Seconds spent before; see Timings.
        prefix_s: Seconds spent reading the prefix.
        prefill_s, decode_s: Seconds spent so far.
    """

    generation: Generation
    prompt: Prompt
    reports: list[list[ChunkReport]]
    meter: Meter
    trace: Trace
    prefix_tokens: int
    prefix_reused: int
    load_s: float
    compress_s: float
    relocate_s: float
    prefix_s: float
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def steps(self) -> Iterator[list[str]]:
        """The new text of every row, step by step; the clock stops while the caller works."""
        steps = iter(self.generation)
        error: str | None = None
        try:
            while True:
                started = time.perf_counter()
                pieces = next(steps, None)
                elapsed = time.perf_counter() - started
                if not self.prefill_s:
                    self.prefill_s = elapsed
                    self.meter.first_token(self.timings.time_to_first_token_s)
                else:
                    self.decode_s += elapsed
                if pieces is None:
                    return
                yield pieces
        except Exception as problem:
            error = type(problem).__name__
            raise
        finally:
            self._account(error)

    @property
    def timings(self) -> Timings:
        """Seconds so far."""
        return Timings(
            load_s=self.load_s,
            compress_s=self.compress_s,
            relocate_s=self.relocate_s,
            prefill_s=self.prefix_s + self.prefill_s,
            decode_s=self.decode_s,
        )

    def answers(self) -> list[Answer]:
        """The answers as far as they are written."""
        timings = self.timings
        return [
            Answer(
                text=self.generation.texts[row],
                chunks=tuple(reports),
                usage=self._usage(row),
                timings=timings,
                finish_reason=self.generation.finish_reasons[row],
            )
            for row, reports in enumerate(self.reports)
        ]

    def _account(self, error: str | None) -> None:
        """Reports what was done, once it has ended, if only because the caller left."""
        usages = [self._usage(row) for row in range(len(self.reports))]
        counts = {
            "questions": len(usages),
            "prompt_tokens": sum(usage.plain_tokens for usage in usages),
            "reused_tokens": sum(usage.plain_tokens_reused for usage in usages),
            "generated_tokens": sum(usage.generated_tokens for usage in usages),
        }
        self.meter.add(**counts, failed=error is not None)
        chunks = [report for reports in self.reports for report in reports]
        timings = self.timings
        self.trace.end(
            {
                "load": timings.load_s,
                "compress": timings.compress_s,
                "relocate": timings.relocate_s,
                "prefill": timings.prefill_s,
                "decode": timings.decode_s,
            },
            {
                **counts,
                "chunks": len(chunks),
                "hits": sum(report.status == "hit" for report in chunks),
                "anchors": sum(usage.anchors_from_store for usage in usages)
                + sum(usage.anchors_computed for usage in usages),
                "source_tokens": sum(usage.source_tokens for usage in usages),
            },
            error,
        )

    def _usage(self, row: int) -> Usage:
        anchors = [report for report in self.reports[row] if report.read_as == "anchors"]
        used = sum(report.num_anchors for report in anchors)
        stored = sum(report.num_anchors for report in anchors if report.status == "hit")
        return Usage(
            positions_attended=self.prompt.num_anchors[row] + self.prompt.num_tokens[row],
            plain_tokens=self.prefix_tokens + self.prompt.num_tokens[row],
            plain_tokens_reused=self.prefix_reused,
            anchors_from_store=stored,
            anchors_computed=used - stored,
            source_tokens=sum(report.num_tokens for report in anchors),
            kv_bytes=sum(report.nbytes for report in anchors),
            generated_tokens=self.generation.num_tokens[row],
        )


class AnswerStream:
    """An answer being written: iterate it for the pieces, in order, as they come."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pieces = (pieces[0] for pieces in run.steps() if pieces[0])

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The account of what was written so far; complete once the stream has ended."""
        return self._run.answers()[0]
