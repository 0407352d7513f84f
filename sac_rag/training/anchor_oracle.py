"""How much a better choice of anchors would bring. Knows nothing of how a choice is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sac_rag.compressors.anchor_selection import (
    attention_when_read_again,
    strided_anchors,
    top_anchors,
)
from sac_rag.compressors.sac import SAC
from sac_rag.kv import AnchorKV
from sac_rag.training.objective import Objective
from sac_rag.training.rows import Row

_BEST = "these questions"


@dataclass(frozen=True)
class AnchorChoice:
    """How questions are answered with one choice of anchors out of one and the same KV.

    Attributes:
        anchors: Who chose them.
        ratio: Source tokens per anchor.
        kept: Share of the most attention that could have been kept, mean over layers and heads.
        loss: Cross-entropy of the gold answers, in nats a token.
        accuracy: Share of the gold answers' tokens that were the likeliest.
    """

    anchors: str
    ratio: int
    kept: float
    loss: float
    accuracy: float


def compare_anchors(
    objective: Objective,
    rows: Sequence[Row],
    ratios: Sequence[int],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> list[AnchorChoice]:
    """Keeps of each chunk what one and another would keep, and asks the same questions.

    "these questions" is no method: it keeps what the very questions look at when all is kept, and
    so is what any choice made before they are known can at most hope for.

    Args:
        objective: With a compressor whose anchors are learned.
        rows: Each with one chunk.
        ratios: Source tokens per anchor.
        on_progress: Called with 1 after each row.

    Raises:
        ValueError: if the compressor's anchors are not learned, or a row has several chunks.
    """
    compressor = objective.compressor
    if not isinstance(compressor, SAC) or compressor.config.anchors != "learned":
        raise ValueError("only learned anchors can be compared with others'")
    sums: dict[tuple[str, int], Tensor] = {}
    for row in rows:
        ((kv, attention),) = objective.attention(row)
        scores = _scores(compressor, row, kv, attention)
        for ratio in ratios:
            chosen = {name: top_anchors(of_one, ratio) for name, of_one in scores.items()}
            every = strided_anchors(kv.num_tokens, ratio).to(attention.device)
            chosen["every so many"] = every.expand(*attention.shape[:2], -1)
            most = attention.gather(-1, chosen[_BEST]).sum()
            for name, kept in chosen.items():
                predicted = objective.predict_from([row], [_only(kv, kept)])
                count = len(predicted.labels)
                share = float(attention.gather(-1, kept).sum() / most)
                loss, correct = float(predicted.loss) * count, int(predicted.correct.sum())
                of_row = torch.tensor([share, 1, loss, correct, count], dtype=torch.float64)
                sums[name, ratio] = sums.get((name, ratio), torch.zeros_like(of_row)) + of_row
        if on_progress is not None:
            on_progress(1)
    return [
        AnchorChoice(name, ratio, share / rows_read, loss / count, correct / count)
        for (name, ratio), of_all in sums.items()
        for share, rows_read, loss, correct, count in [of_all.tolist()]
    ]


def _scores(compressor: SAC, row: Row, kv: AnchorKV, attention: Tensor) -> dict[str, Tensor]:
    """How much each would like to keep each token. Shape of each: (layers, kv_heads, tokens)."""
    tokens = torch.tensor(row.sources[0].ids, device=kv.keys.device)
    positions = torch.arange(kv.num_tokens, device=kv.keys.device)
    again = attention_when_read_again(compressor.generator, compressor.sink_ids, tokens)
    keys, values, _ = kv.by_head()
    return {
        "scorer": compressor.scores(positions, keys, values).detach(),
        "read again": again,
        _BEST: attention,
    }


def _only(kv: AnchorKV, kept: Tensor) -> AnchorKV:
    keys, values, _ = kv.by_head()
    index = kept[..., None].expand(-1, -1, -1, kv.head_dim)
    return AnchorKV.uniform(
        keys.gather(2, index), values.gather(2, index), kept.int(), kv.num_tokens
    )
