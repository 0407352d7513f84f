"""Compressors are saved, loaded and shared with the verbs of the Hugging Face libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
from safetensors.torch import load
from support.hub import FakeHub, fake_hub

from sac_rag import SAC, SPANS, Compressor, CompressorConfig, Full, Generator, SacRAG
from sac_rag.compressors import checkpoint

REPO = "somebody/compressor"
CONFIG = CompressorConfig(lora_rank=2, lora_alpha=4, stored_dtype="float32")


@pytest.fixture(scope="module")
def sac(llama: Generator) -> SAC:
    compressor = SAC(llama, CONFIG)
    with torch.no_grad():
        for weight in compressor.weights.values():
            weight.add_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
    return compressor


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as hub:
        yield hub


def test_a_saved_compressor_is_loaded_with_equal_kv_and_its_prompt_format(
    sac: SAC, llama: Generator, tmp_path: Path
) -> None:
    sac.save_pretrained(tmp_path, prompt_format=SPANS)
    loaded = Compressor.from_pretrained(tmp_path, llama)
    assert type(loaded) is SAC
    assert loaded.fingerprint == sac.fingerprint
    assert loaded.prompt_format == SPANS


def test_a_loaded_compressor_is_saved_with_the_prompt_format_it_came_with(
    sac: SAC, llama: Generator, tmp_path: Path
) -> None:
    sac.save_pretrained(tmp_path / "one", prompt_format=SPANS)
    Compressor.from_pretrained(tmp_path / "one", llama).save_pretrained(tmp_path / "two")
    assert checkpoint.load_prompt_format(tmp_path / "two") == SPANS


def test_config_fields_can_be_changed_on_loading(
    sac: SAC, llama: Generator, tmp_path: Path
) -> None:
    sac.save_pretrained(tmp_path)
    assert SAC.from_pretrained(tmp_path, llama, ratio=15).config.ratio == 15
    with pytest.raises(TypeError, match="ratios"):
        SAC.from_pretrained(tmp_path, llama, ratios=15)


def test_a_class_refuses_a_compressor_of_another_method(
    sac: SAC, llama: Generator, tmp_path: Path
) -> None:
    sac.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of method 'sac', which is no Full; load it with Compr"):
        Full.from_pretrained(tmp_path, llama)


def test_a_card_is_written_and_one_that_is_there_stays(sac: SAC, tmp_path: Path) -> None:
    sac.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "library_name: sac-rag" in card.read_text()
    card.write_text("my own words")
    sac.save_pretrained(tmp_path)
    assert card.read_text() == "my own words"


def test_a_card_names_a_model_on_the_hub_and_of_a_local_one_no_path(
    sac: SAC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, has_base in (("org/model", True), (str(tmp_path / "model"), False)):
        monkeypatch.setattr(sac.generator.model.config, "_name_or_path", name)
        monkeypatch.setattr(sac.generator.model, "name_or_path", name, raising=False)
        folder = tmp_path / f"card {has_base}"
        sac.save_pretrained(folder)
        card = (folder / "README.md").read_text()
        assert ("base_model: org/model\n" in card) is has_base
        assert str(tmp_path) not in card


def test_what_is_pushed_is_pulled(sac: SAC, llama: Generator, hub: FakeHub, tmp_path: Path) -> None:
    url = sac.push_to_hub(REPO, token="secret", private=True, prompt_format=SPANS)
    assert url.startswith(hub_constants.ENDPOINT)
    assert REPO in hub.private
    assert hub.tokens == {"Bearer secret"}
    loaded = Compressor.from_pretrained(REPO, llama, cache_dir=tmp_path, token="other")
    assert loaded.fingerprint == sac.fingerprint
    assert loaded.prompt_format == SPANS
    assert hub.tokens == {"Bearer secret", "Bearer other"}


def test_weights_on_the_hub_are_safetensors_in_the_dtype_asked_for(sac: SAC, hub: FakeHub) -> None:
    sac.push_to_hub(REPO, dtype=torch.float16)
    files = hub.branches[REPO]["main"]
    assert set(files) == {"config.json", "compressor.safetensors", "README.md"}
    assert {w.dtype for w in load(files["compressor.safetensors"]).values()} == {torch.float16}


def test_only_a_compressors_files_are_downloaded(
    sac: SAC, llama: Generator, hub: FakeHub, tmp_path: Path
) -> None:
    sac.push_to_hub(REPO)
    hub.branches[REPO]["main"]["adapter.pt"] = b"a pickle"
    Compressor.from_pretrained(REPO, llama, cache_dir=tmp_path)
    assert set(hub.downloads) == {"config.json", "compressor.safetensors", "README.md"}


def test_a_revision_is_pushed_to_and_pulled_from(
    sac: SAC, llama: Generator, hub: FakeHub, tmp_path: Path
) -> None:
    sac.push_to_hub(REPO)
    other = SAC(llama, CONFIG)
    other.push_to_hub(REPO, revision="untrained")
    for revision, pushed in ((None, sac), ("main", sac), ("untrained", other)):
        pulled = Compressor.from_pretrained(REPO, llama, revision=revision, cache_dir=tmp_path)
        assert pulled.fingerprint == pushed.fingerprint


def test_pushing_again_keeps_the_card_and_removes_a_prompt_format_that_is_gone(
    sac: SAC, hub: FakeHub
) -> None:
    sac.push_to_hub(REPO, prompt_format=SPANS)
    assert f'compressor="{REPO}"' in hub.branches[REPO]["main"]["README.md"].decode()
    hub.branches[REPO]["main"]["README.md"] = b"my own words"
    sac.push_to_hub(REPO)
    files = hub.branches[REPO]["main"]
    assert files["README.md"] == b"my own words"
    assert "format.json" not in files


def test_offline_an_earlier_download_is_used(
    sac: SAC, llama: Generator, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sac.push_to_hub(REPO)
    Compressor.from_pretrained(REPO, llama, cache_dir=tmp_path)
    downloads = list(hub.downloads)
    Compressor.from_pretrained(REPO, llama, cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    loaded = Compressor.from_pretrained(REPO, llama, cache_dir=tmp_path)
    assert loaded.fingerprint == sac.fingerprint
    assert hub.downloads == downloads


def test_offline_a_repository_that_was_never_downloaded_is_refused(
    llama: Generator, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"no folder '{REPO}', and the repository cannot be down"):
        Compressor.from_pretrained(REPO, llama, cache_dir=tmp_path)


def test_offline_nothing_is_pushed(sac: SAC) -> None:
    with pytest.raises(OSError, match="offline mode is enabled"):
        sac.push_to_hub(REPO)


def test_a_repository_that_does_not_exist_is_refused(
    llama: Generator, hub: FakeHub, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="cannot be downloaded"):
        Compressor.from_pretrained(REPO, llama, cache_dir=tmp_path)


def test_a_folder_takes_precedence_over_a_repository_of_that_name(
    sac: SAC, llama: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sac.save_pretrained(tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    assert Compressor.from_pretrained(REPO, llama).fingerprint == sac.fingerprint


def test_a_pipeline_takes_the_hub_id_of_a_compressor(
    sac: SAC, make_generator: Callable[..., Generator], hub: FakeHub, tmp_path: Path
) -> None:
    sac.push_to_hub(REPO, revision="old")
    sac.push_to_hub(REPO, prompt_format=SPANS)
    generator = make_generator()  # without LoRA
    generator.model.save_pretrained(tmp_path / "model")
    generator.tokenizer.save_pretrained(tmp_path / "model")
    options = {"cache_dir": tmp_path / "hub", "dtype": "float32", "token": "secret"}
    rag = SacRAG.from_pretrained(tmp_path / "model", compressor=REPO, **options)
    assert rag.compressor.fingerprint == sac.fingerprint
    assert rag.prompt_format == SPANS
    assert "Bearer secret" in hub.tokens
    old = SacRAG.from_pretrained(
        tmp_path / "model", compressor=REPO, compressor_revision="old", **options
    )
    assert old.prompt_format != SPANS
