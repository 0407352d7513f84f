"""What long runs on a fast device need: batches made ahead, a clock's schedule, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.models import PROSE
from torch.utils.data import DataLoader

from sac_rag.lm.generator import Generator
from sac_rag.training.batches import Batch, BatchStream, split_examples
from sac_rag.training.config import TrainConfig
from sac_rag.training.rows import RowMaker
from sac_rag.training.trainer import train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    articles = [
        {
            "title": f"article {number}",
            "paragraphs": [
                {
                    "context": text,
                    "qas": [{"id": "0", "question": "What?", "answers": [{"text": text[:10]}]}],
                }
            ],
        }
        for number, text in enumerate(PROSE)
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"data": articles}))
    return TrainConfig.from_dict(
        {
            "data": [str(path)],
            "ratios": [2, 5],
            "steps": 6,
            "batch_tokens": 200,
            "scorer_texts": 0,
            "eval_every": 100,
            "eval_examples": 1,
            "eval_answers": 0,
            "compressor": {"lora_rank": 4, "lora_alpha": 8},
        }
    )


def loaded(llama: Generator, config: TrainConfig, count: int) -> list[Batch]:
    """The first batches of a DataLoader with the config's workers."""
    files, _ = split_examples(config)
    stream = BatchStream(config, RowMaker(llama, config.formats), files)
    loader: Any = DataLoader(stream, num_workers=config.workers, collate_fn=lambda batch: batch[0])
    return list(islice(loader, count))


def test_workers_make_streams_of_their_own_and_the_same_ones_again(
    llama: Generator, config: TrainConfig
) -> None:
    alone = loaded(llama, replace(config, workers=1), 6)
    assert alone == loaded(llama, config, 6)
    together = loaded(llama, replace(config, workers=2), 12)
    assert together == loaded(llama, replace(config, workers=2), 12)
    assert together[::2] != together[1::2]


def test_a_schedule_by_the_clock_ends_with_the_minutes(
    make_generator: Callable[..., Generator], config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="schedule must be another one without max_minutes"):
        replace(config, schedule="cosine_over_minutes")
    config = replace(config, schedule="cosine_over_minutes", max_minutes=0.01, steps=10_000)
    events: list[dict[str, Any]] = []
    folder = train(
        config, tmp_path / "run", generator=make_generator("llama"), on_event=events.append
    )
    assert (folder / "compressor.safetensors").is_file()
    assert "interrupted" in [event["event"] for event in events]


def test_checkpoints_are_written_between_validations(
    make_generator: Callable[..., Generator], config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, save_minutes=1e-9, keep_checkpoints=10)
    train(config, tmp_path / "run", generator=make_generator("llama"))
    saved = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert saved == {f"checkpoint-{step}" for step in range(1, 7)}
