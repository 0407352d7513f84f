"""Processes that train together, as `accelerate launch` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sac_rag.compressors.base import Compressor


def is_main_process() -> bool:
    """Whether this is the first of the processes: the one that writes and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def own_device() -> str | None:
    """The GPU of this process among those of its machine; None for the default."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


def batches_per_process(batches: int) -> int:
    """Batches of a step that each process computes.

    Args:
        batches: Those of all processes; 0 for one each.

    Raises:
        ValueError: if they cannot be shared out equally.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batches % processes:
        raise ValueError(
            f"batches_per_step must be a multiple of the {processes} processes, was: {batches}"
        )
    return batches // processes or 1


def share_weights(accelerator: Accelerator, compressor: Compressor, names: Iterable[str]) -> None:
    """Copies weights from the first process to all: computed in each, they may differ in bits."""
    if accelerator.num_processes > 1:
        for name in sorted(names):
            torch.distributed.broadcast(compressor.weights[name].data, src=0)


@dataclass(frozen=True, eq=False)
class Step:
    """Figures of a training step.

    Attributes:
        loss: Mean over its batches. Shape: ().
        ratio: That of the first batch.
        tokens: Encoded and decoded.
        seconds: Its duration.
        is_last: Whether the run must end after it.
    """

    loss: Tensor
    ratio: int
    tokens: int
    seconds: float
    is_last: bool

    def over_all(self, accelerator: Accelerator) -> Step:
        """The figures of all processes: their mean, and the sum of tokens.

        All processes take the same decisions, or one would wait for the others for ever.
        """
        count = accelerator.num_processes
        if count == 1:
            return self
        figures = (self.loss, self.tokens, self.seconds, float(self.is_last))
        summed = accelerator.reduce(
            torch.stack([torch.as_tensor(n, device=self.loss.device).double() for n in figures])
        ).tolist()
        loss, tokens, seconds, ending = summed
        return replace(
            self,
            loss=self.loss.new_tensor(loss / count),
            tokens=round(tokens),
            seconds=seconds / count,
            is_last=ending > 0,
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as the history of a run has them; a loss on a GPU stays there."""
        # Reading it from a GPU would wait for the step.
        loss = self.loss if self.loss.is_cuda else self.loss.item()
        seconds = round(self.seconds, 3)
        return {"loss": loss, "ratio": self.ratio, "tokens": self.tokens, "seconds": seconds}
