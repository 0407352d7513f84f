"""Budgets: which KV entries of a segment are kept over all heads, and in which order.

Heads differ widely in how much they attend to a text. With one ranking over the entries of all of
them, a fifth of the entries keep all of the F1, where the same number for every head keeps 70 %
(docs/quality.md, one passage). AdaKV (arXiv 2407.11550) ranks entries of all heads of a layer
together, LKV (arXiv 2605.06676) learns budgets. Here the scores of a head predict how its attention
is distributed over the text, and one fitted number per head how much of it there is.

Tried without improvement: a fixed number of entries for each head and length, from the mean of this
ranking over training passages; attention weighted by the norm of the value's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sac_rag.compressors.anchor_selection import num_anchors
from sac_rag.compressors.config import Budget


def ranked_entries(scores: Tensor, mass: Tensor, budget: Budget) -> Tensor:
    """All entries of one segment, most important first.

    Args:
        scores: Predicted attention of each token; only differences within a head are meaningful.
            Shape: (layers, kv_heads, tokens)
        mass: Logarithm of the attention that each head pays to a text; without effect where
            budgets are uniform. Shape: (layers, kv_heads)
        budget: Which heads keep the same number of entries.

    Returns:
        head * tokens + token of each entry. Shape: (layers * kv_heads * tokens,)
    """
    layers, kv_heads, tokens = scores.shape
    worth = scores.log_softmax(dim=-1) + mass[..., None]
    if budget == "shared":
        return worth.flatten().argsort(descending=True, stable=True)
    heads = torch.arange(layers * kv_heads, device=scores.device).view(layers, kv_heads, 1)
    ranked = heads * tokens + worth.argsort(dim=-1, descending=True, stable=True)
    if budget == "layers":
        # All heads of a layer get their next entry together, ranked by its mean worth.
        by_rank = worth.exp().sort(dim=-1, descending=True).values.mean(dim=1)
        order = by_rank.flatten().argsort(descending=True, stable=True)
        return ranked.transpose(1, 2).flatten(0, 1)[order].flatten()
    return ranked.permute(2, 0, 1).flatten()


def heads_together(budget: Budget, layers: int, kv_heads: int) -> int:
    """Number of heads that get their next entry together, whatever their scores."""
    return {"shared": 1, "layers": kv_heads, "uniform": layers * kv_heads}[budget]


def num_entries(num_tokens: int, ratio: int, heads: int, step: int) -> int:
    """Number of entries kept of one segment, at least one for each head of a step.

    Args:
        num_tokens: Tokens of the segment.
        ratio: Source tokens per entry, mean over heads.
        heads: KV heads of all layers.
        step: Heads that get their next entry together.
    """
    return step * num_anchors(num_tokens * heads // step, ratio)


def joint_order(num_tokens: Sequence[int], entries: Sequence[int], heads: int, step: int) -> Tensor:
    """Order of the entries of several segments in the chunk that they make up.

    For every ratio, the first n entries, n being the sum of `num_entries` over the segments, are
    those that the segments keep at that ratio.

    Args:
        num_tokens: Tokens of each segment.
        entries: Number of entries of each segment, which are in order of importance.
        heads: KV heads of all layers.
        step: Heads that get their next entry together.

    Returns:
        Indices of entries, counted through all segments. Shape: (entries,)
    """
    places = []
    for tokens, count in zip(num_tokens, entries, strict=True):
        turn = torch.arange(count, dtype=torch.float64).div(step, rounding_mode="floor")
        # `num_anchors` keeps turn t of n at a ratio r if (2 t + 1) / 2 n is at most 1 / r, and
        # always keeps the first.
        places.append(torch.where(turn > 0, (2 * turn + 1) / (2 * tokens * heads // step), 0.0))
    return torch.cat(places).sort(stable=True).indices
