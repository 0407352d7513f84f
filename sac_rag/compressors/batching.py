"""Which segments are encoded together. Knows token counts only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sac_rag.compressors.anchor_selection import segment_bounds


@dataclass(frozen=True)
class Segment:
    """A stretch of a chunk that is encoded in one go.

    Attributes:
        chunk: The chunk's number.
        start: Its first token in the chunk.
        end: The token after its last.
    """

    chunk: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def passes(
    counts: Sequence[int], *, segment_tokens: int, sink: int, batch_tokens: int
) -> Iterator[list[Segment]]:
    """The segments of chunks, those of like length together.

    Longest first, so that a pass too large for the memory fails at once.

    Args:
        counts: Tokens of each chunk.
        segment_tokens: Longest segment.
        sink: Tokens read before each segment.
        batch_tokens: Most tokens of a pass, sinks and pads included, unless one segment has more.
    """
    segments = (
        Segment(chunk, start, end)
        for chunk, count in enumerate(counts)
        for start, end in segment_bounds(count, segment_tokens)
    )
    batch: list[Segment] = []
    for segment in sorted(segments, key=len, reverse=True):
        if batch and (sink + len(batch[0])) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(segment)
    if batch:
        yield batch


def padded_tokens(batches: Iterable[Sequence[Segment]], sink: int) -> int:
    """Tokens that are read in passes, sinks and pads included."""
    return sum(len(batch) * (sink + max(map(len, batch))) for batch in batches)
