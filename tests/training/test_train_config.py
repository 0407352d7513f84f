"""A run's settings are checked at birth, and read from JSON, files and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sac_rag.training.config import TrainConfig


def test_a_config_survives_json_and_names_what_it_does_not_know(config: TrainConfig) -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(
        ValueError, match=r"unknown settings .*: zoom, compressor\.lora, prompt_format\.x"
    ):
        TrainConfig.from_dict({"zoom": 1, "compressor": {"lora": 2}, "prompt_format": {"x": ""}})
    with pytest.raises(ValueError, match="compressor must be a table of settings, was: 5"):
        TrainConfig.from_dict({"compressor": 5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": []}, "ratios must be at least one ratio"),
        ({"ratios": [0]}, "ratios must be integers from 1"),
        ({"ratios": "5"}, "ratios must be a list, was one str"),
        ({"chunks": [0]}, "chunks must be integers from 1"),
        ({"data": []}, "data must be question files"),
        ({"text_share": 0.5}, "text must be files of prose"),
        ({"text_share": 2}, "text_share must be from 0 to 1, was: 2"),
        ({"text_first": 3}, "text must be files of prose, or text_first 0"),
        ({"text_first": -1, "text": ["a"]}, "text_first must be at least 0, was: -1"),
        ({"steps": 0}, "steps must be at least 1, was: 0"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"schedule": "step"}, "schedule must be one of cosine, .*was: 'step'"),
        ({"match": "all"}, "match must be one of none, hidden, logits, self, was: 'all'"),
        ({"data_shares": [1, 2]}, "data_shares must be one number for each file of data"),
        ({"instruction_share": 0.5}, "instructions must be files of instructions"),
        ({"held_out_share": 2}, "held_out_share must be from 0 to 1, was: 2"),
        ({"compressor": {"ratio": 0}}, "ratio must be an integer of at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict({"data": ["x.json"], **changes})


def test_settings_of_a_file_are_overridden_one_by_one(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "run.toml", tmp_path / "run.json"
    toml.write_text('data = ["a.json"]\nsteps = 5\n[compressor]\nlora_rank = 8\n')
    as_json.write_text('{"data": ["a.json"], "steps": 5, "compressor": {"lora_rank": 8}}')
    assert TrainConfig.read(toml) == TrainConfig.read(as_json)
    overrides = ["steps=7", "compressor.attention=full", "ratios=[2,3]", "data=b.json", "chunks=4"]
    config = TrainConfig.complete(TrainConfig.read(toml), overrides)
    assert (config.steps, config.ratios, config.data, config.chunks) == (
        7,
        (2, 3),
        ("b.json",),
        (4,),
    )
    assert (config.compressor.lora_rank, config.compressor.attention) == (8, "full")
    with pytest.raises(ValueError, match="name=value, was: 'steps'"):
        TrainConfig.complete({}, ["steps"])
    with pytest.raises(ValueError, match="unknown settings of a training run: stepz"):
        TrainConfig.complete({}, ["stepz=1"])
    (tmp_path / "bad.toml").write_text("steps =")
    with pytest.raises(ValueError, match=r"bad\.toml cannot be parsed"):
        TrainConfig.read(tmp_path / "bad.toml")
    with pytest.raises(ValueError, match=r"must be a \.toml or \.json file"):
        TrainConfig.read(tmp_path / "run.yaml")
