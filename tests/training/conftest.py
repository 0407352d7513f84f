"""Data, settings and a model for tiny training runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import PROSE
from support.training import ASKED

from sac_rag.lm.generator import Generator
from sac_rag.training.config import TrainConfig


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """SQuAD's layout: eight paragraphs in four articles."""
    articles = [
        {
            "title": f"article {number}",
            "paragraphs": [
                {
                    "context": PROSE[i],
                    "qas": [{"id": str(i), "question": asked, "answers": [{"text": answer}]}],
                }
                for i in (2 * number, 2 * number + 1)
                for asked, answer in [ASKED[i]]
            ],
        }
        for number in range(4)
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"data": articles}))
    return path


@pytest.fixture
def config(questions: Path) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "data": [str(questions)],
            "held_out_share": 0.25,
            "ratios": [2, 5],
            "chunks": [1, 3],
            "steps": 6,
            "batch_tokens": 300,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "scorer_texts": 4,
            "eval_every": 3,
            "eval_examples": 2,
            "eval_answers": 2,
            "compressor": {"lora_rank": 4, "lora_alpha": 8},
        }
    )


@pytest.fixture
def own(make_generator: Callable[..., Generator]) -> Generator:
    """A tiny Llama of this test's own, to be trained on."""
    return make_generator("llama")
