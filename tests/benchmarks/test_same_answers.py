"""The bench of equal answers counts those that are equal, and those that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor

from sac_rag import SacRAG
from sac_rag.benchmarks.same_answers import SameAnswers, measure
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.evaluation.questions import Question
from sac_rag.evaluation.sample import Trial
from sac_rag.lm.generator import Generator
from sac_rag.lm.step import Step

TRIALS = [Trial(n, Question(str(n), "Who counted?", ()), (Chunk(PROSE[n]),)) for n in range(2)]


@pytest.fixture
def rag(make_generator: Callable[..., Generator], home: Any) -> SacRAG:
    generator = make_generator("llama")  # not shared: hooks of other tests would take its step
    return SacRAG(CachedCompressor(make_compressor(generator, "full"), {}))


def test_the_decoder_writes_what_transformers_writes(rag: SacRAG) -> None:
    same = measure(rag, TRIALS, max_new_tokens=4)
    assert same == SameAnswers(questions=2, from_text=2, from_anchors=2, tokens=same.tokens)
    assert 2 <= same.tokens <= 8


def test_a_step_that_is_wrong_is_noticed(rag: SacRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = torch.zeros(1, rag.generator.model.config.vocab_size)
        logits[0, 7] = 1
        return logits

    monkeypatch.setattr(Step, "logits", wrong)
    same = measure(rag, TRIALS, max_new_tokens=4)
    assert same.from_text == same.from_anchors == 0


def test_a_model_without_a_step_of_its_own_is_refused(rag: SacRAG) -> None:
    hook = rag.generator.model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="must have a step of its own"):
        measure(rag, TRIALS)
    hook.remove()
