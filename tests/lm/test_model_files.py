"""Models are loaded whole, from files that cannot change them afterwards, or refused at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig
from support.hub import fake_hub
from support.models import PROSE, make_model, make_tokenizer

from sac_rag.cached import CachedCompressor
from sac_rag.compressors.full import Full
from sac_rag.errors import UnsupportedModelError
from sac_rag.lm.digests import weights_digest
from sac_rag.lm.generator import Generator

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 272\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("saved")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(folder: Path) -> Generator:
    return Generator.from_pretrained(folder, device="cpu", dtype="float32")


def overwrite(path: Path) -> None:
    make_model("llama", seed=1).save_pretrained(path.parent / "other")
    with path.open("r+b") as file:
        file.write((path.parent / "other" / path.name).read_bytes())


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


@pytest.mark.parametrize("change", [overwrite, cut])
def test_what_becomes_of_the_file_does_not_change_a_loaded_model(
    folder: Path, change: Callable[[Path], None]
) -> None:
    """Else KV of other weights would be stored under the key of the ones that were hashed."""
    generator = load(folder)
    compressor = Full(generator, Full.default_config(stored_dtype="float32"))
    cached = CachedCompressor(compressor, {})
    expected = compressor.compress(PROSE[:1])[0]
    change(folder / "model.safetensors")
    assert weights_digest(generator.model) == generator.identity["weights"]
    (kv,) = cached.compress(PROSE[:1])
    assert kv.bit_equal(expected)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("model.safetensors", POINTER, "model.safetensors is a git-lfs pointer .* git lfs pull"),
        ("tokenizer.json", POINTER, "tokenizer.json is a git-lfs pointer"),
        ("config.json", POINTER, "config.json is a git-lfs pointer"),
        ("model.safetensors", b"", "must have 8 bytes, has 0; copy it again"),
        ("model.safetensors", b"garbage garbage!", "must have .* bytes, has 16"),
        ("model.safetensors", b"\x02" + bytes(7) + b"[]", "is no safetensors file"),
        ("config.json", b"{", "is not a causal LM that transformers can load"),
        ("tokenizer.json", b"{", "must have a tokenizer, none could be loaded"),
        ("model.safetensors", None, "weights .* could not be read"),
        ("tokenizer.json", None, "must have a tokenizer, none could be loaded"),
        ("config.json", None, "is not a causal LM that transformers can load"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_file_and_the_remedy(
    folder: Path, name: str, content: bytes | None, problem: str
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        load(folder)


@pytest.mark.parametrize("missing", [1, 5000])
def test_weights_that_are_cut_short_are_refused_with_both_sizes(folder: Path, missing: int) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(ValueError, match=f"must have {size} bytes, has {size - missing};"):
        load(folder)


@pytest.mark.parametrize("only", [False, True])
def test_a_folder_with_an_adapter_is_refused_with_the_remedy(folder: Path, only: bool) -> None:
    LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(folder)
    if only:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"has adapter_config.json; merge the adapter"):
        load(folder)


def test_a_mistyped_folder_is_asked_for_once_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = "no folder 'models/my-llama', and the repository cannot be found"
    with pytest.raises(ValueError, match=problem):
        Generator.from_pretrained("models/my-llama")  # offline
    with fake_hub(monkeypatch) as hub, pytest.raises(ValueError, match=problem):
        Generator.from_pretrained("models/my-llama")
    assert not hub.downloads
