"""A folder of chunks and anchors: filled, searched, asked, opened again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sac_rag.chunk import Chunk
from sac_rag.cli import app
from sac_rag.collection import Collection, CollectionSettings, forget_texts, read_settings
from sac_rag.compressors import checkpoint
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.sac import SAC
from sac_rag.demo import QUESTIONS, ask_questions, pack_leads, wikipedia_leads
from sac_rag.prompts.format import SPANS
from sac_rag.retrieval.index import ChunkIndex

pytestmark = pytest.mark.real_model

TITLES = (
    "Marie Curie", "Pierre Curie", "Radium", "Uranium", "Sinking of the Titanic", "Ship",
    "Black Death", "Plague (disease)", "Bacteria", "Apollo 11", "Neil Armstrong", "Moon",
    "Berlin Wall", "Berlin", "Germany", "Cold War", "Great Wall of China", "Physics", "Chemistry",
    "Atlantic Ocean",
)  # fmt: skip


@pytest.fixture(scope="module")
def leads() -> list[Chunk]:
    found = [lead for lead in wikipedia_leads() if lead.title in TITLES]
    assert len(found) >= 15
    return found


@pytest.fixture(scope="module")
def collection(
    tmp_path_factory: pytest.TempPathFactory, leads: list[Chunk]
) -> Iterator[Collection]:
    folder = tmp_path_factory.mktemp("collection") / "leads"
    # Whatever compressor is shipped: what is claimed of the answers is true of every token.
    made = Collection(folder, CollectionSettings(compressor="full"))
    assert made.add(made.split(leads)) >= len(leads)
    yield made


def test_adding_the_same_chunks_again_adds_nothing(
    collection: Collection, leads: list[Chunk]
) -> None:
    before = len(collection.index)
    assert collection.add(collection.split(leads)) == 0
    assert len(collection.index) == before


def test_the_demo_answers_with_sources_and_its_second_run_hits(collection: Collection) -> None:
    first = list(ask_questions(collection, k=4))
    assert [result.question for result in first] == list(QUESTIONS)
    for result in first:
        assert result.hits == 0 or result is not first[0]
        assert [source.number for source in result.sources] == [1, 2, 3, 4]
        scores = [source.score for source in result.sources]
        assert scores == sorted(scores, reverse=True)
        assert result.source_tokens == result.kv_entries > 100
        assert result.kv_bytes > result.kv_entries * 2 * 30 * 3 * 64 * 2
        assert result.answer.strip()
        assert result.ttft_s > 0
        assert result.answer_s >= result.ttft_s
        assert result.answer_full_text_s >= result.ttft_full_text_s > 0
        assert result.answer_tokens > 0
        assert result.ttft_llama_cpp_s is result.answer_llama_cpp_s is None
    assert "Armstrong" in first[3].answer
    assert "1961" in first[4].answer
    second = list(islice(ask_questions(collection, k=4), 2))
    assert [result.hits for result in second] == [4, 4]
    assert [result.answer for result in second] == [result.answer for result in first[:2]]
    assert set(first[0].to_dict()) == {
        "question", "answer", "sources", "hits", "source_tokens", "kv_entries", "kv_bytes",
        "ttft_s", "answer_s", "answer_tokens", "ttft_full_text_s", "answer_full_text_s",
        "ttft_llama_cpp_s", "answer_llama_cpp_s",
    }  # fmt: skip


def test_the_passages_of_the_demo_are_as_long_as_splitters_cut_and_hold_their_leads() -> None:
    passages = pack_leads()
    by_title = {lead.title: lead for lead in wikipedia_leads()}
    assert all(by_title[title].text in passage.text for title, passage in passages.items())
    lengths = [len(passage.text) for passage in {p.text: p for p in passages.values()}.values()]
    assert 1300 < sum(lengths) / len(lengths) < 1800
    assert "Apollo 11" in (passages["Apollo 11"].title or "")


def test_it_is_the_same_when_opened_again(collection: Collection) -> None:
    again = Collection(collection.folder)
    question = QUESTIONS[3]
    assert [hit.chunk for hit in again.search(question)] == [
        hit.chunk for hit in collection.search(question)
    ]
    answer = again.rag.answer(question, [hit.chunk for hit in again.search(question)])
    assert {report.status for report in answer.chunks} == {"hit"}


def test_a_document_that_is_forgotten_is_neither_found_nor_on_the_disk(
    collection: Collection, tmp_path: Path
) -> None:
    folder = shutil.copytree(collection.folder, tmp_path / "leads")
    unwanted, other = collection.index.chunks[0], collection.index.chunks[-1]
    forgotten = CliRunner().invoke(
        app, ["store", "forget", str(folder), str(unwanted.id), "--json"]
    )
    of_it = [chunk for chunk in collection.index.chunks if chunk.id == unwanted.id]
    assert json.loads(forgotten.stdout)["chunks"] == len(of_it)
    assert forgotten.stderr == ""  # no bar of how far the embedder's weights are loaded
    on_disk = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert json.dumps(unwanted.text).encode() not in on_disk
    assert json.dumps(other.text).encode() in on_disk
    index = ChunkIndex.load(folder / "index", collection.index.embedder)
    assert len(index) == len(collection.index) - len(of_it)
    assert forget_texts(folder, [str(unwanted.id)]) == {}


def test_other_settings_for_a_collection_that_is_there_are_refused(collection: Collection) -> None:
    with pytest.raises(ValueError, match=r"other settings.*chunk_tokens"):
        Collection(collection.folder, CollectionSettings(chunk_tokens=99))


def test_a_collection_of_before_there_was_a_choice_of_dtypes_is_read(
    collection: Collection, tmp_path: Path
) -> None:
    values = json.loads((collection.folder / "collection.json").read_text())
    del values["stored_dtype"]
    (tmp_path / "collection.json").write_text(json.dumps(values))
    assert read_settings(tmp_path) == collection.settings


def test_settings_left_out_for_a_collection_that_is_there_are_its_own(
    collection: Collection,
) -> None:
    again = Collection(collection.folder, CollectionSettings())
    assert again.settings == collection.settings == CollectionSettings(compressor="full")
    with pytest.raises(ValueError, match=r"other settings.*compressor.*'full', 'shipped'"):
        Collection(collection.folder, CollectionSettings(compressor="shipped"))


def test_a_new_collection_takes_the_shipped_compressor_and_an_old_one_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leads: list[Chunk]
) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    before = Collection(tmp_path / "before")
    assert before.settings.compressor == "full"
    untrained = SAC(before.rag.generator, CompressorConfig(lora_rank=2))
    checkpoint.save(untrained, checkpoint.WEIGHTS / before.settings.model, prompt_format=SPANS)
    assert Collection(before.folder).rag.compressor.method == "full"
    after = Collection(tmp_path / "after")
    assert json.loads((after.folder / "collection.json").read_text())["compressor"] == "shipped"
    assert after.rag.compressor.method == "sac"
    assert after.rag.prompt_format == SPANS
    after.add(after.split(leads))
    for result in ask_questions(after, k=2):
        assert 0 < result.kv_entries < result.source_tokens
        assert "\n" not in result.answer
        assert json.loads(json.dumps(result.to_dict()))["question"] == result.question


def test_a_draft_of_a_killed_process_does_not_occupy_a_folder(tmp_path: Path) -> None:
    (tmp_path / "collection.json.123.part").write_text('{"form')
    Collection(tmp_path, CollectionSettings(compressor="full")).close()
    assert read_settings(tmp_path).compressor == "full"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("…")
    with pytest.raises(ValueError, match="holds something else"):
        Collection(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not that of a collection"),
        ("[]", "not that of a collection"),
        (json.dumps({"format": 99}), "format 99"),
        (json.dumps({"format": 1, "colour": "red"}), "colour"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(
    tmp_path: Path, text: str, complaint: str
) -> None:
    (tmp_path / "collection.json").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        Collection(tmp_path)


def test_searching_an_empty_collection_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sac-rag precompress"):
        Collection(tmp_path / "new").search("Anything?")
