"""Which tokens carry a chunk, and how a chunk is cut into segments. Knows token counts only."""

from __future__ import annotations

import torch
from torch import Tensor


def strided_anchors(num_tokens: int, ratio: int) -> Tensor:
    """Picks the middle token of every block of `ratio` tokens (SAC, arXiv 2510.08907).

    A segment shorter than half a block keeps its first token, so no text is ever without an anchor.

    Args:
        num_tokens: Tokens in the segment, at least 1.
        ratio: Source tokens per anchor, at least 1.

    Returns:
        In-segment indices, ascending, int64. Shape: (anchors,)

    Raises:
        ValueError: if either number is below 1.
    """
    if num_tokens < 1 or ratio < 1:
        raise ValueError(f"num_tokens and ratio must be at least 1, were: {num_tokens} and {ratio}")
    first = (ratio - 1) // 2
    if first >= num_tokens:
        first = 0
    return torch.arange(first, num_tokens, ratio)


def num_anchors(num_tokens: int, ratio: int) -> int:
    """How many anchors a segment has, however they are chosen."""
    return len(strided_anchors(num_tokens, ratio))


def top_anchors(scores: Tensor, ratio: int) -> Tensor:
    """Picks the tokens of the highest scores, for each leading dimension apart.

    Args:
        scores: Shape: (..., tokens)
        ratio: Source tokens per anchor, at least 1.

    Returns:
        In-segment indices, ascending, int64; as many as `strided_anchors` gives.
        Shape: (..., anchors)
    """
    count = num_anchors(scores.shape[-1], ratio)
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def segment_bounds(num_tokens: int, segment_tokens: int) -> list[tuple[int, int]]:
    """Cuts a chunk into segments that are each encoded in a forward pass of their own.

    Returns:
        (start, end) of every segment in source tokens; all but the last are `segment_tokens` long.
    """
    return [
        (start, min(start + segment_tokens, num_tokens))
        for start in range(0, num_tokens, segment_tokens)
    ]
