"""Fits the scorer that chooses anchors, and the budgets of heads.

The targets are measured with all tokens kept: the attention of questions about a text in each head.
KVzip (arXiv 2505.23416) takes it from a second reading of the text, KVzap (arXiv 2601.07891) found
that it can be predicted from hidden states; here it is predicted from the KV of a chunk, so that
encoding takes one pass, and learned from questions where there are any.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from sac_rag.compressors.anchor_selection import Scorer, token_features, top_anchors
from sac_rag.compressors.sac import SAC
from sac_rag.kv import AnchorKV

# Every tenth chunk is held out for the returned figure.
_HELD_OUT = 10
_EPOCHS, _BATCH, _LEARNING_RATE, _WEIGHT_DECAY = 3, 4, 2e-3, 0.05
_LEAST_MASS = 1e-9  # of a head without attention to the text, so that its logarithm is finite


@dataclass(frozen=True, eq=False)
class ScorerExample:
    """Input and target of a scorer for one chunk.

    Attributes:
        features: Features of every token, float16. Shape: (layers, tokens, features)
        attention: Largest attention to each token. Shape: (layers, kv_heads, tokens)
    """

    features: Tensor
    attention: Tensor


def fit_scorer(
    compressor: SAC,
    chunks: Iterable[tuple[AnchorKV, Tensor]],
    *,
    seed: int = 0,
    budget_only: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> float:
    """Fits `compressor.scorer`, from its present weights, to predict attention to tokens.

    It learns the distribution of attention of each head by cross-entropy. The budgets are fitted
    too, if the compressor has any: the attention that each head pays to a text. Features of all
    chunks are kept in memory meanwhile, about 4 MB per paragraph for a model of 135M parameters.

    Args:
        compressor: Must have anchors="learned". Its LoRA does not change.
        chunks: KV of all tokens of a chunk at position 0, and the largest attention to each token
            in each layer and KV head, see `Objective.attention`.
        seed: Equal seeds and chunks fit equal scorers.
        budget_only: Whether the scorer is not fitted.
        on_progress: Called with 1 after each chunk is read.

    Returns:
        Attention to the entries that the compressor keeps at the config's ratio, as a share of that
        to the best choice, over held-out chunks (a tenth; a single chunk is fitted on, too).

    Raises:
        ValueError: if there is no chunk, or the compressor has no scorer.
    """
    if compressor.config.anchors != "learned":
        raise ValueError(
            "only a compressor with anchors='learned' has a scorer, was: "
            f"anchors={compressor.config.anchors!r}"
        )
    examples: list[ScorerExample] = []
    for kv, attention in chunks:
        keys, values, _ = kv.by_head()
        positions = torch.arange(kv.num_tokens, device=keys.device)
        features = token_features(positions, keys, values, compressor.generator.frequencies)
        examples.append(ScorerExample(features.half(), attention))
        if on_progress is not None:
            on_progress(1)
    if not examples:
        raise ValueError("expected at least one chunk to fit the scorer on, got none")
    held_out = examples[::_HELD_OUT]
    learned = [example for i, example in enumerate(examples) if i % _HELD_OUT] or examples
    if not budget_only:
        _learn(compressor.scorer, learned, seed)
    if "budget" in compressor.weights:
        mass = torch.stack([example.attention.sum(dim=-1) for example in examples]).mean(dim=0)
        with torch.no_grad():
            compressor.weights["budget"].copy_(mass.clamp_min(_LEAST_MASS).log())
    return _share_kept(compressor, held_out)


def _learn(scorer: Scorer, examples: list[ScorerExample], seed: int) -> None:
    mean, scale = _spread(examples)
    # During fitting, the weights are for features of mean 0 and deviation 1.
    scorer.fold_normalization(-mean / scale, 1 / scale)
    rng = random.Random(seed)
    batches = -(-len(examples) // _BATCH)
    with torch.enable_grad():
        optimizer = AdamW(scorer.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        # Never 10: a warm-up of a tenth would be a phase without a step.
        steps = _EPOCHS * batches + 2
        schedule = OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1)
        for _ in range(_EPOCHS):
            order = rng.sample(examples, len(examples))
            for begin in range(0, len(order), _BATCH):
                batch = order[begin : begin + _BATCH]
                for example in batch:
                    scores = scorer((example.features.float() - mean[:, None]) / scale[:, None])
                    target = example.attention / example.attention.sum(dim=-1, keepdim=True)
                    loss = -(target * scores.log_softmax(dim=-1)).sum(dim=-1).mean()
                    (loss / len(batch)).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    scorer.fold_normalization(mean, scale)


def _spread(examples: list[ScorerExample]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature. Shape of each: (layers, features)."""
    # Float64, since the variance is a difference of large sums.
    features = [example.features.double() for example in examples[:200]]
    count = sum(x.shape[1] for x in features)
    mean = torch.stack([x.sum(1) for x in features]).sum(0) / count
    square = torch.stack([x.square().sum(1) for x in features]).sum(0) / count
    scale = (square - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float(), scale.float()


@torch.no_grad()
def _share_kept(compressor: SAC, examples: list[ScorerExample]) -> float:
    ratio, achieved, best = compressor.config.ratio, 0.0, 0.0
    for example in examples:
        attention, count = example.attention, example.attention.shape[-1]
        entries = compressor.entries_of(compressor.scorer(example.features.float()))
        entries = entries[: compressor.num_segment_entries(count)]
        achieved += float(attention.flatten()[entries].sum())
        if compressor.config.budget == "uniform":
            best += float(attention.gather(-1, top_anchors(attention, ratio)).sum())
        else:
            best += float(attention.flatten().topk(len(entries)).values.sum())
    return achieved / best
