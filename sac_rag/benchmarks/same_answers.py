"""Counts questions that the decoder answers with the tokens of transformers' own passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sac_rag.evaluation.sample import Trial
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.assemble import assemble
from sac_rag.prompts.decode import Decoder
from sac_rag.prompts.decoding import Decoding


@dataclass(frozen=True)
class SameAnswers:
    """Questions with the same greedy answer both ways.

    Attributes:
        questions: That were asked.
        from_text: The decoder's tokens behind the text are those of transformers' `generate`.
        from_anchors: The answers from anchors are those that transformers' forward pass, in place
            of the decoder's own step, writes behind them.
        tokens: Of all answers from text.
    """

    questions: int
    from_text: int
    from_anchors: int
    tokens: int


def measure(
    rag: SacRAG,
    trials: Sequence[Trial],
    *,
    max_new_tokens: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> SameAnswers:
    """Answers each question in each way.

    Args:
        rag: Its model must be of an architecture that has a step of its own.
        trials: Questions with their passages.
        max_new_tokens: Longest answer.
        on_progress: Called with the number of questions answered since the last call.

    Raises:
        ValueError: if the decoder has no step of its own for the model.
    """
    generator, decoding = rag.generator, Decoding(max_new_tokens=max_new_tokens)
    if generator.step(rag.compressor.generator_adapter) is None:
        raise ValueError(
            "the decoder must have a step of its own to compare, but writes answers of this model "
            "by transformers' forward pass"
        )
    from_text = from_anchors = tokens = 0
    for trial in trials:
        ask = (trial.question.text, trial.chunks, decoding)
        ids = rag.prompt_ids(*ask[:2])
        written = _decoded(generator, ids, max_new_tokens)
        from_text += written == _generated(generator, ids, max_new_tokens)
        tokens += len(written)
        answer = rag.answer(*ask)
        with _by_forward_pass(generator):
            expected = rag.answer(*ask)
        from_anchors += (answer.text, answer.usage.generated_tokens) == (
            expected.text,
            expected.usage.generated_tokens,
        )
        if on_progress is not None:
            on_progress(1)
    return SameAnswers(len(trials), from_text, from_anchors, tokens)


def _decoded(generator: Generator, ids: list[int], most: int) -> list[int]:
    """Tokens that the decoder writes, its end token included."""
    decoder = Decoder(generator)
    tokens = decoder.join(assemble([[ids]], generator), Decoding()).tolist()
    while len(tokens) < most and tokens[-1] not in generator.eos_ids:
        tokens += decoder.step().tolist()
    return tokens


@torch.no_grad()
def _generated(generator: Generator, ids: list[int], most: int) -> list[int]:
    """Tokens that transformers writes, its end token included."""
    batch = torch.tensor([ids], device=generator.device)
    with generator.running() as model:
        written = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=list(generator.eos_ids),
            pad_token_id=0,
        )
    tokens: list[int] = written[0, len(ids) :].tolist()
    return tokens


@contextmanager
def _by_forward_pass(generator: Generator) -> Iterator[None]:
    """The decoder takes no step of its own where the model has a hook, which must be called."""
    hook = generator.model.register_forward_hook(lambda module, args, output: None)
    try:
        yield
    finally:
        hook.remove()
