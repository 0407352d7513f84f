"""Gap between the anchors that a compressor chooses and those that an oracle would choose."""

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

_ORACLE = "these questions"


@dataclass(frozen=True)
class AnchorChoice:
    """Figures of one choice of anchors, all choices being made from the same KV.

    Attributes:
        anchors: Name of the choice.
        ratio: Source tokens per anchor.
        attention_kept: Attention to the kept tokens as a share of what the oracle keeps, mean over
            layers and heads.
        loss: Cross-entropy of the gold answers, in nats per token.
        accuracy: Share of the gold answers' tokens that were the most likely.
    """

    anchors: str
    ratio: int
    attention_kept: float
    loss: float
    accuracy: float


def compare_anchors(
    objective: Objective,
    rows: Sequence[Row],
    ratios: Sequence[int],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> list[AnchorChoice]:
    """Answers the same questions with the anchors of several choices.

    "these questions" is the oracle: it keeps the tokens that these very questions attend to when
    all are kept. That is an upper bound for any choice made before the questions are known.

    Args:
        objective: Its compressor must have learned anchors.
        rows: Questions, each row with one chunk.
        ratios: Source tokens per anchor.
        on_progress: Called with 1 after each row.

    Raises:
        ValueError: if the compressor's anchors are not learned, or a row has several chunks.
    """
    compressor = objective.compressor
    if not isinstance(compressor, SAC) or compressor.config.anchors != "learned":
        raise ValueError(
            "anchors must be 'learned' to be compared with other choices, was: "
            f"{compressor.config.anchors!r}"
        )
    sums: dict[tuple[str, int], Tensor] = {}
    for row in rows:
        ((kv, attention),) = objective.attention(row)
        scores = _scores(compressor, row, kv, attention)
        for ratio in ratios:
            chosen = {name: top_anchors(values, ratio) for name, values in scores.items()}
            strided = strided_anchors(kv.num_tokens, ratio).to(attention.device)
            chosen["uniform"] = strided.expand(*attention.shape[:2], -1)
            most = attention.gather(-1, chosen[_ORACLE]).sum()
            for name, anchors in chosen.items():
                predicted = objective.predict_from([row], [_only(kv, anchors)])
                count = len(predicted.labels)
                share = float(attention.gather(-1, anchors).sum() / most)
                loss, correct = float(predicted.loss) * count, int(predicted.correct.sum())
                of_row = torch.tensor([share, 1, loss, correct, count], dtype=torch.float64)
                sums[name, ratio] = sums.get((name, ratio), torch.zeros_like(of_row)) + of_row
        if on_progress is not None:
            on_progress(1)
    return [
        AnchorChoice(name, ratio, share / rows_read, loss / count, correct / count)
        for (name, ratio), sum_of_rows in sums.items()
        for share, rows_read, loss, correct, count in [sum_of_rows.tolist()]
    ]


def _scores(compressor: SAC, row: Row, kv: AnchorKV, attention: Tensor) -> dict[str, Tensor]:
    """Score of each token by each choice. Shape of each: (layers, kv_heads, tokens)."""
    tokens = torch.tensor(row.sources[0].ids, device=kv.keys.device)
    positions = torch.arange(kv.num_tokens, device=kv.keys.device)
    again = attention_when_read_again(compressor.generator, compressor.sink_ids, tokens)
    keys, values, _ = kv.by_head()
    return {
        "scorer": compressor.scores(positions, keys, values).detach(),
        "read again": again,
        _ORACLE: attention,
    }


def _only(kv: AnchorKV, anchors: Tensor) -> AnchorKV:
    keys, values, _ = kv.by_head()
    index = anchors[..., None].expand(-1, -1, -1, kv.head_dim)
    return AnchorKV.uniform(
        keys.gather(2, index), values.gather(2, index), anchors.int(), kv.num_tokens
    )
