"""A store's entries are exported into an archive and imported elsewhere, also by commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from typer.testing import CliRunner

from sac_rag import SacRAG, archive
from sac_rag.archive import Archive, export
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.cli import app
from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator
from sac_rag.origin import Origin
from sac_rag.prompts.format import SPANS
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import DiskStore
from sac_rag.stores.cipher import Cipher

QUESTION = "Who counted the ships?"
SHORT = Decoding(max_new_tokens=8)


@pytest.fixture(autouse=True)
def _home(home: Path) -> None:
    """No record of another run is believed."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The serving machine's copy of the model."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sac(make_generator: Callable[..., Generator]) -> Compressor:
    return make_compressor(make_generator("llama"), "sac")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sac: Compressor) -> Path:
    folder = tmp_path_factory.mktemp("compressor")
    checkpoint.save(sac, folder, prompt_format=SPANS)
    return folder


def entries(cached: CachedCompressor, texts: tuple[str, ...] = PROSE) -> Iterator[Any]:
    for number, (text, kv) in enumerate(zip(texts, cached.compress(texts), strict=True)):
        yield cached.key(text), kv, (f"document {number}",), cached.text_id(text)


@pytest.fixture
def carried(tmp_path: Path, sac: Compressor) -> Path:
    """An archive of all of PROSE."""
    path = tmp_path / "corpus.sacrag"
    archive.write(path, Origin.of(sac, SPANS), entries(CachedCompressor(sac, {})))
    return path


@pytest.fixture
def filled(tmp_path: Path, saved: Path, trained: Path) -> Path:
    """A store with all of PROSE by the trained compressor, and half of it by another."""
    with DiskStore(tmp_path / "filled") as store:
        for ratio, texts in ((None, PROSE), (9, PROSE[:4])):
            rag = SacRAG.from_pretrained(
                saved, compressor=trained, ratio=ratio, store=store, device="cpu", dtype="float32"
            )
            assert rag.precompress([Chunk(text, id="doc") for text in texts]).hits == 0
    return tmp_path / "filled"


def test_a_pipeline_exports_what_its_own_compressor_stored(
    filled: Path, saved: Path, trained: Path, tmp_path: Path
) -> None:
    with DiskStore(filled, read_only=True) as store:
        rag = SacRAG.from_pretrained(
            saved, compressor=trained, store=store, device="cpu", dtype="float32", decoding=SHORT
        )
        exported = rag.export(tmp_path / "corpus.sacrag")
        assert (exported.written, exported.others, exported.bad) == (8, 4, ())
        expected = rag.answer(QUESTION, PROSE)
    opened = Archive(tmp_path / "corpus.sacrag")
    assert {record.documents for record in opened.records.values()} == {("doc",)}
    served = SacRAG.from_archive(
        tmp_path / "corpus.sacrag", saved, device="cpu", decoding=SHORT, on_miss="raise"
    )
    assert served.prompt_format == rag.prompt_format == SPANS
    assert served.answer(QUESTION, PROSE).text == expected.text


def test_only_a_store_on_disk_is_exported(sac: Compressor, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="only a DiskStore can be exported, was: dict"):
        SacRAG(CachedCompressor(sac, {})).export(tmp_path / "corpus")


def test_a_bad_entry_is_left_out_and_told(filled: Path, sac: Compressor, tmp_path: Path) -> None:
    with DiskStore(filled) as store:
        file = next(filled.glob(f"entries/*/{CachedCompressor(sac, {}).key(PROSE[5])}*"))
        file.write_bytes(file.read_bytes()[:-1])
        exported = export(store, tmp_path / "corpus", Origin.of(sac))
    assert exported.written == 7
    (problem,) = exported.bad
    assert problem.startswith(CachedCompressor(sac, {}).key(PROSE[5]))


def test_an_encrypted_store_is_exported_only_where_that_is_asked_for(
    sac: Compressor, tmp_path: Path
) -> None:
    path = tmp_path / "corpus"
    with DiskStore(tmp_path / "secret", cipher=Cipher(b"k" * 32)) as store:
        rag = SacRAG(CachedCompressor(sac, store))
        rag.precompress([("secret.txt", text) for text in PROSE])
        with pytest.raises(ValueError, match=r"is encrypted, and an archive is not.*decrypt=True"):
            rag.export(path)
        assert not path.exists()
        assert rag.export(path, decrypt=True).written == 8
    with DiskStore(tmp_path / "elsewhere", cipher=Cipher(b"l" * 32)) as store:
        opened = Archive(path)
        assert opened.copy_to(store) == 8
        assert CachedCompressor(sac, store).fetch(PROSE).misses == [None] * 8
        assert store.is_encrypted


def sac_rag(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=code != 0)
    assert result.exit_code == code, result.output
    return (
        result.stdout if isinstance(result.exception, SystemExit | None) else str(result.exception)
    )


def test_the_command_line_carries_a_store_and_python_serves_it(
    filled: Path, trained: Path, saved: Path, sac: Compressor, tmp_path: Path
) -> None:
    path, there = tmp_path / "corpus.sacrag", tmp_path / "there"
    refused = sac_rag("store", "export", filled, path, "--compressor", trained, code=1)
    assert "has chunks of 2 fingerprints" in refused and "--fingerprint" in refused
    with_fingerprint = ("--fingerprint", sac.fingerprint[:12], "--json")
    refused = sac_rag("store", "export", filled, path, *with_fingerprint, code=1)
    assert "with other weights than none" in refused
    options = ("--compressor", trained, *with_fingerprint)
    report = json.loads(sac_rag("store", "export", filled, path, *options))
    assert (report["written"], report["others"], report["bad"]) == (8, 4, [])
    assert report["nbytes"] == path.stat().st_size
    assert json.loads(sac_rag("store", "import", path, there, "--json"))["copied"] == 8
    again = json.loads(sac_rag("store", "import", path, there, "--json"))
    assert again == {"copied": 0, "there": 8, "evicted": 0}
    with DiskStore(there, read_only=True) as store:
        served = SacRAG.from_archive(
            path, saved, store=store, device="cpu", decoding=SHORT, on_miss="raise"
        )
        expected = SacRAG(CachedCompressor(sac, {}), prompt_format=SPANS, decoding=SHORT)
        answer = served.answer(QUESTION, PROSE)
        assert answer.text == expected.answer(QUESTION, PROSE).text


def test_an_import_that_does_not_fit_says_so(carried: Path, tmp_path: Path) -> None:
    small = ("--max-bytes", 20_000, "--json")
    report = json.loads(sac_rag("store", "import", carried, tmp_path / "small", *small, code=1))
    assert report["evicted"] > 0


def test_exporting_an_encrypted_store_needs_its_key_and_the_word(
    sac: Compressor, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("6b" * 32)
    (tmp_path / "key").chmod(0o600)
    with DiskStore(tmp_path / "secret", cipher=Cipher(b"k" * 32)) as store:
        SacRAG(CachedCompressor(sac, store)).precompress(PROSE)
    command = ("store", "export", tmp_path / "secret", tmp_path / "corpus", "--compressor", trained)
    assert "key" in sac_rag(*command, code=1)
    command = (*command, "--key-file", tmp_path / "key")
    assert "is encrypted, and an archive is not" in sac_rag(*command, code=1)
    assert "8 chunks" in sac_rag(*command, "--decrypt")
