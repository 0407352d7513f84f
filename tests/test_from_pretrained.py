"""A pipeline is loaded by names and folders, and answers like the one in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor, make_model, make_tokenizer

from sac_rag import SacRAG
from sac_rag import default_models as models
from sac_rag.cached import CachedCompressor
from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.errors import ChunkMissError
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import SPANS, PromptFormat
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import DiskStore, MemoryStore

QUESTION = "Who counted the ships?"
SHORT = Decoding(max_new_tokens=8)
BARE = PromptFormat(system="", chunk="{chunk}", user="{chunks}\n\nQ: {question}")
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32", "decoding": SHORT}


@pytest.fixture(autouse=True)
def _home(home: Path) -> None:
    """No record of another run is believed."""


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    return make_compressor(llama, "sac")


@pytest.fixture(scope="module")
def full(llama: Generator) -> Compressor:
    return make_compressor(llama, "full")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the tiny model."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make_rag(sac: Compressor) -> Callable[..., SacRAG]:
    """Makes a pipeline with short answers over a store of its own."""

    def make(compressor: Compressor = sac, store: Any = None, **options: Any) -> SacRAG:
        cached = CachedCompressor(compressor, {} if store is None else store)
        return SacRAG(cached, **{"decoding": SHORT, **options})

    return make


@pytest.fixture
def rag(make_rag: Callable[..., SacRAG]) -> SacRAG:
    return make_rag()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sac: Compressor) -> Path:
    folder = tmp_path_factory.mktemp("compressor")
    checkpoint.save(sac, folder)
    return folder


def test_a_saved_model_answers_like_the_one_in_memory(
    saved: Path, make_rag: Callable[..., SacRAG], full: Compressor
) -> None:
    rag = SacRAG.from_pretrained(saved, **CPU)
    assert rag.answer(QUESTION, PROSE).text == make_rag(full).answer(QUESTION, PROSE).text
    assert isinstance(rag.compressor.store, MemoryStore)
    assert rag.compressor.fingerprint == full.fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_chunks_are_kept_in_the_dtype_they_are_computed_in(saved: Path, dtype: str) -> None:
    rag = SacRAG.from_pretrained(saved, device="cpu", dtype=dtype, decoding=SHORT)
    rag.precompress([PROSE[0]])
    (kv,) = rag.compressor.store.values()
    assert kv.dtype == getattr(torch, dtype) == rag.generator.dtype


def test_a_trained_compressor_answers_like_the_one_in_memory(
    saved: Path, trained: Path, rag: SacRAG
) -> None:
    loaded = SacRAG.from_pretrained(saved, compressor=trained, **CPU)
    assert loaded.answer(QUESTION, PROSE).text == rag.answer(QUESTION, PROSE).text


def test_a_ratio_is_taken_instead_of_the_compressors_own(saved: Path, trained: Path) -> None:
    rag = SacRAG.from_pretrained(saved, compressor=trained, ratio=7, **CPU)
    assert rag.compressor.config.ratio == 7
    (report,) = rag.answer(QUESTION, [PROSE[0]]).chunks
    assert report.num_anchors == (report.num_tokens - 1 - 3) // 7 + 1


def test_an_impossible_ratio_is_refused(saved: Path, trained: Path) -> None:
    with pytest.raises(ValueError, match="ratio must be an integer of at least 1, was: 0"):
        SacRAG.from_pretrained(saved, compressor=trained, ratio=0, **CPU)


def test_one_checkpoint_serves_any_ratio(saved: Path, trained: Path) -> None:
    store: dict[str, AnchorKV] = {}
    anchor_counts = []
    for ratio in (1, 2, 40):
        rag = SacRAG.from_pretrained(saved, compressor=trained, ratio=ratio, store=store, **CPU)
        (report,) = rag.answer(QUESTION, [PROSE[0]]).chunks
        assert report.status == "absent"
        anchor_counts.append(report.num_anchors)
    assert anchor_counts == sorted(anchor_counts, reverse=True)
    assert anchor_counts[0] > anchor_counts[-1] == 1


def test_full_keeps_every_token_and_takes_no_other_ratio(saved: Path) -> None:
    assert SacRAG.from_pretrained(saved, ratio=1, **CPU).compressor.config.ratio == 1
    with pytest.raises(ValueError, match=r"'full' keeps every token .*asked for ratio 5; .*folder"):
        SacRAG.from_pretrained(saved, ratio=5, **CPU)


def test_a_folder_without_a_compressor_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold config\.json and compressor\.s"):
        SacRAG.from_pretrained(saved, compressor=tmp_path, **CPU)


@pytest.mark.parametrize("compressor", ["", "fulll", "no/such/folder", Path("nowhere")])
def test_what_is_no_compressor_is_refused_before_the_model_is_loaded(
    tmp_path: Path, compressor: Any
) -> None:
    with pytest.raises(ValueError, match=r"must be 'full', 'shipped' or .*folder of .*, was: "):
        SacRAG.from_pretrained(tmp_path / "no model either", compressor=compressor)


def test_a_compressors_own_format_is_used_unless_another_is_given(
    saved: Path, tmp_path: Path, sac: Compressor
) -> None:
    checkpoint.save(sac, tmp_path, prompt_format=SPANS)
    assert SacRAG.from_pretrained(saved, compressor=tmp_path, **CPU).prompt_format == SPANS
    other = SacRAG.from_pretrained(saved, compressor=tmp_path, prompt_format=BARE, **CPU)
    assert other.prompt_format == BARE


def test_a_compressor_without_a_format_gets_the_default_one(saved: Path, trained: Path) -> None:
    assert SacRAG.from_pretrained(saved, compressor=trained, **CPU).prompt_format == PromptFormat()


def test_whole_chunks_are_encoded_behind_the_opening_of_the_format(saved: Path) -> None:
    rag = SacRAG.from_pretrained(saved, prompt_format=SPANS, **CPU)
    sink = rag.compressor.config.sink
    assert sink == "Answer each question with a few words from the text.\n\nText:\n"
    assert rag.answer(QUESTION, PROSE).chunks[0].read_as == "anchors"


# --- a folder of a compressor


def test_a_format_comes_back_as_it_was_saved(tmp_path: Path, sac: Compressor) -> None:
    checkpoint.save(sac, tmp_path, prompt_format=SPANS)
    assert checkpoint.load_prompt_format(tmp_path) == SPANS
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "compressor.safetensors",
        "config.json",
        "format.json",
    ]


def test_saving_without_a_format_leaves_none_of_another_compressor(
    tmp_path: Path, sac: Compressor
) -> None:
    checkpoint.save(sac, tmp_path, prompt_format=SPANS)
    checkpoint.save(sac, tmp_path)
    assert checkpoint.load_prompt_format(tmp_path) is None
    assert not (tmp_path / "format.json").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"colour": "red"}', b"\xff", b'{"chunk": 1}']
)
def test_a_format_that_cannot_be_read_is_refused_by_file(
    saved: Path, tmp_path: Path, sac: Compressor, content: bytes
) -> None:
    checkpoint.save(sac, tmp_path)
    (tmp_path / "format.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"format\.json cannot be read as a prompt format: "):
        SacRAG.from_pretrained(saved, compressor=tmp_path, **CPU)


# --- compressors that come with the package


@pytest.fixture
def pulled(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a default model whose pulled folder holds a tiny one."""
    name = "smollm2-135m"
    folder = models.home() / f"{name}-{models.SOURCES[name].version}"
    shutil.copytree(saved, folder)
    files = {p.name: {"sha256": "", "bytes": p.stat().st_size} for p in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    assert models.pull(name) == folder
    return name


@pytest.fixture
def shipped(pulled: str, sac: Compressor) -> str:
    """The same, with a compressor that comes with the package."""
    checkpoint.save(sac, checkpoint.WEIGHTS / pulled, prompt_format=SPANS)
    return pulled


def test_the_compressor_that_comes_with_the_package_is_the_default(
    shipped: str, sac: Compressor, make_rag: Callable[..., SacRAG]
) -> None:
    rag = SacRAG.from_pretrained(shipped, **CPU)
    assert rag.compressor.fingerprint == sac.fingerprint
    assert rag.prompt_format == SPANS
    expected = make_rag(sac, prompt_format=SPANS).answer(QUESTION, PROSE).text
    assert rag.answer(QUESTION, PROSE).text == expected
    assert SacRAG.from_pretrained(**CPU).compressor.fingerprint == sac.fingerprint
    named = SacRAG.from_pretrained(shipped, compressor="shipped", ratio=2, **CPU)
    assert named.compressor.config.ratio == 2


def test_another_compressor_may_be_asked_for_where_one_is_shipped(
    shipped: str, trained: Path, sac: Compressor
) -> None:
    assert SacRAG.from_pretrained(shipped, compressor="full", **CPU).compressor.fingerprint != (
        sac.fingerprint
    )
    rag = SacRAG.from_pretrained(shipped, compressor=str(trained), **CPU)
    assert rag.prompt_format == PromptFormat()


def test_where_none_is_shipped_every_token_is_kept(pulled: str) -> None:
    rag = SacRAG.from_pretrained(pulled, **CPU)
    assert rag.compressor.method == "full"
    assert rag.prompt_format == PromptFormat()
    with pytest.raises(ValueError, match=r"comes with sac_rag for 'smollm2-135m', only for: none"):
        SacRAG.from_pretrained(pulled, compressor="shipped", **CPU)


def test_a_model_of_the_users_own_gets_no_shipped_compressor(shipped: str, saved: Path) -> None:
    """It may be called like a default model and hold other weights."""
    assert SacRAG.from_pretrained(saved, **CPU).compressor.method == "full"
    with pytest.raises(ValueError, match="only for: smollm2-135m; give 'full'"):
        SacRAG.from_pretrained(saved, compressor="shipped", **CPU)


def test_a_store_and_a_namespace_are_passed_on(saved: Path, disk: DiskStore) -> None:
    one = SacRAG.from_pretrained(saved, store=disk, namespace="one", **CPU)
    one.precompress([PROSE[0]])
    two = SacRAG.from_pretrained(saved, store=disk, namespace="two", on_miss="raise", **CPU)
    assert one.compressor.store is two.compressor.store is disk
    with pytest.raises(ChunkMissError):
        two.answer(QUESTION, [PROSE[0]])


def test_an_empty_store_of_the_callers_own_is_used(saved: Path) -> None:
    store: dict[str, AnchorKV] = {}
    rag = SacRAG.from_pretrained(saved, store=store, **CPU)
    rag.precompress([PROSE[0]])
    assert len(store) == 1


def test_a_model_whose_template_refuses_system_messages_can_be_used(tmp_path: Path) -> None:
    """Gemma's does. A prompt format without system prompt is all it should take."""
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    make_model("llama").save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = refuse + str(tokenizer.chat_template)
    tokenizer.save_pretrained(tmp_path)
    rag = SacRAG.from_pretrained(tmp_path, prompt_format=BARE, **CPU)
    assert rag.answer(QUESTION, PROSE).text
