"""The methods of the paper are trained alike, measured alike, and resumed where they were left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PROSE, make_model, make_tokenizer

from sac_rag.compressors.anchor_selection import num_anchors, random_anchors
from sac_rag.training.config import TrainConfig
from sac_rag.training.methods import (
    METHODS,
    MethodOutcome,
    MethodSpeed,
    compare_methods,
    time_methods,
    to_markdown,
)


@pytest.fixture
def base(config: TrainConfig, tmp_path: Path, home: Path) -> TrainConfig:
    model = tmp_path / "model"
    make_model("llama").save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{one} {other}" for one in PROSE for other in PROSE))
    changes: dict[str, Any] = {
        "model": str(model),
        "text": (str(text),),
        "text_tokens": 32,
        "ratios": (3,),
        "eval_ratios": (3,),
        "steps": 2,
        "eval_every": 2,
    }
    return replace(config, **changes)


@pytest.mark.slow
def test_methods_are_trained_alike_and_resumed(base: TrainConfig, tmp_path: Path) -> None:
    names, out = ["SAC", "ICAE with EPL", "SAC, as shipped"], tmp_path / "out"

    def stop_at_the_second(event: dict[str, Any]) -> None:
        if event["event"] == "start" and (out / "results.json").exists():
            raise KeyboardInterrupt

    runs = compare_methods(
        base, base.text, out, prose_steps=1, names=names, seeds=(0,), on_event=stop_at_the_second
    )
    first = next(runs)
    with pytest.raises(KeyboardInterrupt):
        next(runs)
    outcomes = list(compare_methods(base, base.text, out, prose_steps=1, names=names, seeds=(0,)))
    assert outcomes[0] == first
    assert [(one.method, one.seed, one.ratio) for one in outcomes] == [(n, 0, 3) for n in names]
    assert all(one.perplexity > 1 for one in outcomes)
    assert len({one.perplexity for one in outcomes}) == 3
    stages = [
        json.loads((out / "000" / stage / "history.json").read_text())["steps"]
        for stage in ("prose", "questions")
    ]
    assert list(map(len, stages)) == [1, 2]
    assert outcomes[0].tokens == sum(step["tokens"] for steps in stages for step in steps)


@pytest.mark.slow
def test_methods_are_timed_in_turn(base: TrainConfig) -> None:
    names = ["SAC", "500xCompressor", "ICAE"]
    sac, x500, icae = time_methods(base, names=names, batches=1, repeats=1)
    assert sac.relative == 1
    assert min(sac.step_s, x500.step_s, icae.step_s, icae.compress_s) > 0
    assert sac.slots == 1
    assert 1.3 < x500.slots == icae.slots < 1.5, "a slot for each three tokens"


def test_what_cannot_be_compared_is_refused(base: TrainConfig, tmp_path: Path) -> None:
    def compare(config: TrainConfig, **options: Any) -> None:
        next(compare_methods(config, base.text, tmp_path / "out", prose_steps=1, **options))

    with pytest.raises(ValueError, match=r"methods must be among SAC, .*unknown: \['SOC'\]"):
        compare(base, names=["SOC"])
    with pytest.raises(ValueError, match="at one ratio"):
        compare(replace(base, ratios=(3, 5)))
    with pytest.raises(ValueError, match="text must be files"):
        compare(replace(base, text=()))


def test_the_table_has_the_best_first() -> None:
    scores = {"ratio": 5, "tokens": 9, "loss": 1.0, "accuracy": 0.5, "content": 0.2}
    outcomes = [
        MethodOutcome(method, seed, perplexity=12.0, f1=f1, **scores)
        for method, f1 in (("ICAE", 0.2), ("SAC", 0.4))
        for seed in (0, 1)
    ]
    speeds = [MethodSpeed("SAC", 1.0, 1.0, 0.05, 1.0), MethodSpeed("ICAE", 1.4, 1.4, 0.07, 1.2)]
    assert to_markdown(outcomes, speeds).splitlines()[2:] == [
        "| SAC | 12.0, 12.0 | 0.400, 0.400 | 0.500, 0.500 | 0.200, 0.200 | 1.00 | 50 |",
        "| ICAE | 12.0, 12.0 | 0.200, 0.200 | 0.500, 0.500 | 0.200, 0.200 | 1.40 | 70 |",
    ]


def test_random_anchors_are_equal_for_equal_texts() -> None:
    tokens = torch.arange(40)
    anchors = random_anchors(tokens, 3)
    assert torch.equal(anchors, random_anchors(tokens.clone(), 3))
    assert not torch.equal(anchors, random_anchors(tokens + 1, 3))
    assert len(anchors) == num_anchors(40, 3)
    assert anchors.tolist() == sorted(set(anchors.tolist()))
    assert set(METHODS) >= {"SAC", "ICAE", "500xCompressor"}
