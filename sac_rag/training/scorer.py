"""Fits the scorer that chooses anchors. Knows no prompts, and no gradients but the scorer's own.

What is needed of a text shows when all of it is kept: in each head, it is what questions about the
text look at. KVzip (arXiv 2505.23416) takes that from a second reading of the text, KVzap
(arXiv 2601.07891) found that it can be foretold from hidden states; here it is foretold from a
chunk's KV, so that one pass is enough to encode, and learned from questions, where there are any.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from sac_rag.anchors import top_anchors
from sac_rag.compressors.sac import SAC
from sac_rag.compressors.scorer import Scorer, token_features
from sac_rag.kv import AnchorKV

# Every so-many-th chunk is not learned from: it shows what the scorer has learned.
_HELD_OUT = 10
_EPOCHS, _BATCH, _LEARNING_RATE, _WEIGHT_DECAY = 3, 4, 2e-3, 0.05


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a scorer sees of a chunk, and what it is to foretell.

    Attributes:
        features: Of every token, float16. Shape: (layers, tokens, features)
        attention: The most that each token received. Shape: (layers, kv_heads, tokens)
    """

    features: Tensor
    attention: Tensor


def fit_scorer(
    compressor: SAC,
    chunks: Iterable[tuple[AnchorKV, Tensor]],
    *,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> float:
    """Teaches `compressor.scorer`, from where it is, which tokens of a chunk will be looked at.

    It learns each head's distribution of attention by cross-entropy: what must be right is which
    tokens get most of it. Keys and values of all chunks are kept in memory meanwhile, about 4 MB a
    paragraph for a model of 135M parameters.

    Args:
        compressor: With anchors="learned". Its LoRA is as it is.
        chunks: KV of all tokens of a chunk at position 0, and the most attention that each token
            received in each layer and KV head, see `Objective.attention`.
        seed: Equal seeds and chunks fit equal scorers.
        on_progress: Called with 1 after each chunk is read.

    Returns:
        Of the attention that the best choice of anchors keeps at the config's ratio, the share
        that the scorer's choice keeps, over chunks it did not learn from, a tenth of them; a
        single chunk is learned from and measured.

    Raises:
        ValueError: if there is no chunk, or the compressor has no scorer.
    """
    if compressor.config.anchors != "learned":
        raise ValueError(
            "only a compressor with anchors='learned' has a scorer, was: "
            f"anchors={compressor.config.anchors!r}"
        )
    lessons: list[Lesson] = []
    for kv, attention in chunks:
        positions = torch.arange(kv.num_tokens, device=kv.keys.device)
        frequencies = compressor.generator.frequencies
        features = token_features(positions, kv.keys, kv.values, frequencies)
        lessons.append(Lesson(features.half(), attention))
        if on_progress is not None:
            on_progress(1)
    if not lessons:
        raise ValueError("expected at least one chunk to fit the scorer on, got none")
    held = lessons[::_HELD_OUT]
    learned = [lesson for i, lesson in enumerate(lessons) if i % _HELD_OUT] or lessons
    _learn(compressor.scorer, learned, seed)
    return _share_kept(compressor.scorer, held, compressor.config.ratio)


def _learn(scorer: Scorer, lessons: list[Lesson], seed: int) -> None:
    mean, scale = _spread(lessons)
    # While it learns, its weights are for features of mean 0 and deviation 1.
    scorer.take_in(-mean / scale, 1 / scale)
    rng = random.Random(seed)
    batches = -(-len(lessons) // _BATCH)
    with torch.enable_grad():
        optimizer = AdamW(scorer.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        schedule = OneCycleLR(
            optimizer, _LEARNING_RATE, total_steps=_EPOCHS * batches + 1, pct_start=0.1
        )
        for _ in range(_EPOCHS):
            order = rng.sample(lessons, len(lessons))
            for begin in range(0, len(order), _BATCH):
                batch = order[begin : begin + _BATCH]
                for lesson in batch:
                    scores = scorer((lesson.features.float() - mean[:, None]) / scale[:, None])
                    wanted = lesson.attention / lesson.attention.sum(dim=-1, keepdim=True)
                    loss = -(wanted * scores.log_softmax(dim=-1)).sum(dim=-1).mean()
                    (loss / len(batch)).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    scorer.take_in(mean, scale)


def _spread(lessons: list[Lesson]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature. Shape of each: (layers, features)."""
    # Float64, for the variance is a difference of large sums.
    features = [lesson.features.double() for lesson in lessons[:200]]
    count = sum(x.shape[1] for x in features)
    mean = torch.stack([x.sum(1) for x in features]).sum(0) / count
    square = torch.stack([x.square().sum(1) for x in features]).sum(0) / count
    scale = (square - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float(), scale.float()


@torch.no_grad()
def _share_kept(scorer: Scorer, lessons: list[Lesson], ratio: int) -> float:
    kept, best = 0.0, 0.0
    for lesson in lessons:
        chosen = top_anchors(scorer(lesson.features.float()), ratio)
        kept += float(lesson.attention.gather(-1, chosen).sum())
        best += float(lesson.attention.gather(-1, top_anchors(lesson.attention, ratio)).sum())
    return kept / best
