"""Several writers of one collection: each waits while another saves, and nothing is lost."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from support.models import PROSE, make_model, make_tokenizer

from sac_rag.chunk import Chunk
from sac_rag.collection import Collection, CollectionSettings, forget_texts, read_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model: Path, home: Path) -> CollectionSettings:
    """Of a tiny model, which embeds as well."""
    return CollectionSettings(model=str(model), compressor="full", embedder=str(model))


@pytest.fixture
def opened(tmp_path: Path, settings: CollectionSettings) -> Iterator[Callable[[], Collection]]:
    """Opens one and the same collection, as another process would."""
    found: list[Collection] = []

    def open_again() -> Collection:
        found.append(Collection(tmp_path / "library", settings))
        return found[-1]

    yield open_again
    for collection in found:
        collection.close()


def texts_of(collection: Collection) -> list[str]:
    return [chunk.text for chunk in collection.index.chunks]


def test_what_two_have_added_is_all_found(opened: Callable[[], Collection]) -> None:
    one, other = opened(), opened()
    assert len(one.index) == len(other.index) == 0  # both are loaded before either adds
    assert one.add([Chunk(PROSE[0], id="a")]) == 1
    assert other.add([Chunk(PROSE[1], id="b"), Chunk(PROSE[0], id="a")]) == 1
    assert one.add([Chunk(PROSE[2], id="c")]) == 1
    assert sorted(texts_of(opened())) == sorted(PROSE[:3])
    assert {hit.chunk.text for hit in one.search("ships", k=9)} == set(PROSE[:3])


def test_a_document_changed_by_one_is_not_brought_back_by_the_other(
    opened: Callable[[], Collection],
) -> None:
    one, other = opened(), opened()
    one.add([Chunk(PROSE[0], id="a"), Chunk(PROSE[1], id="b")], whole_documents=True)
    other.add([Chunk(PROSE[2], id="a")], whole_documents=True)
    one.add([Chunk(PROSE[3], id="c")], whole_documents=True)
    assert sorted(texts_of(opened())) == sorted([PROSE[1], PROSE[2], PROSE[3]])


def test_a_document_forgotten_beside_a_writer_stays_forgotten(
    opened: Callable[[], Collection],
) -> None:
    one = opened()
    one.add([Chunk(PROSE[0], id="a"), Chunk(PROSE[1], id="b")])
    assert forget_texts(one.folder, ["a", "x"]) == {"a": 1}
    one.add([Chunk(PROSE[2], id="c")])
    assert sorted(texts_of(opened())) == sorted(PROSE[1:3])


def test_writers_at_the_same_time_lose_nothing(opened: Callable[[], Collection]) -> None:
    writers = [opened() for _ in range(3)]
    for writer in writers:
        assert len(writer.index) == 0
    start = threading.Barrier(len(writers))

    def add(number: int) -> int:
        start.wait(60)
        return sum(
            writers[number].add([Chunk(f"{text} {number}", id=str(number)), Chunk(text, id="all")])
            for text in PROSE
        )

    with ThreadPoolExecutor(len(writers)) as pool:
        added = list(pool.map(add, range(len(writers))))
    expected = {f"{text} {number}" for text in PROSE for number in range(3)} | set(PROSE)
    assert sorted(texts_of(opened())) == sorted(expected)
    assert sum(added) == len(expected)


def test_threads_may_add_to_one_collection(opened: Callable[[], Collection]) -> None:
    collection = opened()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: collection.add([Chunk(text)]), PROSE)) == [1] * 8
    assert sorted(texts_of(collection)) == sorted(texts_of(opened())) == sorted(PROSE)


def test_of_two_who_make_a_collection_the_second_keeps_to_the_settings_of_the_first(
    tmp_path: Path, settings: CollectionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks before the first writes, and gets the lock after it."""
    from sac_rag import collection as module

    def make_first(lock: Path) -> Callable[[Path], object]:
        monkeypatch.setattr(module, "one_writer", real)
        Collection(tmp_path / "library", settings).close()
        return real(lock)

    real = module.one_writer
    monkeypatch.setattr(module, "one_writer", make_first)
    with pytest.raises(ValueError, match=r"made with other settings.*chunk_tokens"):
        Collection(tmp_path / "library", replace(settings, chunk_tokens=99))
    assert read_settings(tmp_path / "library") == settings


def test_metadata_that_json_cannot_hold_is_refused_before_embedding_and_spoils_nothing(
    opened: Callable[[], Collection],
) -> None:
    collection = opened()
    told: list[int] = []
    bad = Chunk(PROSE[1], id="b", metadata={"when": datetime.datetime(1931, 5, 1)})
    with pytest.raises(TypeError, match=r"that of chunk 1 \(from 0\).*datetime"):
        collection.add([Chunk(PROSE[0], id="a"), bad], told.append)
    assert (told, len(collection.index)) == ([], 0)
    assert collection.add([Chunk(PROSE[0], id="a")]) == 1
    assert texts_of(opened()) == [PROSE[0]]


def test_one_text_in_place_of_several_is_refused(opened: Callable[[], Collection]) -> None:
    collection = opened()
    for method in (collection.add, collection.split, collection.precompress):
        for one in ("a text", Chunk("a text")):
            with pytest.raises(TypeError, match="put it in a list"):
                method(one)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="several"):
        forget_texts(collection.folder, "abc")


def test_who_only_stores_anchors_needs_no_embedder(tmp_path: Path, model: Path, home: Path) -> None:
    settings = CollectionSettings(model=str(model), compressor="full", embedder="./no/such/one")
    with closing(Collection(tmp_path / "library", settings)) as collection:
        assert sum(report.computed for report in collection.precompress(map(Chunk, PROSE))) == 8
        with pytest.raises(ValueError, match="no/such/one"):
            collection.search("ships")
