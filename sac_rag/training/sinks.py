"""Sinks compared: the text that the encoder reads before each chunk, and drops.

A chunk that is encoded alone begins with tokens that draw much attention whatever they are, and
whose keys no prompt has. Behind a sink it is encoded as if it stood inside a prompt, but one sink
has to serve all prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sac_rag.compressors.full import Full
from sac_rag.evaluation.questions import QAExample
from sac_rag.lm.generator import Generator
from sac_rag.prompts.chat import opening
from sac_rag.prompts.format import SPANS
from sac_rag.training.objective import Objective
from sac_rag.training.prompts import named_prompt
from sac_rag.training.rows import RowMaker


@dataclass(frozen=True)
class SinkScore:
    """How well the frozen LM answers from whole passages that were encoded behind a sink.

    Attributes:
        sink: Its name.
        prompt: Name of the prompt that is asked in.
        tokens: Tokens of the gold answers.
        loss: Their cross-entropy, in nats per token.
        accuracy: Share of them that were the most likely.
    """

    sink: str
    prompt: str
    tokens: int
    loss: float
    accuracy: float


def sinks_of(generator: Generator) -> dict[str, str]:
    """Texts to try as sinks, by name: what prompts of the model begin with."""
    start = opening(generator.tokenizer)
    return {
        "none": "",
        "first token": generator.tokenizer.decode(generator.tokenize(start, special=True)[:1]),
        "beginning of a chat": start,
        "few-shot instruction": SPANS.opening(generator.tokenizer),
    }


@torch.no_grad()
def compare_sinks(
    generator: Generator,
    examples: Sequence[QAExample],
    prompts: Sequence[str],
    sinks: Mapping[str, str],
) -> Iterator[SinkScore]:
    """Scores every sink in every prompt, without LoRA and with every token kept.

    Args:
        generator: The frozen LM.
        examples: Three questions of each are asked.
        prompts: Names, see `prompts.named_prompt`.
        sinks: Texts by name; special tokens in them count.
    """
    for sink, text in sinks.items():
        full = Full(generator, Full.default_config(sink=text, stored_dtype="float32"))
        for prompt in prompts:
            maker = RowMaker(generator, named_prompt(prompt))
            objective = Objective(full, maker.prefix_ids)
            loss, correct, count = 0.0, 0, 0
            for example in examples:
                for row in maker.rows(example.gold[:1], example.questions[:3]):
                    predicted = objective.predict([row], 1)
                    count += len(predicted.labels)
                    loss += float(predicted.loss) * len(predicted.labels)
                    correct += int(predicted.correct.sum())
            yield SinkScore(sink, prompt, count, loss / count, correct / count)
