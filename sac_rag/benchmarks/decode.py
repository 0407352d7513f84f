"""Tokens per second of answers: transformers' generate, the decoder, and it in fewer bits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sac_rag.benchmarks.timing import in_turn, seconds_of
from sac_rag.lm.generator import Generator
from sac_rag.lm.quantized import PACKERS
from sac_rag.prompts.assemble import assemble
from sac_rag.prompts.decode import Decoder
from sac_rag.prompts.decoding import Decoding


@dataclass(frozen=True)
class DecodeRow:
    """Speed of one way to write answers.

    Attributes:
        way: "generate" of transformers; "decoder", or the bits of its matrices; or "bound": reading
            all matrices once from memory, in exact weights.
        rows: Answers that are written together.
        token_ms: Milliseconds for one token of every row; the median over all rounds.
        tokens_per_s: Of all rows together.
        relative: tokens_per_s over that of "generate".
    """

    way: str
    rows: int
    token_ms: float
    tokens_per_s: float
    relative: float


def measure(
    generator: Generator,
    text: str,
    *,
    rows: Sequence[int] = (1, 8),
    tokens: int = 16,
    repeats: int = 3,
) -> list[DecodeRow]:
    """Times greedy answers to a text in this process, in turn.

    Args:
        generator: Model, dtype and threads of all rows; its weights are exact.
        text: What is read before.
        rows: Answers that are written together.
        tokens: Tokens of each round that are timed, behind the first two.
        repeats: Rounds.
    """
    kinds = list(PACKERS) if generator.device.type == "cpu" else []
    packed = {kind: Generator(generator.model, generator.tokenizer, weights=kind) for kind in kinds}
    decoders = {"decoder": generator, **packed}
    ids = generator.tokenize(text)
    measured = []
    for count in rows:
        ways: dict[str, Callable[[], list[float]]] = {
            "generate": partial(_generate, generator, ids, count, tokens),
            **{way: partial(_decode, of, ids, count, tokens) for way, of in decoders.items()},
            "bound": partial(_read, generator.model),
        }
        times = in_turn(list(ways.values()), repeats)
        medians = [statistics.median([*chain(*rounds)]) for rounds in times]
        measured += [
            DecodeRow(way, count, 1000 * seconds, count / seconds, medians[0] / seconds)
            for way, seconds in zip(ways, medians, strict=True)
        ]
    return measured


@torch.no_grad()
def _generate(generator: Generator, ids: Sequence[int], rows: int, tokens: int) -> list[float]:
    """Seconds of each token that transformers writes."""
    moments: list[float] = []

    def note(written: Tensor, scores: Tensor, **_: Any) -> Tensor:
        moments.append(time.perf_counter())
        return torch.zeros(rows, dtype=torch.bool, device=written.device)

    batch = torch.tensor([list(ids)] * rows, device=generator.device)
    with generator.running() as model:
        model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            min_new_tokens=tokens + 3,
            max_new_tokens=tokens + 3,
            pad_token_id=0,
            stopping_criteria=[note],
        )
    return [end - begin for begin, end in pairwise(moments[2:])]


def _decode(generator: Generator, ids: Sequence[int], rows: int, tokens: int) -> list[float]:
    """Seconds of each token that the decoder writes."""
    decoder = Decoder(generator)
    decoder.join(assemble([[list(ids)]] * rows, generator), Decoding())
    for _ in range(2):
        decoder.step().tolist()
    return [seconds_of(lambda: decoder.step().tolist()) for _ in range(tokens)]


def _read(model: Any) -> list[float]:
    """Seconds of reading every matrix that a token needs."""
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return [seconds_of(lambda: [matrix.sum() for matrix in matrices])]
