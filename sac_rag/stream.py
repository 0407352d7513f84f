"""Answers being written, timed and counted. Knows nothing of where prompts come from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from sac_rag.assemble import Prompt
from sac_rag.generate import Generation
from sac_rag.reports import Answer, ChunkReport, Timings, Usage


@dataclass
class Run:
    """Answers being written to one prompt, with what is reported about them.

    Attributes:
        generation: Writes the answers.
        prompt: What they answer, one row each.
        reports: What became of each row's chunks.
        prefix_tokens: Tokens at the start of each row that are in the prompt as KV.
        prefix_reused: How many of them an earlier call has read.
        load_s, compress_s, relocate_s: Seconds spent before; see Timings.
        prefix_s: Seconds spent reading the prefix.
        prefill_s, decode_s: Seconds spent so far.
    """

    generation: Generation
    prompt: Prompt
    reports: list[list[ChunkReport]]
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
        while True:
            started = time.perf_counter()
            pieces = next(steps, None)
            elapsed = time.perf_counter() - started
            if not self.prefill_s:
                self.prefill_s = elapsed
            else:
                self.decode_s += elapsed
            if pieces is None:
                return
            yield pieces

    def answers(self) -> list[Answer]:
        """The answers as far as they are written."""
        timings = Timings(
            load_s=self.load_s,
            compress_s=self.compress_s,
            relocate_s=self.relocate_s,
            prefill_s=self.prefix_s + self.prefill_s,
            decode_s=self.decode_s,
        )
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
