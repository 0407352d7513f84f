"""Answers being written, timed and counted. Knows nothing of where prompts come from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from sac_rag.assemble import Prompt
from sac_rag.generate import Generation
from sac_rag.metrics import Meter
from sac_rag.reports import Answer, ChunkReport, Timings, Usage
from sac_rag.telemetry import Trace


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
