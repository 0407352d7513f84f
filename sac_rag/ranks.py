"""by_rank: a budget of KV entries for all chunks of a question, most of them for the best ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk, ChunkLike


def by_rank(
    chunks: Sequence[ChunkLike],
    compressor: CachedCompressor,
    *,
    ratio: int | None = None,
    lowest: int | None = None,
) -> list[Chunk]:
    """Chunks with ratios of their own: low for the first, higher for those after it.

    Together they have no more KV entries than if all had the same ratio. A chunk's share is
    proportional to its tokens, divided by its rank.

    Args:
        chunks: Best first, as a search returns them. Those with a ratio keep it and count for
            nothing.
        compressor: That of the pipeline: `rag.compressor`.
        ratio: Source tokens per KV entry, mean over the chunks. Default: the compressor's.
        lowest: The lowest ratio of any chunk. Default: the lower of both, at which stored chunks
            are hits.

    Raises:
        ValueError: if the compressor has a single ratio, or `lowest` is above `ratio`.
    """
    if isinstance(chunks, str):
        raise TypeError("chunks must be a sequence of chunks, was: one str; put it in a list")
    ratio = compressor.ratio_for(ratio)
    lowest = compressor.kept_ratio(ratio) if lowest is None else compressor.ratio_for(lowest)
    if not compressor.is_nested:
        raise ValueError(
            "chunks can have ratios by rank where one compression serves several "
            f"(anchors='learned'), was: {compressor.method!r} with a single one"
        )
    if lowest > ratio:
        raise ValueError(f"lowest must be at most ratio, {ratio}, was: {lowest}")
    ranked = [Chunk.of(chunk) for chunk in chunks]
    numbers = [n for n, one in enumerate(ranked) if one.ratio is None and not one.is_empty]
    lengths = [len(compressor.tokenize(ranked[number].text)) for number in numbers]
    ratios = ratios_by_rank(lengths, ratio, lowest, compressor.inner.num_entries)
    for number, chosen in zip(numbers, ratios, strict=True):
        ranked[number] = replace(ranked[number], ratio=chosen)
    return ranked


def ratios_by_rank(
    num_tokens: Sequence[int], ratio: int, lowest: int, num_entries: Callable[[int, int], int]
) -> list[int]:
    """Ratios of chunks, best first, that together cost at most what one ratio for all would.

    Args:
        num_tokens: Of each chunk.
        ratio: That ratio.
        lowest: Of any chunk, at most `ratio`.
        num_entries: Number of KV entries of a chunk, from its tokens and a ratio.
    """
    if not num_tokens:
        return []

    budget = sum(num_entries(tokens, ratio) for tokens in num_tokens)
    step = ratio * sum(n / rank for rank, n in enumerate(num_tokens, 1)) / sum(num_tokens)
    ratios = [max(lowest, ceil(step * rank)) for rank in range(1, len(num_tokens) + 1)]
    while (spent := sum(map(num_entries, num_tokens, ratios))) > budget:  # by rounding
        ratios = [higher + 1 for higher in ratios]
    # What rounding and `lowest` have left goes to those that it is enough for, best first.
    changed = True
    while changed:
        changed = False
        for index, tokens in enumerate(num_tokens):
            lower = ratios[index] - 1
            if lower < (ratios[index - 1] if index else lowest):
                continue  # never lower than that of a better chunk
            after = spent + num_entries(tokens, lower) - num_entries(tokens, lower + 1)
            if after <= budget:
                ratios[index], spent, changed = lower, after, True
    return ratios
