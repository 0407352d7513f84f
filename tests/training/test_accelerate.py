"""Two processes under `accelerate launch` learn what one learns from the same global batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_model, make_tokenizer

from sac_rag.compressors import checkpoint
from sac_rag.training.config import TrainConfig
from sac_rag.training.processes import batches_per_process

TIMEOUT = 600
# Gradients are added up in another order.
LOSS_TOLERANCE = 1e-4


@pytest.fixture
def command(questions: Path, config: TrainConfig, tmp_path: Path) -> list[str]:
    """`sac_rag.cli train …` of a tiny model."""
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    settings = tmp_path / "run.json"
    changes = {"model": str(tmp_path / "model"), "dtype": "float32", "eval_answers": 0, "steps": 4}
    settings.write_text(json.dumps({**config.to_dict(), **changes}))
    return ["-m", "sac_rag.cli", "train", "--config", str(settings), "--json"]


def run(command: list[str], out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out), "batches_per_step=2"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # One JSON object: of several processes, one reports.
    assert json.loads(done.stdout)["compressor"] == str(out / "compressor")
    history: dict[str, Any] = json.loads((out / "history.json").read_text())
    return history


@pytest.mark.slow
def test_two_processes_have_the_losses_and_weights_of_one_with_the_same_global_batch(
    command: list[str], tmp_path: Path
) -> None:
    launch = [
        # Without MPI, --cpu would start one process; gloo is chosen where there is no GPU.
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0"),
    ]
    one = run(command, tmp_path / "one")
    two = run([*launch, *command], tmp_path / "two")
    assert len(list((tmp_path / "two" / "checkpoints").glob("checkpoint-4/rng_state_*.pth"))) == 2
    for kind in ("steps", "validations"):
        losses, others = ([entry["loss"] for entry in run[kind]] for run in (one, two))
        assert len(losses) == 4
        assert losses == pytest.approx(others, rel=LOSS_TOLERANCE), kind
    assert [s["tokens"] for s in one["steps"]] == [s["tokens"] for s in two["steps"]]
    weights, others = (checkpoint.read(tmp_path / n / "compressor")[1] for n in ("one", "two"))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-2, atol=1e-3)


def test_batches_that_cannot_be_shared_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [batches_per_process(number) for number in (0, 1, 3)] == [1, 1, 3]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [batches_per_process(number) for number in (0, 2, 6)] == [1, 1, 3]
    with pytest.raises(ValueError, match="a multiple of the 2 processes, was: 3"):
        batches_per_process(3)
