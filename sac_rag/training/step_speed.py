"""Tokens per second of a training step, beside the bare model's over the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sac_rag.benchmarks.timing import time_in_turn
from sac_rag.lm.generator import Generator
from sac_rag.training.batches import Batch, BatchStream, split_examples
from sac_rag.training.config import TrainConfig
from sac_rag.training.objective import Objective
from sac_rag.training.rows import Row, RowMaker, Source
from sac_rag.training.trainer import Learner, new_compressor


@dataclass(frozen=True)
class StepSpeed:
    """The time of one way to read the same batches.

    Attributes:
        what: "model, forward" or "model, forward and backward", where each row is one plain
            sequence in a padded batch and there is no LM head; "step", a training step without
            the optimizer.
        tokens: Of all batches, without pads and sinks.
        seconds: The median over repeats.
    """

    what: str
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as JSON holds them."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def measure(config: TrainConfig, *, batches: int = 6, repeats: int = 3) -> list[StepSpeed]:
    """Times steps of a run in this process, in turn with the model alone.

    Args:
        config: Of the run; its scorer stays untrained, since speed does not depend on it.
        batches: Number of the run's first batches.
        repeats: Measurements of each, after one that warms up; the median counts.

    Raises:
        ValueError: as for `train`.
    """
    examples, _ = split_examples(config)
    generator = Generator.from_pretrained(config.model, dtype=config.dtype or None)
    maker = RowMaker(generator, config.formats)
    learner = Learner(Objective(new_compressor(config, generator), maker.prefix_ids))
    drawn = list(islice(BatchStream(config, maker, examples), batches))
    ways: dict[str, Callable[[Batch], None]] = {
        "model, forward": lambda batch: _forward(generator, batch.rows),
        "model, forward and backward": lambda batch: _backward(generator, batch.rows),
        "step": lambda batch: _step(learner, batch),
    }
    return _timed(ways, drawn, repeats)


def _timed(
    ways: dict[str, Callable[[Batch], None]], batches: Sequence[Batch], repeats: int
) -> list[StepSpeed]:
    tokens = sum(row.num_encoded + row.num_decoded for batch in batches for row in batch.rows)
    times = time_in_turn(
        [partial(_over, way, batches) for way in ways.values()], repeats, warm_up=True
    )
    return [StepSpeed(what, tokens, timed.median) for what, timed in zip(ways, times, strict=True)]


def _over(way: Callable[[Batch], None], batches: Sequence[Batch]) -> None:
    for batch in batches:
        way(batch)


def _step(learner: Learner, batch: Batch) -> None:
    learner(batch).backward()
    learner.zero_grad()


@torch.no_grad()
def _forward(generator: Generator, rows: Sequence[Row]) -> None:
    _read(generator, rows, learns=False)


def _backward(generator: Generator, rows: Sequence[Row]) -> None:
    torch.autograd.backward(_read(generator, rows, learns=True).sum())


def _read(generator: Generator, rows: Sequence[Row], *, learns: bool) -> Tensor:
    """Reads rows as plain sequences. Shape: (rows, tokens, hidden)."""
    ids = [torch.tensor(_flat(row), device=generator.device) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    with generator.running() as model:
        embeds = model.get_input_embeddings()(padded).detach().requires_grad_(learns)
        hidden: Tensor = model.base_model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False
        ).last_hidden_state
    return hidden


def _flat(row: Row) -> list[int]:
    parts = [part.ids if isinstance(part, Source) else part for part in row.parts]
    return [i for ids in (*parts, *(target.ids for target in row.targets)) for i in ids]
