"""Loading takes the arguments of transformers' `from_pretrained`, and hands them on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub import FakeHub, fake_hub
from support.models import make_model, make_tokenizer

from sac_rag import Generator, SacRAG, UnsupportedModelError

REPO = "somebody/model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("saved")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with a model in two revisions, the older one of other weights."""
    make_model("llama", seed=1).save_pretrained(tmp_path / "old")
    make_tokenizer().save_pretrained(tmp_path / "old")
    with fake_hub(monkeypatch) as hub:
        hub.branches[REPO] = {
            branch: {path.name: path.read_bytes() for path in folder.iterdir()}
            for branch, folder in (("main", saved), ("old", tmp_path / "old"))
        }
        yield hub


def test_revision_token_and_cache_folder_reach_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    weights = {}
    for revision in (None, "old"):
        loaded = Generator.from_pretrained(
            REPO, dtype="float32", revision=revision, token="secret", cache_dir=tmp_path / "cache"
        )
        weights[revision] = loaded.identity["weights"]
    assert weights[None] != weights["old"]
    assert hub.tokens == {"Bearer secret"}
    assert (tmp_path / "cache" / "models--somebody--model").is_dir()


def test_a_pipeline_hands_them_on(hub: FakeHub, tmp_path: Path) -> None:
    rag = SacRAG.from_pretrained(
        REPO,
        dtype="float32",
        revision="old",
        token="secret",
        cache_dir=tmp_path / "cache",
        attn_implementation="eager",
        model_kwargs={"use_safetensors": True},
    )
    old = Generator.from_pretrained(tmp_path / "old", dtype="float32")
    assert rag.generator.identity["weights"] == old.identity["weights"]
    assert "eager" in rag.generator.model.config._attn_implementation
    assert hub.tokens == {"Bearer secret"}


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_attention_implementation_is_the_one_asked_for(saved: Path, name: str) -> None:
    loaded = Generator.from_pretrained(saved, attn_implementation=name)
    assert name in loaded.model.config._attn_implementation


def test_one_device_can_be_given_as_a_device_map(saved: Path) -> None:
    loaded = Generator.from_pretrained(saved, device_map="cpu", dtype="float32")
    plain = Generator.from_pretrained(saved, device="cpu", dtype="float32")
    assert loaded.device == torch.device("cpu")
    assert loaded.identity == plain.identity
    with pytest.raises(ValueError, match=r"give device .cpu. or device_map, not both"):
        Generator.from_pretrained(saved, device="cpu", device_map="cpu")


def test_weights_on_several_devices_are_refused(saved: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="must be on one device, were on: cpu, meta"):
        Generator.from_pretrained(
            saved,
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=saved.parent / "offload",
        )


@pytest.mark.parametrize(
    ("load", "arguments"),
    [
        (Generator.from_pretrained, {"no_such_argument": 1}),
        (SacRAG.from_pretrained, {"model_kwargs": {"no_such_argument": 1}}),
        (SacRAG.from_pretrained, {"no_such_argument": 1}),
    ],
)
def test_an_argument_that_nobody_knows_is_a_type_error(
    saved: Path, load: Any, arguments: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        load(saved, **arguments)


def test_code_from_a_models_repository_is_never_run(saved: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code must be False, was: True"):
        Generator.from_pretrained(saved, trust_remote_code=True)
    assert Generator.from_pretrained(saved, trust_remote_code=False).kv_shape
