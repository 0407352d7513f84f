"""The mean of compressors' weights is a compressor, of compressors of one config only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import make_compressor

from sac_rag.compressors import checkpoint
from sac_rag.lm.generator import Generator
from sac_rag.training.average import average


@pytest.fixture
def saved(llama: Generator, tmp_path: Path) -> list[Path]:
    """Two compressors, the second with weights three times as large, and one of another config."""
    compressor = make_compressor(llama, "shared")
    checkpoint.save(compressor, tmp_path / "one")
    weights = {name: 3 * weight.detach() for name, weight in compressor.weights.items()}
    compressor.load_weights(weights)
    checkpoint.save(compressor, tmp_path / "three")
    checkpoint.save(make_compressor(llama, "shared", lora_rank=2), tmp_path / "other")
    return [tmp_path / name for name in ("one", "three", "other")]


def test_every_weight_is_the_mean(llama: Generator, saved: list[Path]) -> None:
    one = checkpoint.load(saved[0], llama)
    mean = average(saved[:2], llama)
    assert mean.weights.keys() == one.weights.keys()
    for name, weight in mean.weights.items():
        torch.testing.assert_close(weight, 2 * one.weights[name])
    assert mean.config == one.config


def test_what_has_no_mean_is_refused(llama: Generator, saved: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"must have one config, but .*other has lora_rank=2"):
        average(saved, llama)
    with pytest.raises(ValueError, match="at least two compressors have a mean, got 1"):
        average(saved[:1], llama)
    with pytest.raises(TypeError, match="must be several paths, was one"):
        average(str(saved[0]), llama)
