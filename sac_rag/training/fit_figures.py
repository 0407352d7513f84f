"""Figures of a fitted compressor on held-out passages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sac_rag.compressors.sac import SAC
from sac_rag.kv import AnchorKV
from sac_rag.training.objective import Objective
from sac_rag.training.rows import Row

RATIOS = (2, 3, 5, 10, 20)

OnEvent: TypeAlias = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class FitFigure:
    """Figures of held-out targets with one choice of entries, teacher-forced.

    Attributes:
        prompt: "plain" or "chat"; "own" for the prompt of a trained compressor.
        ratio: Source tokens per entry; 1 = all kept.
        budget: "shared" as fitted, or "uniform": the same number of entries in every head.
        attention_kept: Share of the attention to the passages that goes to kept entries.
        loss: Cross-entropy of the targets, in nats per token.
        accuracy: Share of the targets' tokens that were the most likely.
    """

    prompt: str
    ratio: int
    budget: str
    attention_kept: float
    loss: float
    accuracy: float


@torch.no_grad()
def measure(
    compressor: SAC,
    objectives: Mapping[str, Objective],
    passages: Sequence[Mapping[str, Row]],
    tell: OnEvent,
) -> tuple[tuple[FitFigure, ...], float]:
    """Figures of each prompt, ratio and budget; bytes per source token at the config's ratio."""
    ratio = compressor.config.ratio
    compressors = {"shared": compressor, "uniform": compressor.with_budget("uniform")}
    settings = [(1, "shared")]
    settings += [(r, budget) for r in sorted({*RATIOS, ratio} - {1}) for budget in compressors]
    sums: dict[tuple[str, int, str], Tensor] = {}
    nbytes, tokens = 0, 0
    for number, rows in enumerate(passages):
        objective, row = next(zip(objectives.values(), rows.values(), strict=True))
        whole = {b: objective.encode(c.at_ratio(1), [row]) for b, c in compressors.items()}
        for kv in whole["shared"]:
            nbytes += kv.first(compressor.num_entries(kv.num_tokens)).nbytes
            tokens += kv.num_tokens
        for prompt, row in rows.items():
            attention = [received for _, received in objectives[prompt].attention(row)]
            for at, budget in settings:
                kvs = [
                    kv.first(compressors[budget].num_entries(kv.num_tokens, at))
                    for kv in whole[budget]
                ]
                predicted = objectives[prompt].predict_from([row], kvs)
                count = len(predicted.labels)
                of_row = torch.tensor(
                    [
                        sum(map(_received, kvs, attention)),
                        sum(float(received.sum()) for received in attention),
                        float(predicted.loss) * count,
                        int(predicted.correct.sum()),
                        count,
                    ],
                    dtype=torch.float64,
                )
                key = (prompt, at, budget)
                sums[key] = sums.get(key, torch.zeros_like(of_row)) + of_row
        tell({"event": "measure", "done": number + 1, "total": len(passages)})
    figures = []
    for (prompt, at, budget), sum_of_rows in sums.items():
        on_kept, received, loss, correct, count = sum_of_rows.tolist()
        shares = (on_kept / received, loss / count, correct / count)
        figures.append(FitFigure(prompt, at, budget, *shares))
    return tuple(figures), nbytes / tokens


def _received(kv: AnchorKV, attention: Tensor) -> float:
    """Attention to the kept entries of a chunk, of that to its tokens.

    Shape of `attention`: (layers, kv_heads, tokens)
    """
    return float(attention.flatten(0, 1)[kv.heads.long(), kv.positions.long()].sum())
