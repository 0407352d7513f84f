"""A compressor that was saved is loaded with the same bits, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator

SINK = "<|im_start|>system\n"


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    """A compressor that no test changes."""
    return make_compressor(llama, "sac")


def difference(one: Compressor, other: Compressor) -> set[str]:
    ours, theirs = one.fingerprint_fields(), other.fingerprint_fields()
    assert (one.fingerprint != other.fingerprint) == (ours != theirs)
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


@pytest.mark.parametrize("changes", [{}, {"cue": False}, {"lora_targets": ()}])
def test_a_loaded_compressor_gives_the_same_bits(
    make_generator: Callable[..., Generator], tmp_path: Path, changes: dict[str, Any]
) -> None:
    saved = make_compressor(make_generator("llama"), "sac", **changes)
    checkpoint.save(saved, tmp_path)
    loaded = checkpoint.load(tmp_path, make_generator("llama"))
    assert loaded.config == saved.config
    assert loaded.fingerprint == saved.fingerprint
    for one, other in zip(loaded.compress(PROSE), saved.compress(PROSE), strict=True):
        assert one.bit_equal(other)


def test_full_is_saved_and_loaded_too(llama: Generator, tmp_path: Path) -> None:
    full = make_compressor(llama, "full")
    checkpoint.save(full, tmp_path)
    assert checkpoint.load(tmp_path, llama).fingerprint == full.fingerprint


def test_saving_leaves_config_weights_and_card_and_nothing_else(
    sac: Compressor, tmp_path: Path
) -> None:
    for _ in range(2):
        checkpoint.save(sac, tmp_path / "new" / "folder")
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"config.json", "compressor.safetensors", "README.md"}


def test_another_ratio_changes_the_ratio_only(
    sac: Compressor, llama: Generator, tmp_path: Path
) -> None:
    checkpoint.save(sac, tmp_path)
    loaded = checkpoint.load(tmp_path, llama, ratio=15)
    assert loaded.config == replace(sac.config, ratio=15)
    assert difference(loaded, sac) == {"config.ratio"}


def test_another_models_compressor_is_refused_with_the_shapes(
    sac: Compressor, tmp_path: Path
) -> None:
    checkpoint.save(sac, tmp_path)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    other = Generator(LlamaForCausalLM(config), make_tokenizer())
    with pytest.raises(
        ValueError, match=r"'anchor_embedding': expected shape \(32,\), got \(48,\); load it with"
    ):
        checkpoint.load(tmp_path, other)


def test_a_compressor_of_more_layers_is_refused(sac: Compressor, tmp_path: Path) -> None:
    checkpoint.save(sac, tmp_path)
    config = LlamaConfig.from_dict({**make_model("llama").config.to_dict(), "num_hidden_layers": 2})
    other = Generator(LlamaForCausalLM(config), make_tokenizer())
    with pytest.raises(ValueError, match=r"4 of .*layers\.2\..*expected shape None, got \(4, 48\)"):
        checkpoint.load(tmp_path, other)


@pytest.mark.parametrize("missing", ["config.json", "compressor.safetensors"])
def test_a_missing_file_is_named(
    sac: Compressor, llama: Generator, tmp_path: Path, missing: str
) -> None:
    checkpoint.save(sac, tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"must hold config.json .*{missing}"):
        checkpoint.load(tmp_path, llama)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b'{"method": "sac", "surprise": 1}'),
        ("compressor.safetensors", b""),
        ("compressor.safetensors", b"\x80\x04not safetensors" * 10),
    ],
)
def test_a_damaged_file_is_refused(
    sac: Compressor, llama: Generator, tmp_path: Path, file: str, content: bytes
) -> None:
    checkpoint.save(sac, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError):
        checkpoint.load(tmp_path, llama)


def test_a_truncated_weights_file_is_refused(
    sac: Compressor, llama: Generator, tmp_path: Path
) -> None:
    checkpoint.save(sac, tmp_path)
    weights = tmp_path / "compressor.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"must hold config\.json and compressor\.s"):
        checkpoint.load(tmp_path, llama)


def test_the_config_beside_the_weights_can_be_read_by_people(
    sac: Compressor, tmp_path: Path
) -> None:
    checkpoint.save(sac, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sink"] == SINK
