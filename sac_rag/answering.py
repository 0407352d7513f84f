"""Answerer: prompts with chunks in them to running answers, streamed or in a batch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from sac_rag.cached import CachedCompressor, OnMiss
from sac_rag.chunk import Chunk
from sac_rag.fetched import Fetched
from sac_rag.kv import AnchorKV
from sac_rag.prefix_cache import Prefixes
from sac_rag.prompts.assemble import Part, Prompt, assemble, require_room
from sac_rag.prompts.chat import Markup, Piece, repeat_question
from sac_rag.prompts.decode import Decoder
from sac_rag.prompts.decoding import Decoding
from sac_rag.prompts.generate import Generation
from sac_rag.reports import Answer, ChunkReport, Timings, Usage
from sac_rag.telemetry import Meter, Trace


def tokenize(piece: Piece, compressor: CachedCompressor) -> list[int]:
    """Token ids of a piece; those of a chunk are the ones that are compressed.

    Special tokens are recognised in the template's own words only.
    """
    if isinstance(piece, Chunk):
        return [] if piece.is_empty else compressor.tokenize(piece.text)
    if isinstance(piece, Markup):
        return compressor.generator.tokenize(piece.text, special=True)
    return compressor.generator.tokenize(piece)


def token_ids(pieces: Iterable[Piece], compressor: CachedCompressor) -> list[int]:
    """Token ids of pieces, one after the other, chunks as text."""
    return [token for piece in pieces for token in tokenize(piece, compressor)]


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes:
        pieces: The prompt in reading order.
        stop: Stop texts of the prompt's format: they end its answer unless the Decoding has some.
    """

    pieces: Sequence[Piece]
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answerer:
    """Starts answers: fetches chunks, takes the prefix off, assembles the prompt.

    Attributes:
        compressor: Source of the chunks' KV.
        on_miss: What to do with a chunk that is not in the store.
        prefixes: KV of what prompts begin with.
        meter: Counts what is fetched and generated.
        repeat_question: Whether prompts of a trained compressor repeat a question that stands
            before the chunks.
    """

    compressor: CachedCompressor
    on_miss: OnMiss
    prefixes: Prefixes
    meter: Meter
    repeat_question: bool = True

    @contextmanager
    def call(self) -> Iterator[Trace]:
        """The trace of one call; counts and reports the call as failed if its start raises."""
        trace = Trace("answer")  # ended by the run, if the call comes so far
        try:
            yield trace
        except Exception as error:
            self.meter.add(failed=1)
            trace.end({}, {}, type(error).__name__)
            raise

    def start(
        self,
        requests: Sequence[Request],
        prefix_ids: Sequence[int],
        decoding: Decoding,
        *,
        ratio: int | None,
        trace: Trace,
    ) -> Run:
        """Prepares prompts that are answered together in one padded batch.

        Args:
            requests: The prompts.
            prefix_ids: Token ids that they are likely to begin with.
            decoding: How to answer.
            ratio: Of chunks that have none of their own. Default: the config's.
            trace: The call that this is part of; the run ends it.

        Raises:
            PromptTooLongError: if a prompt and its answer pass the model's last position; nothing
                is computed then.
            ChunkMissError: with on_miss="raise", if a chunk is not in the store.
            ValueError: for a ratio that the compressor does not have.
        """
        compressor = self.compressor
        rows = [[self._text_tokenized(p) for p in self._pieces(request)] for request in requests]
        fetched = self._fetch(rows, compressor.ratio_for(ratio), decoding.max_new_tokens)
        parts, reports = self._parts(rows, fetched)
        started = time.perf_counter()
        split = self.prefixes.split(prefix_ids, parts)
        prefix_s = time.perf_counter() - started
        prompt = assemble(
            split.rows,
            compressor.generator,
            prefix=split.prefix,
            cue=compressor.cue,
            adapter=compressor.generator_adapter,
            first_position=compressor.config.first_position,
        )
        stops = [request.stop for request in requests]
        generation = Generation(compressor.generator, prompt, decoding, stops)
        elapsed = time.perf_counter() - trace.started
        return Run(
            generation=generation,
            prompt=prompt,
            reports=reports,
            meter=self.meter,
            trace=trace,
            prefix_tokens=split.prefix.num_tokens if split.prefix is not None else 0,
            prefix_reused=split.reused,
            load_s=fetched.load_s,
            compress_s=fetched.compress_s,
            relocate_s=elapsed - fetched.load_s - fetched.compress_s - prefix_s,
            prefix_s=prefix_s,
        )

    def _pieces(self, request: Request) -> Sequence[Piece]:
        if self.repeat_question and self.compressor.config.lora_targets:
            return repeat_question(request.pieces)
        return request.pieces

    def _text_tokenized(self, piece: Piece) -> list[int] | Chunk:
        return piece if isinstance(piece, Chunk) else tokenize(piece, self.compressor)

    def _fetch(
        self, rows: Sequence[Sequence[list[int] | Chunk]], ratio: int, reserve: int
    ) -> Fetched:
        """Fetches the chunks of all rows, in order, except those without text.

        Args:
            rows: Prompts, their text as token ids.
            ratio: Of chunks that have none of their own.
            reserve: Positions that each prompt must leave free for its answer, in tokens.

        Raises:
            PromptTooLongError: before anything is computed or embedded.
        """
        config, generator = self.compressor.config, self.compressor.generator
        chunks = [[p for p in row if isinstance(p, Chunk) and not p.is_empty] for row in rows]

        def require_rows_fit(chunk_lengths: list[int]) -> None:
            remaining = iter(chunk_lengths)
            for number, row in enumerate(rows):
                text = sum(len(piece) for piece in row if not isinstance(piece, Chunk))
                inside = sum(islice(remaining, len(chunks[number])))
                require_room(number, config.first_position + text + inside, reserve, generator)

        every_chunk = [chunk for row in chunks for chunk in row]
        fetched = self.compressor.fetch(
            [chunk.text for chunk in every_chunk],
            ratios=[ratio if chunk.ratio is None else chunk.ratio for chunk in every_chunk],
            on_miss=self.on_miss,
            documents=[chunk.id for chunk in every_chunk],
            accept=require_rows_fit,
        )
        self._count(fetched)
        return fetched

    def _parts(
        self, rows: Sequence[Sequence[list[int] | Chunk]], fetched: Fetched
    ) -> tuple[list[list[Part]], list[list[ChunkReport]]]:
        """Rows with KV, or else token ids, in the place of each chunk; and a report per chunk."""
        results = zip(fetched.kvs, fetched.misses, strict=True)
        parts: list[list[Part]] = [[] for _ in rows]
        reports: list[list[ChunkReport]] = [[] for _ in rows]
        for number, row in enumerate(rows):
            for piece in row:
                if not isinstance(piece, Chunk):
                    parts[number].append(piece)
                elif piece.is_empty:
                    reports[number].append(ChunkReport(piece, "empty", "nothing", 0, 0, 0, 0.0))
                else:
                    kv, miss = next(results)
                    part = kv if kv is not None else tokenize(piece, self.compressor)
                    parts[number].append(part)
                    reports[number].append(_report(piece, part, miss))
        return parts, reports

    def _count(self, fetched: Fetched) -> None:
        self.meter.add(
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
                self.meter.missed(reason)
        self.meter.evicted(self.compressor.store.evictions)


def _report(chunk: Chunk, part: Part, miss: str | None) -> ChunkReport:
    status = miss or "hit"
    if isinstance(part, AnchorKV):
        tokens, anchors = part.num_tokens, part.num_anchors
        return ChunkReport(chunk, status, "anchors", tokens, anchors, part.nbytes, part.ratio)
    return ChunkReport(chunk, status, "text", len(part), len(part), 0, 1.0)


@dataclass
class Run:
    """Running answers to the rows of one prompt, with their account.

    Attributes:
        generation: Generates the answers.
        prompt: The prompt, one row per answer.
        reports: One per chunk of each row.
        meter: Counts tokens and questions when the run ends.
        trace: The call that this run belongs to; ends with the run.
        prefix_tokens: Tokens at the start of each row that are in the prompt as KV.
        prefix_reused: How many of them an earlier call has read.
        load_s, compress_s, relocate_s: Seconds before the run; see Timings.
        prefix_s: Seconds spent reading the prefix.
        prefill_s, decode_s: Seconds so far.
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
        """The new text of every row, per step; the clock stops while the caller works."""
        steps = iter(self.generation)
        with self.accounted():
            while True:
                started = time.perf_counter()
                pieces = next(steps, None)
                self._spent(time.perf_counter() - started)
                if pieces is None:
                    return
                yield pieces

    def begin(self, decoder: Decoder) -> list[str]:
        """Reads the prompt as rows of a decoder that others share; see `Generation.begin`."""
        started = time.perf_counter()
        pieces = self.generation.begin(decoder)
        self._spent(time.perf_counter() - started)
        return pieces

    def take(self, tokens: Tensor, rows: Sequence[int], seconds: float) -> list[str]:
        """Adds a token to some rows, from a step that took this long; see `Generation.take`."""
        pieces = self.generation.take(tokens, rows)
        self._spent(seconds)
        return pieces

    @contextmanager
    def accounted(self) -> Iterator[None]:
        """Counts and reports the call at the end, also when its caller leaves before that."""
        error: str | None = None
        try:
            yield
        except Exception as problem:
            error = type(problem).__name__
            raise
        finally:
            self._account(error)

    def _spent(self, seconds: float) -> None:
        if self.prefill_s:
            self.decode_s += seconds
        else:
            self.prefill_s = seconds
            self.meter.first_token(self.timings.time_to_first_token_s)

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

    def finish(self) -> list[Answer]:
        """Generates to the end and returns the answers."""
        for _ in self.steps():
            pass
        return self.answers()

    def answers(self) -> list[Answer]:
        """The answers as far as they are generated."""
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
    """A running answer: an iterator over its pieces, in order."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pieces = (pieces[0] for pieces in run.steps() if pieces[0])

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation, by the thread that reads the stream; the answer so far stays."""
        self._pieces.close()

    @property
    def answer(self) -> Answer:
        """The answer so far with its account; complete once the stream has ended."""
        return self._run.answers()[0]
