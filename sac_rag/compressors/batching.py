"""Batching: groups segments of similar length into encoder passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sac_rag.compressors.anchor_selection import segment_bounds


@dataclass(frozen=True)
class Segment:
    """Part of a chunk that is encoded in one pass.

    Attributes:
        chunk: Number of the chunk.
        start: First token of the segment in the chunk.
        end: Token after the last.
    """

    chunk: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def passes(
    counts: Sequence[int], *, segment_tokens: int, sink: int, batch_tokens: int
) -> Iterator[list[Segment]]:
    """Groups the segments of chunks into passes, segments of similar length together.

    Longest first, so that a pass too large for the memory fails at once.

    Args:
        counts: Number of tokens of each chunk.
        segment_tokens: Length of the longest segment.
        sink: Number of tokens read before each segment.
        batch_tokens: Most tokens of a pass, sinks and pads included; a longer segment is a pass
            by itself.
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
    """Number of tokens that passes read, sinks and pads included."""
    return sum(len(batch) * (sink + max(map(len, batch))) for batch in batches)
