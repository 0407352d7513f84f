"""A run leaves a compressor that answers, and resumes to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from support.training import weights_of

from sac_rag.compressors import checkpoint
from sac_rag.lm.generator import Generator
from sac_rag.training.ablation import Outcome, compare, to_markdown
from sac_rag.training.config import TrainConfig
from sac_rag.training.trainer import new_compressor, open_run_folder, train


@pytest.mark.slow
def test_a_run_leaves_a_compressor_that_answers_and_an_account(
    own: Generator, config: TrainConfig, tmp_path: Path
) -> None:
    frozen = {name.replace(".base_layer", ""): w for name, w in weights_of(own).items()}
    events: list[dict[str, Any]] = []
    folder = train(config, tmp_path / "run", generator=own, on_event=events.append)
    for name, weight in weights_of(own).items():
        assert torch.equal(weight, frozen[name.replace(".base_layer", "")]), name
    loaded = checkpoint.load(folder, own)
    assert checkpoint.load_prompt_format(folder) == config.prompt_format
    assert loaded.config.sink == config.prompt_format.opening(own.tokenizer)
    assert loaded.compress([PROSE[0]])[0].dtype == torch.bfloat16
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["step"] for entry in history["steps"]] == [1, 2, 3, 4, 5, 6]
    assert [(v["step"], v["ratio"]) for v in history["validations"]] == [
        (3, 2), (3, 5), (6, 2), (6, 5),
    ]  # fmt: skip
    for validation in history["validations"]:
        assert 0 <= validation["f1"] <= 1
        content = validation["accuracy"] - validation["wrong_accuracy"]
        assert validation["content"] == pytest.approx(content)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {event["event"] for event in events} == {"scorer", "start", "step", "validation"}


@pytest.mark.slow
def test_a_run_begins_with_a_compressor_of_a_simpler_scorer_if_it_fits_its_own(
    make_generator: Callable[..., Generator], config: TrainConfig, tmp_path: Path
) -> None:
    linear = replace(config, steps=1, compressor=replace(config.compressor, scorer_width=0))
    first = train(linear, tmp_path / "first", generator=make_generator("llama"))
    on = replace(config, steps=1, init_from=str(first))
    folders = []
    for number in range(2):
        generator = make_generator("llama")
        torch.manual_seed(number)  # what the process drew before is nothing to a run
        folders.append(train(on, tmp_path / f"on-{number}", generator=generator))
    one, other = (checkpoint.read(folder)[1] for folder in folders)
    assert one["scorer.out.weight"].any()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="do not fit this model and config"):
        train(replace(on, scorer_texts=0), tmp_path / "as-is", generator=make_generator("llama"))


def test_a_run_of_a_higher_rank_begins_where_a_compressor_of_a_lower_one_ended(
    own: Generator, config: TrainConfig, tmp_path: Path
) -> None:
    first = make_compressor(own, "learned", lora_rank=4, lora_alpha=8)
    checkpoint.save(first, tmp_path)
    wider = replace(first.config, lora_rank=6, lora_alpha=24)
    start = replace(config, init_from=str(tmp_path), scorer_texts=0, compressor=wider)
    extended = new_compressor(start, own)
    expected, got = (compressor.compress(PROSE[:1])[0] for compressor in (first, extended))
    torch.testing.assert_close(got.values, expected.values)
    assert torch.equal(got.heads, expected.heads)
    trained = [extended.weights[name] for name in extended.weights if "lora_A" in name]
    assert all(weight.shape[0] == 6 and weight[4:].any() for weight in trained)
    narrower = replace(first.config, lora_rank=2, lora_alpha=4)
    with pytest.raises(ValueError, match="do not fit this model and config"):
        new_compressor(replace(start, compressor=narrower), own)


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits_as_an_uninterrupted_one(
    make_generator: Callable[..., Generator], config: TrainConfig, tmp_path: Path
) -> None:
    whole = train(config, tmp_path / "whole", generator=make_generator("llama"))

    def stop_at_four(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    parts = tmp_path / "parts"
    train(config, parts, generator=make_generator("llama"), on_event=stop_at_four)
    steps = json.loads((parts / "history.json").read_text())["steps"]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    events: list[dict[str, Any]] = []
    resumed = train(config, parts, generator=make_generator("llama"), on_event=events.append)
    assert events[0] == {"event": "start", "step": 4, "steps": 6}
    of_whole, of_parts = checkpoint.read(whole)[1], checkpoint.read(resumed)[1]
    assert of_whole.keys() == of_parts.keys()
    assert all(torch.equal(of_whole[name], of_parts[name]) for name in of_whole)
    losses = [
        [entry["loss"] for entry in json.loads((run / "history.json").read_text())["steps"]]
        for run in (tmp_path / "whole", parts)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_of_other_settings_is_not_continued(
    own: Generator, config: TrainConfig, tmp_path: Path
) -> None:

    limited = replace(config, max_minutes=1e-6)
    train(limited, tmp_path / "run", generator=own)
    steps = json.loads((tmp_path / "run" / "history.json").read_text())["steps"]
    assert len(steps) == 1, "a limit of time ends a run after the step at hand"
    with pytest.raises(ValueError, match=r"run with other settings \(learning_rate\)"):
        train(replace(config, learning_rate=1.0), tmp_path / "run", generator=own)


@pytest.mark.slow
def test_the_command_line_trains_saves_on_ctrl_c_and_resumes(
    questions: Path, config: TrainConfig, tmp_path: Path
) -> None:
    model = make_model("qwen3")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    settings = tmp_path / "run.json"
    settings.write_text(json.dumps({**config.to_dict(), "steps": 10**6, "eval_every": 2}))
    command = [
        *(sys.executable, "-m", "sac_rag.cli", "train", "--config", str(settings)),
        *("--out", str(tmp_path / "run"), "--data", str(questions), "--json"),
        *(f"model={tmp_path / 'model'}", "dtype=float32"),
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(300, running.kill)
    watchdog.start()
    try:
        while not (tmp_path / "run" / "checkpoints" / "checkpoint-2").exists():
            assert running.poll() is None, running.communicate()
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        printed, errors = running.communicate()
    finally:
        watchdog.cancel()
    assert running.returncode == 0, errors
    assert json.loads(printed)["compressor"].endswith("compressor")
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    reached = history["steps"][-1]["step"]
    assert 2 <= reached < 10**6
    done = subprocess.run(
        [*command, "max_minutes=0.00001"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["steps"][-1]["step"] == reached + 1


@pytest.mark.slow
def test_choices_have_equal_time_so_an_interrupted_one_starts_again(
    config: TrainConfig, tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    base = replace(
        config,
        model=str(tmp_path / "model"),
        dtype="float32",
        ratios=(5,),
        steps=3,
        eval_answers=0,
        max_minutes=60.0,
    )
    out, names = tmp_path / "choices", ("anchors: uniform", "no cue")

    def stop_in_the_second(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2 and (out / "001").exists():
            os.kill(os.getpid(), signal.SIGINT)

    outcomes = compare(base, out, names=names, seeds=(0,), on_event=stop_in_the_second)
    first = next(outcomes)
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)
    events: list[dict[str, Any]] = []
    again = list(compare(base, out, names=names, seeds=(0,), on_event=events.append))
    assert again[0] == first
    assert [e["step"] for e in events if e["event"] in ("start", "step")] == [0, 1, 2, 3]
    assert [(o.choice, o.seed, o.steps) for o in again] == [(name, 0, 3) for name in names]
    assert list(compare(base, out, names=names, seeds=(0,))) == again


def test_choices_that_cannot_be_compared_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_minutes must be the time of each choice, was: 0"):
        next(compare(config, tmp_path))
    timed = replace(config, max_minutes=1.0)
    with pytest.raises(ValueError, match=r"choices must be among as shipped, .*\['mask: none'\]"):
        next(compare(timed, tmp_path, names=["mask: none"]))
    open_run_folder(tmp_path, timed)
    with pytest.raises(ValueError, match=r"other settings \(max_minutes\)"):
        next(compare(replace(timed, max_minutes=2.0), tmp_path))


def test_the_table_of_choices_has_the_best_first_and_seeds_side_by_side() -> None:
    shared = {"tokens": 1200, "ratio": 5, "accuracy": 0.5, "first_accuracy": 0.2, "content": 0.25}
    outcomes = [
        Outcome(choice=name, seed=seed, steps=9 + seed, loss=loss, **shared)
        for seed, losses in enumerate(((2.0, 1.0), (1.0, 1.5)))
        for name, loss in zip(("worse", "better"), losses, strict=True)
    ]
    assert to_markdown(outcomes).splitlines()[2:] == [
        "| better | 9, 10 | 1200, 1200 | 1.000, 1.500 | 0.500, 0.500 | 0.250, 0.250 |",
        "| worse | 9, 10 | 1200, 1200 | 2.000, 1.000 | 0.500, 0.500 | 0.250, 0.250 |",
    ]
