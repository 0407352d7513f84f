"""A precompressed corpus is carried in one file to where no compressor is, and answers the same."""

from __future__ import annotations

import json
import os
import pickle
import random
import stat
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor, make_model, make_tokenizer, passes_of
from support.stores import make_kv

from sac_rag import SacRAG, archive
from sac_rag.archive import Archive
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.errors import ChunkMissError, CorruptEntryError
from sac_rag.evaluation.quality import System, evaluate
from sac_rag.evaluation.questions import QAExample, Question
from sac_rag.evaluation.sample import draw
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.origin import Origin
from sac_rag.prompts.format import SPANS
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import DiskStore, MemoryStore
from sac_rag.stores.base import DocumentStore

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


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of an archive with another manifest."""
    other = path.with_suffix(".changed")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "manifest.json":
                about = json.loads(data)
                change(about)
                data = json.dumps(about).encode()
            new.writestr(name, data)
    return other


# --- served elsewhere


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("sac", "float32"), ("learned", "float32"), ("full", "float32"), ("sac", "int8")],
)
def test_answers_without_the_compressor_are_those_with_it(
    make_generator: Callable[..., Generator], saved: Path, tmp_path: Path, method: str, dtype: Any
) -> None:
    compressor = make_compressor(make_generator("llama"), method).storing(dtype)
    rag = SacRAG(CachedCompressor(compressor, {}), prompt_format=SPANS, decoding=SHORT)
    path = tmp_path / "corpus.sacrag"
    archive.write(path, Origin.of(compressor, SPANS), entries(CachedCompressor(compressor, {})))
    served = SacRAG.from_archive(path, saved, device="cpu", decoding=SHORT)
    assert served.prompt_format == SPANS
    for chunks in (PROSE, PROSE[:1], PROSE[::-1]):
        expected, got = rag.answer(QUESTION, chunks), served.answer(QUESTION, chunks)
        assert got.text == expected.text
        assert {chunk.status for chunk in got.chunks} == {"hit"}
        assert got.usage.positions_attended == expected.usage.positions_attended


@pytest.mark.parametrize("system", ["compressed", "full-text"])
def test_answers_without_the_compressor_can_be_scored(
    carried: Path, saved: Path, system: System
) -> None:
    served = SacRAG.from_archive(carried, saved, device="cpu")
    asked = QAExample((Chunk(PROSE[0]),), (Question("0", QUESTION, ("a gold answer",)),))
    assert evaluate(served, draw([asked]), system=system, max_new_tokens=4).n == 1


def test_no_lora_is_on_the_serving_model_and_the_encoder_never_runs(
    carried: Path, saved: Path, sac: Compressor
) -> None:
    assert any("lora" in name for name, _ in sac.generator.model.named_parameters())
    served = SacRAG.from_archive(carried, saved, device="cpu", decoding=SHORT)
    parameters = dict(served.generator.model.named_parameters())
    assert not [name for name in parameters if "lora" in name.lower()]
    assert set(parameters) == set(dict(make_model("llama").named_parameters()))
    assert served.compressor.inner.weights == {}
    with passes_of(served.generator) as passes:
        served.answer(QUESTION, PROSE)
    assert len(passes) == 1 + 8  # prefix and answer


def test_what_is_not_in_the_archive_is_read_as_text_or_refused(carried: Path, saved: Path) -> None:
    unknown = "A text that nobody precompressed."
    served = SacRAG.from_archive(carried, saved, device="cpu", decoding=SHORT)
    report = served.answer(QUESTION, [PROSE[0], unknown]).chunks[1]
    assert (report.status, report.read_as) == ("absent", "text")
    strict = SacRAG.from_archive(carried, saved, device="cpu", on_miss="raise")
    with pytest.raises(ChunkMissError):
        strict.answer(QUESTION, [unknown])
    with pytest.raises(ValueError, match="must be 'text' or 'raise' where no compressor is loaded"):
        SacRAG.from_archive(carried, saved, device="cpu", on_miss="compress")


def test_compressing_and_changing_what_is_stored_are_refused_with_what_to_do(
    carried: Path, saved: Path
) -> None:
    served = SacRAG.from_archive(carried, saved, device="cpu")
    with pytest.raises(RuntimeError, match=r"is not here .* on_miss='text' or 'raise'"):
        served.precompress(["A text that nobody precompressed."])
    assert served.precompress(PROSE).hits == 8
    stored = served.compressor.inner
    with pytest.raises(ValueError, match=r"made with its own config, asked for: {'ratio': 9}"):
        stored.at_ratio(9)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "generator.weights was "),
        ({"architecture": "qwen3"}, "generator.model was "),
        ({"tokenizer": True}, "generator.tokenizer was "),
    ],
    ids=["weights", "architecture", "tokenizer"],
)
def test_another_model_is_refused_and_what_differs_is_named(
    carried: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    model = make_model(change.get("architecture", "llama"), seed=change.get("seed", 0))
    tokenizer = make_tokenizer()
    if "tokenizer" in change:
        tokenizer.add_tokens(["lighthouse"])
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"for another model: .*{named}") as refused:
        SacRAG.from_archive(carried, tmp_path / "other", device="cpu")
    if change == {"seed": 1}:
        assert str(refused.value).count(" was ") == 1


def test_the_model_is_loaded_in_the_dtype_the_chunks_were_made_in(
    saved: Path, tmp_path: Path
) -> None:
    rag = SacRAG.from_pretrained(saved, device="cpu", dtype="bfloat16", decoding=SHORT)
    path = tmp_path / "corpus.sacrag"
    compressor = rag.compressor.inner
    archive.write(path, Origin.of(compressor, rag.prompt_format), entries(rag.compressor))
    served = SacRAG.from_archive(path, saved, device="cpu", decoding=SHORT)
    assert served.generator.dtype_name == "bfloat16"
    assert served.answer(QUESTION, PROSE).text == rag.answer(QUESTION, PROSE).text


def test_a_namespace_is_carried_and_its_chunks_are_hits_there_alone(
    sac: Compressor, saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "corpus.sacrag"
    tenant = CachedCompressor(sac, {}, namespace="tenant")
    archive.write(path, Origin.of(sac), entries(tenant))
    for namespace, status in (("tenant", "hit"), ("", "absent"), ("other", "absent")):
        served = SacRAG.from_archive(path, saved, device="cpu", namespace=namespace)
        assert served.answer(QUESTION, PROSE[:1], SHORT).chunks[0].status == status


# --- what is written


def test_an_archive_holds_what_was_given_and_no_more(carried: Path, sac: Compressor) -> None:
    cached = CachedCompressor(sac, {})
    opened = Archive(carried)
    assert set(opened) == {cached.key(text) for text in PROSE}
    assert len(opened) == 8
    assert opened.verify() == []
    kvs = cached.compress(PROSE)
    for number, text in enumerate(PROSE):
        record = opened.records[cached.key(text)]
        assert record.documents == (f"document {number}",)
        assert record.text_id == cached.text_id(text)
        assert opened[cached.key(text)].bit_equal(kvs[number])
    assert opened.origin.fingerprint == sac.fingerprint
    assert opened.origin.config == sac.config
    with zipfile.ZipFile(carried) as file:
        assert file.testzip() is None
        names = set(file.namelist())
        text = b"".join(file.read(name) for name in names)
    assert names >= {"manifest.json", "cue.safetensors"}
    assert len(names) == 10
    assert not [words for words in PROSE if words[4:20].encode() in text]


def test_equal_contents_are_equal_archives(carried: Path, sac: Compressor, tmp_path: Path) -> None:
    again = tmp_path / "again"
    archive.write(again, Origin.of(sac, SPANS), entries(CachedCompressor(sac, {})))
    assert again.read_bytes() == carried.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_an_archive_is_its_owners_alone(carried: Path) -> None:
    assert stat.S_IMODE(carried.stat().st_mode) == 0o600


def test_entries_are_taken_one_by_one(sac: Compressor, tmp_path: Path) -> None:
    """Not more than one is alive at a time, however large the corpus."""
    import weakref

    kvs: list[Any] = []

    def fresh() -> Iterator[Any]:
        for text in PROSE:
            assert sum(ref() is not None for ref in kvs) <= 1
            (kv,) = sac.compress([text])
            kvs.append(weakref.ref(kv))
            yield CachedCompressor(sac, {}).key(text), kv, (), None
            del kv

    assert archive.write(tmp_path / "corpus", Origin.of(sac), fresh()) == 8


def test_an_interrupted_export_leaves_nothing(sac: Compressor, tmp_path: Path) -> None:
    def interrupted() -> Iterator[Any]:
        yield from list(entries(CachedCompressor(sac, {})))[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        archive.write(tmp_path / "corpus", Origin.of(sac), interrupted())
    assert list(tmp_path.glob("corpus*")) == []


def test_a_file_that_is_there_is_not_replaced(carried: Path, sac: Compressor) -> None:
    before = carried.read_bytes()
    with pytest.raises(FileExistsError, match="give another name"):
        archive.write(carried, Origin.of(sac), [])
    assert carried.read_bytes() == before


def test_an_origin_must_fit_together(sac: Compressor, trained: Path) -> None:
    fields = sac.fingerprint_fields()
    with pytest.raises(ValueError, match=r"config\.ratio differ"):
        Origin(fields, sac.at_ratio(9).config, sac.cue)
    with pytest.raises(ValueError, match="cue=True, but no cue was given"):
        Origin(fields, sac.config)
    with pytest.raises(ValueError, match="other weights than none"):
        Origin.from_folder(fields, None)
    origin_of_folder = Origin.from_folder(fields, trained)
    assert (
        origin_of_folder.prompt_format == SPANS and origin_of_folder.fingerprint == sac.fingerprint
    )
    assert origin_of_folder.cue is not None and origin_of_folder.cue.equal(sac.cue.detach())  # type: ignore[union-attr]


# --- what is read


@pytest.mark.parametrize("kind", ["dict", "memory", "disk"])
def test_an_import_copies_everything_with_its_documents(
    carried: Path, sac: Compressor, disk: DiskStore, kind: str
) -> None:
    store: Any = {"dict": {}, "memory": MemoryStore(), "disk": disk}[kind]
    opened = Archive(carried)
    assert opened.copy_to(store) == 8
    assert opened.copy_to(store) == 0
    cached = CachedCompressor(sac, store)
    assert cached.fetch(PROSE).misses == [None] * 8
    if kind == "disk":
        assert disk.documents(cached.key(PROSE[3])) == ("document 3",)


def test_an_interrupted_import_goes_on_where_it_was(carried: Path, disk: DiskStore) -> None:
    progress: list[int] = []

    def interrupt(count: int) -> None:
        progress.append(count)
        if len(progress) == 3:
            raise KeyboardInterrupt

    opened = Archive(carried)
    with pytest.raises(KeyboardInterrupt):
        opened.copy_to(disk, interrupt)
    assert len(disk) == 3
    assert opened.copy_to(disk) == 5


def test_documents_of_an_entry_that_is_there_are_added(
    carried: Path, sac: Compressor, disk: DiskStore
) -> None:
    cached = CachedCompressor(sac, disk)
    cached.fetch([PROSE[0]], documents=["own"])
    opened = Archive(carried)
    opened.copy_to(disk)
    assert disk.documents(cached.key(PROSE[0])) == ("document 0", "own")


@pytest.mark.parametrize("kind", ["dict", "memory", "disk"])
def test_an_import_replaces_entries_that_hold_less_and_no_others(
    carried: Path, sac: Compressor, disk: DiskStore, kind: str
) -> None:
    store: Any = {"dict": {}, "memory": MemoryStore(), "disk": disk}[kind]
    cached = CachedCompressor(sac, store)
    keys = [cached.key(text) for text in PROSE]
    opened = Archive(carried)
    less = opened[keys[0]].first(5)
    more = replace(opened[keys[1]], num_tokens=1000)
    more = replace(more.map(lambda tensor: torch.cat([tensor, tensor])), num_tokens=more.num_tokens)
    store[keys[0]], store[keys[1]] = less, more
    assert opened.copy_to(store) == (8 if kind == "disk" else 7)  # one got its document
    assert store[keys[0]].bit_equal(opened[keys[0]])
    assert store[keys[1]].bit_equal(more)
    assert opened.copy_to(store) == 0


def test_the_first_entries_of_a_chunk_are_read_alone(carried: Path) -> None:
    opened = Archive(carried)
    assert isinstance(opened, DocumentStore)
    for key, kv in opened.items():
        assert opened.extent(key) == (kv.num_tokens, kv.num_entries)
        for entries in (1, 7, 10**9):
            first = opened.read(key, lambda _, n=entries: n)  # type: ignore[misc]
            assert first.bit_equal(kv.first(min(entries, kv.num_entries)))
    for read in (opened.extent, lambda key: opened.read(key, lambda _: 1)):
        with pytest.raises(KeyError):
            read("ab")


def test_damage_behind_the_first_entries_is_found_when_all_are_read(
    sac: Compressor, tmp_path: Path
) -> None:
    path, key = tmp_path / "corpus", "ab" * 32
    kv = make_kv(anchors=4000)
    archive.write(path, Origin.of(sac, SPANS), [(key, kv, (), None)])
    with zipfile.ZipFile(path) as file:
        info = file.getinfo(f"entries/{key}.kv")
    data = bytearray(path.read_bytes())
    data[info.header_offset + info.file_size] ^= 1
    path.write_bytes(data)
    opened = Archive(path)
    assert opened.read(key, lambda _: 6000).bit_equal(kv.first(6000))
    for read in (opened.__getitem__, lambda key: opened.read(key, lambda _: 24_000)):
        with pytest.raises(CorruptEntryError):
            read(key)
    data[info.header_offset + 100_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptEntryError, match="checksum"):
        Archive(path).read(key, lambda _: 6000)


def test_an_entry_of_another_size_than_the_manifest_says_is_not_imported(carried: Path) -> None:
    def change(about: dict[str, Any]) -> None:
        next(iter(about["records"].values()))["num_entries"] -= 1

    opened = Archive(rewrite(carried, change))
    (problem,) = opened.verify()
    assert "not as large as the manifest says" in problem
    with pytest.raises(CorruptEntryError):
        opened.copy_to({})


def test_imported_chunks_are_served_from_the_store(
    carried: Path, saved: Path, disk: DiskStore
) -> None:
    opened = Archive(carried)
    opened.copy_to(disk)
    served = SacRAG.from_archive(carried, saved, store=disk, device="cpu", decoding=SHORT)
    assert {c.status for c in served.answer(QUESTION, PROSE).chunks} == {"hit"}
    direct = SacRAG.from_archive(carried, saved, device="cpu", decoding=SHORT)
    assert direct.answer(QUESTION, PROSE).text == served.answer(QUESTION, PROSE).text


def test_an_archive_can_only_be_read(carried: Path) -> None:
    opened = Archive(carried)
    key = next(iter(opened))
    with pytest.raises(OSError, match="can only be read"):
        opened[key] = opened[key]
    with pytest.raises(OSError, match="can only be read"):
        del opened[key]
    with pytest.raises(KeyError):
        opened["ab"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_and_forked_processes_read_one_archive(carried: Path) -> None:
    opened = Archive(carried)
    expected = {key: opened[key] for key in opened}

    def read(number: int) -> bool:
        chance = random.Random(number)
        keys = chance.choices(sorted(opened), k=50)
        return all(opened[key].bit_equal(expected[key]) for key in keys)

    children = []
    for number in range(3):
        child = os.fork()
        if not child:
            os._exit(0 if read(number) else 1)
        children.append(child)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(8)))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


# --- damage and malice


@pytest.mark.parametrize("format", [1, 3])
def test_another_format_is_refused_by_name(carried: Path, format: int) -> None:
    expected = f"is of format {format}, this version of sac_rag reads format 2"
    with pytest.raises(ValueError, match=expected):
        Archive(rewrite(carried, lambda about: about.update(format=format)))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.update(magic="other"),
        lambda about: about.pop("origin"),
        lambda about: about.update(records=[]),
        lambda about: about.update(entries=7),
        lambda about: about["records"].popitem(),
        lambda about: about["records"].update({"../../etc/passwd": {}}),
        lambda about: about["origin"].update(fingerprint="0" * 64),
        lambda about: about["origin"]["config"].update(ratio=9),
        lambda about: about["origin"]["config"].update(unknown=9),
        lambda about: about["origin"]["fields"].update({"generator.weights": "other"}),
        lambda about: about["origin"].update(prompt_format=3),
        lambda about: about.update(cue=None),
        lambda about: about.update(cue="0" * 64),
        lambda about: next(iter(about["records"].values())).update(documents=[3]),
        lambda about: next(iter(about["records"].values())).update(sha256="short"),
        lambda about: next(iter(about["records"].values())).update(num_entries="5"),
        lambda about: next(iter(about["records"].values())).pop("num_tokens"),
        lambda about: next(iter(about["records"].values())).update(more=1),
    ],
)
def test_a_manifest_that_contradicts_the_rest_is_refused(carried: Path, change: Any) -> None:
    with pytest.raises(ValueError, match="archive"):
        Archive(rewrite(carried, change))


def test_a_damaged_entry_is_named_not_imported_and_a_miss_when_served(
    carried: Path, sac: Compressor, saved: Path, disk: DiskStore
) -> None:
    cached = CachedCompressor(sac, {})
    data = bytearray(carried.read_bytes())
    with zipfile.ZipFile(carried) as file:
        info = file.getinfo(f"entries/{cached.key(PROSE[2])}.kv")
    data[info.header_offset + 2000] ^= 1
    carried.write_bytes(data)
    opened = Archive(carried)
    (problem,) = opened.verify()
    assert problem.startswith(cached.key(PROSE[2]))
    with pytest.raises(CorruptEntryError):
        opened.copy_to(disk)
    assert cached.key(PROSE[2]) not in disk
    served = SacRAG.from_archive(carried, saved, device="cpu", decoding=SHORT)
    statuses = [chunk.status for chunk in served.answer(QUESTION, PROSE).chunks]
    assert statuses == ["hit", "hit", "corrupt", *["hit"] * 5]


def test_an_entry_in_anothers_place_is_not_believed(carried: Path) -> None:
    """The manifest's digests are put right too, as whoever swaps entries on purpose would."""

    def swap(about: dict[str, Any]) -> None:
        (_, one), (_, other), *_ = about["records"].items()
        one["sha256"], other["sha256"] = other["sha256"], one["sha256"]

    changed = rewrite(carried, swap)
    keys = list(Archive(carried))[:2]
    swapped = changed.with_suffix(".swapped")
    with zipfile.ZipFile(changed) as old, zipfile.ZipFile(swapped, "w") as new:
        names = {f"entries/{keys[0]}.kv": f"entries/{keys[1]}.kv"}
        names |= {other: one for one, other in names.items()}
        for name in old.namelist():
            new.writestr(names.get(name, name), old.read(name))
    opened = Archive(swapped)
    assert len(opened.verify()) == 2
    with pytest.raises(CorruptEntryError, match="this is the entry of key"):
        opened[keys[0]]


def test_a_pickle_in_an_archive_is_never_executed(carried: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    opened = Archive(carried)
    key = next(iter(opened))
    evil = tmp_path / "evil"
    with zipfile.ZipFile(carried) as old, zipfile.ZipFile(evil, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle.dumps(Evil()) if key in name else old.read(name))
    opened = Archive(evil)
    with pytest.raises(CorruptEntryError):
        opened[key]
    assert len(opened.verify()) == 1
    assert not ran.exists()


def test_nothing_in_an_archive_can_swell(carried: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb"
    with zipfile.ZipFile(carried) as old, zipfile.ZipFile(bomb, "w") as new:
        for name in old.namelist():
            data = b" " * 50_000_000 if name == "manifest.json" else old.read(name)
            kind = zipfile.ZIP_DEFLATED if name == "manifest.json" else zipfile.ZIP_STORED
            new.writestr(name, data, compress_type=kind)
    with pytest.raises(ValueError, match=r"manifest\.json is compressed"):
        Archive(bomb)


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip at all", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match="is no archive of sac_rag"):
        Archive(tmp_path / "file")
    with pytest.raises(OSError):
        Archive(tmp_path / "nowhere")


def test_random_damage_is_an_error_or_a_miss_and_never_other_numbers(
    carried: Path, tmp_path: Path
) -> None:
    whole = carried.read_bytes()
    opened = Archive(carried)
    expected = {key: opened[key] for key in opened}
    chance = random.Random(0)
    refused = missed = 0
    path = tmp_path / "damaged"
    for _ in range(400):
        data = bytearray(whole)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        else:
            # Half of the time near the end, where the manifest and the directory are.
            start = 0 if chance.random() < 0.5 else len(data) - 8000
            data[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            opened = Archive(path)
        except ValueError:
            refused += 1
            continue
        for key in opened:
            try:
                kv: AnchorKV = opened[key]
            except CorruptEntryError:
                missed += 1
            else:
                assert kv.bit_equal(expected[key])
            with suppress(CorruptEntryError):
                assert opened.read(key, lambda _: 5).bit_equal(expected[key].first(5))
    assert refused > 100 and missed > 50
