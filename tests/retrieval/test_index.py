"""What is claimed of retrieval.py: the nearest chunk is found, before and after a crash."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from sac_rag.chunk import Chunk
from sac_rag.retrieval.embedder import Embedder
from sac_rag.retrieval.index import ChunkIndex, Hit


class WordHashEmbedder:
    """A vector counts a text's words, each in the place its checksum gives it."""

    def __init__(self, dimension: int = 64, identity: str = "word hashes") -> None:
        self.dimension = dimension
        self.identity = identity
        self.embedded: list[str] = []

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1
            self.embedded.append(text)
            if on_progress is not None:
                on_progress(1)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: NDArray[np.float32] = vectors / np.maximum(length, 1e-9)
        return unit


TEXTS = [
    "The lighthouse keeper counted seven ships.",
    "Copper conducts electricity better than iron.",
    "A glacier moves as slowly as a river of stone.",
    "Owls hear a mouse under the snow.",
]


@pytest.fixture
def embedder() -> WordHashEmbedder:
    return WordHashEmbedder()


@pytest.fixture
def index(embedder: WordHashEmbedder) -> ChunkIndex:
    return ChunkIndex.build(TEXTS, embedder)


def words(number: int) -> str:
    """Five words that no other number has all of."""
    return " ".join(f"w{number * 7919 % 1009 + i * 31}" for i in range(5))


def found(hits: list[Hit]) -> list[str]:
    return [hit.chunk.text for hit in hits]


def test_the_nearest_chunk_comes_first_with_its_cosine(
    index: ChunkIndex, embedder: WordHashEmbedder
) -> None:
    hits = index.search("which ships were counted by the lighthouse keeper", k=4)
    assert hits[0].chunk == Chunk(TEXTS[0])
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    question, *vectors = embedder.embed(
        ["which ships were counted by the lighthouse keeper", *found(hits)]
    )
    assert [hit.score for hit in hits] == pytest.approx([float(v @ question) for v in vectors])


def test_a_chunk_is_found_by_its_title_and_comes_back_whole(embedder: WordHashEmbedder) -> None:
    chunk = Chunk("It hunts at night.", id="d7", title="Barn owl", metadata={"page": 3})
    index = ChunkIndex.build([*TEXTS, chunk], embedder)
    assert index.search("barn owl", k=1)[0].chunk is chunk


def test_all_forms_of_a_chunk_are_taken(embedder: WordHashEmbedder) -> None:
    index = ChunkIndex.build(["one", ("id", "two"), Chunk("three")], embedder)
    assert index.chunks == (Chunk("one"), Chunk("two", id="id"), Chunk("three"))
    assert len(index) == 3


def test_chunks_added_later_are_found_like_those_built_with(embedder: WordHashEmbedder) -> None:
    grown = ChunkIndex.build(TEXTS[:2], embedder)
    grown.add(iter(TEXTS[2:]))
    built = ChunkIndex.build(TEXTS, embedder)
    assert grown.chunks == built.chunks
    for text in TEXTS:
        assert grown.search(text) == built.search(text)


def test_adding_embeds_only_what_is_new(index: ChunkIndex, embedder: WordHashEmbedder) -> None:
    embedder.embedded.clear()
    index.add(["something new"])
    assert embedder.embedded == ["something new"]


def test_progress_counts_every_chunk_once(embedder: WordHashEmbedder) -> None:
    steps: list[int] = []
    index = ChunkIndex.build(TEXTS, embedder, steps.append)
    assert sum(steps) == len(TEXTS)
    index.add(["more"], steps.append)
    assert sum(steps) == len(TEXTS) + 1


@pytest.mark.parametrize("hnsw_from", [100, 10], ids=["exact", "graph"])
def test_equal_chunks_are_all_kept_and_found(embedder: WordHashEmbedder, hnsw_from: int) -> None:
    index = ChunkIndex(embedder, hnsw_from=hnsw_from)
    index.add(["the same words"] * 50 + TEXTS)
    assert len(index) == 54
    first, *others = index.search("the same words", k=5)
    assert (first.chunk.text, len(first.duplicates)) == ("the same words", 49)
    assert sorted(found(others)) == sorted(TEXTS)


@pytest.mark.parametrize("hnsw_from", [1000, 10], ids=["exact", "graph"])
def test_more_than_there_are_means_all(embedder: WordHashEmbedder, hnsw_from: int) -> None:
    index = ChunkIndex(embedder, hnsw_from=hnsw_from)
    chunks = [*(words(i) for i in range(200)), *(["equal"] * 500)]
    index.add(chunks)
    hits = index.search(words(3), k=10_000)
    assert sorted(found(hits)) == sorted(set(chunks))
    assert sum(1 + len(hit.duplicates) for hit in hits) == len(chunks)


def test_a_text_takes_one_place_and_names_all_its_documents(embedder: WordHashEmbedder) -> None:
    copies = [Chunk(TEXTS[0], id=f"copy {i}", title="ships" if i == 7 else None) for i in range(9)]
    index = ChunkIndex.build([*copies, Chunk(TEXTS[0], id="copy 3"), *TEXTS], embedder)
    first, second = index.search("seven ships", k=2)
    assert first.chunk.text == TEXTS[0] != second.chunk.text
    assert first.chunk.id == "copy 7"  # its title makes it the nearest
    assert first.documents[0] == "copy 7"
    assert set(first.documents) == {f"copy {i}" for i in range(9)}
    assert (second.duplicates, second.documents) == ((), ())


def test_nothing_is_found_in_nothing(embedder: WordHashEmbedder) -> None:
    index = ChunkIndex.build([], embedder)
    index.add([])
    assert index.search("anything") == []
    assert len(index) == 0
    assert embedder.embedded == []


def test_an_empty_chunk_is_refused_by_number_and_nothing_is_added(index: ChunkIndex) -> None:
    with pytest.raises(ValueError, match=r"chunk 1 \(from 0\) of 3"):
        index.add(["good", " \n", "good too"])
    assert index.chunks == tuple(map(Chunk, TEXTS))


def test_a_failing_embedder_leaves_the_index_as_it_was(index: ChunkIndex) -> None:
    class Failing(WordHashEmbedder):
        def embed(self, texts: Sequence[str], **options: Any) -> NDArray[np.float32]:
            raise RuntimeError("out of memory")

    before = index.search(TEXTS[2])
    working, index.embedder = index.embedder, Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        index.add(["more"])
    index.embedder = working
    assert len(index) == len(TEXTS)
    assert index.search(TEXTS[2]) == before


def test_vectors_of_the_wrong_shape_are_refused(index: ChunkIndex) -> None:
    index.embedder = WordHashEmbedder(dimension=32)
    with pytest.raises(ValueError, match=r"shape \(1, 64\), gave: float32 of shape \(1, 32\)"):
        index.add(["more"])


@pytest.mark.parametrize("k", [0, -1])
def test_fewer_than_one_hit_cannot_be_asked_for(index: ChunkIndex, k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be at least 1, was: {k}"):
        index.search("ships", k=k)


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused(index: ChunkIndex, question: str) -> None:
    with pytest.raises(ValueError, match="a question must have some text"):
        index.search(question)


def test_one_text_in_place_of_several_is_refused(embedder: WordHashEmbedder) -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        ChunkIndex.build("a text", embedder)


def test_the_chunks_cannot_be_changed_from_outside(index: ChunkIndex) -> None:
    with pytest.raises(TypeError):
        index.chunks[0] = Chunk("other")  # type: ignore[index]
    assert index.chunks[0] == Chunk(TEXTS[0])


@pytest.mark.parametrize("sizes", [(200,), (199, 1), (150, 100, 50), (1, 299)])
def test_a_large_index_is_a_graph_that_finds_the_same(
    embedder: WordHashEmbedder, sizes: tuple[int, ...]
) -> None:
    exact, graph = ChunkIndex(embedder), ChunkIndex(embedder, hnsw_from=200)
    start = 0
    for size in sizes:
        part = [words(i) for i in range(start, start + size)]
        exact.add(part)
        graph.add(part)
        start += size
    assert isinstance(graph._vectors, faiss.IndexHNSWFlat)
    assert not isinstance(exact._vectors, faiss.IndexHNSWFlat)
    for i in range(0, start, 7):
        (hit,) = graph.search(words(i), k=1)
        (expected,) = exact.search(words(i), k=1)
        assert hit.score == pytest.approx(expected.score, abs=1e-6)
        assert words(i) == hit.chunk.text


def test_below_its_limit_an_index_is_exact(embedder: WordHashEmbedder) -> None:
    index = ChunkIndex(embedder, hnsw_from=200)
    index.add([words(i) for i in range(199)])
    assert isinstance(index._vectors, faiss.IndexFlatIP)


# Saving and loading


def same(one: ChunkIndex, other: ChunkIndex) -> bool:
    return one.chunks == other.chunks and all(
        one.search(text) == other.search(text) for text in TEXTS
    )


@pytest.mark.parametrize("hnsw_from", [1000, 100], ids=["exact", "graph"])
def test_a_loaded_index_is_the_one_that_was_saved(
    tmp_path: Path, embedder: WordHashEmbedder, hnsw_from: int
) -> None:
    index = ChunkIndex(embedder, hnsw_from=hnsw_from)
    index.add([*TEXTS, *(words(i) for i in range(150))])
    index.add([Chunk("Zeile\u2028zwei \ud800", "d", "T\n", {"n": [1, None, {"x": "ü"}]})])
    index.save(tmp_path / "new" / "index")
    loaded = ChunkIndex.load(str(tmp_path / "new" / "index"), WordHashEmbedder())
    assert same(loaded, index)
    assert type(loaded._vectors) is type(index._vectors)
    loaded.add(["one more chunk"])
    assert found(loaded.search("one more chunk", k=1)) == ["one more chunk"]


def test_an_empty_index_can_be_saved(tmp_path: Path, embedder: WordHashEmbedder) -> None:
    ChunkIndex(embedder).save(tmp_path / "index")
    assert len(ChunkIndex.load(tmp_path / "index", embedder)) == 0


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_only_the_owner_can_enter_the_folder(tmp_path: Path, index: ChunkIndex) -> None:
    folder = tmp_path / "index"
    folder.mkdir(mode=0o755)
    index.save(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_saving_again_replaces_the_old_index_and_leaves_nothing_of_it(
    tmp_path: Path, index: ChunkIndex
) -> None:
    folder = tmp_path / "index"
    index.save(folder)
    index.add(["one more"])
    index.save(folder)
    index.save(folder)
    assert same(ChunkIndex.load(folder, index.embedder), index)
    kinds = sorted(re.sub("-[0-9a-f]{32}", "", path.name) for path in folder.iterdir())
    assert kinds == [".lock", "chunks.jsonl", "index.json", "vectors.faiss"]


def test_nothing_that_is_saved_is_a_pickle(tmp_path: Path, index: ChunkIndex) -> None:
    index.save(tmp_path / "index")
    for path in (tmp_path / "index").glob("[!.]*"):
        assert path.suffix in {".json", ".jsonl", ".faiss"}
        assert not path.read_bytes().startswith(b"\x80")


def test_a_folder_with_other_files_is_refused_and_left_alone(
    tmp_path: Path, index: ChunkIndex
) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds: thesis\.txt; name a new one"):
        index.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert tmp_path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("value", [object(), datetime.date(1931, 5, 1), {1, 2}, b"x"])
def test_metadata_that_is_no_json_is_refused_by_number_before_anything_is_embedded(
    index: ChunkIndex, embedder: WordHashEmbedder, value: object
) -> None:
    embedder.embedded.clear()
    with pytest.raises(TypeError, match=r"chunk 1 \(from 0\).*write dates and the like as text"):
        index.add(["good", Chunk("new", metadata={"when": value})])
    assert (embedder.embedded, len(index)) == ([], len(TEXTS))
    index.add(["good"])


def test_metadata_that_has_become_no_json_is_refused_and_the_old_index_stays(
    tmp_path: Path, index: ChunkIndex
) -> None:
    folder = tmp_path / "index"
    index.save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    metadata: dict[str, object] = {}
    index.add([Chunk("new", metadata=metadata)])
    metadata["when"] = object()
    with pytest.raises(TypeError, match=r"chunk 4 \(from 0\)"):
        index.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


KILLED_WHILE_SAVING = """
import itertools, os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_index import TEXTS, WordHashEmbedder
from sac_rag.retrieval.index import ChunkIndex

def save_and_die_at(steps, folder):
    ChunkIndex.build(TEXTS, WordHashEmbedder()).save(folder)
    index = ChunkIndex.load(folder, WordHashEmbedder())
    index.add(["one more"])

    def count(event, args):
        nonlocal steps
        if event in ("open", "os.rename", "os.remove", "os.chmod") and folder in str(args[0]):
            steps -= 1
            if steps < 0:
                os._exit(9)

    sys.addaudithook(count)
    index.save(folder)

for steps in itertools.count():
    child = os.fork()
    if child == 0:
        save_and_die_at(steps, os.path.join(sys.argv[2], f"index-{steps:03}"))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        break
    if status != 9:
        sys.exit(status)
"""


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_save_killed_at_any_step_leaves_the_old_index_or_the_new(
    tmp_path: Path, embedder: WordHashEmbedder
) -> None:
    here = os.pathsep.join(map(str, Path(__file__).parents[:2]))
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, here, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    old, new = tuple(map(Chunk, TEXTS)), tuple(map(Chunk, [*TEXTS, "one more"]))
    seen = []
    for folder in sorted(tmp_path.iterdir()):
        loaded = ChunkIndex.load(folder, embedder)
        assert found(loaded.search(TEXTS[3], k=1)) == [TEXTS[3]]
        seen.append(loaded.chunks)
        # What a killed save left behind does not hinder the next one, nor outlive it.
        loaded.save(folder)
        assert len(list(folder.glob("[!.]*"))) == 3
    number_of_old = seen.count(old)
    assert seen == [old] * number_of_old + [new] * (len(seen) - number_of_old)
    assert number_of_old >= 5
    assert len(seen) - number_of_old >= 2


# Several writers


def test_changes_build_on_what_others_have_saved(
    tmp_path: Path, embedder: WordHashEmbedder
) -> None:
    folder = tmp_path / "index"
    one, other = ChunkIndex(embedder), ChunkIndex(embedder)
    with one.changing(folder):
        one.add(TEXTS[:2])
    with other.changing(folder):
        other.discard(lambda chunk: chunk.text == TEXTS[0])
        other.add(TEXTS[2:])
    assert ChunkIndex.load(folder, embedder).chunks == tuple(map(Chunk, TEXTS[1:]))
    assert one.chunks == tuple(map(Chunk, TEXTS[:2]))
    one.refresh(folder)
    assert same(one, other)


def test_nothing_is_written_where_nothing_has_changed(tmp_path: Path, index: ChunkIndex) -> None:
    folder = tmp_path / "index"
    index.save(folder)
    before = (folder / "index.json").stat().st_ino
    with index.changing(folder):
        assert index.discard(lambda chunk: False) == 0
    assert (folder / "index.json").stat().st_ino == before


def test_writers_and_readers_of_one_folder_never_meet_half_an_index(
    tmp_path: Path, embedder: WordHashEmbedder
) -> None:
    folder, writers, each = tmp_path / "index", 4, 10
    start = threading.Barrier(writers + 1)

    def write(number: int) -> None:
        index = ChunkIndex(WordHashEmbedder())
        start.wait(60)
        for i in range(number * each, (number + 1) * each):
            with index.changing(folder):
                index.add([words(i)])

    with ThreadPoolExecutor(writers) as pool:
        running = [pool.submit(write, number) for number in range(writers)]
        start.wait(60)
        while not all(writer.done() for writer in running):
            if (folder / "index.json").exists():
                loaded = ChunkIndex.load(folder, embedder)
                assert found(loaded.search(loaded.chunks[-1].text, k=1)) == [loaded.chunks[-1].text]
        for writer in running:
            writer.result()
    saved = ChunkIndex.load(folder, embedder)
    assert {chunk.text for chunk in saved.chunks} == {words(i) for i in range(writers * each)}
    assert len(saved) == writers * each


@pytest.fixture
def saved(tmp_path: Path, index: ChunkIndex) -> Path:
    folder = tmp_path / "index"
    index.save(folder)
    return folder


def change(folder: Path, **fields: Any) -> None:
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**about, **fields}))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "removed"])
@pytest.mark.parametrize("kind", ["vectors-*", "chunks-*"])
def test_a_damaged_file_is_refused_by_its_digest(
    saved: Path, embedder: WordHashEmbedder, kind: str, damage: str
) -> None:
    (path,) = saved.glob(kind)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[:-1], "flipped": data}.get(damage, b""))
    if damage == "removed":
        path.unlink()
    with pytest.raises(ValueError, match=rf"digest of {path.name} must be \w+, was: .*build it"):
        ChunkIndex.load(saved, embedder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"format"'])
def test_a_damaged_table_of_contents_is_refused(
    saved: Path, embedder: WordHashEmbedder, content: str
) -> None:
    (saved / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json must .*build it again"):
        ChunkIndex.load(saved, embedder)


@pytest.mark.parametrize("found", [2, "2", None])
def test_an_index_of_another_format_is_refused_by_name(
    saved: Path, embedder: WordHashEmbedder, found: object
) -> None:
    change(saved, format=found)
    with pytest.raises(ValueError, match=f"the format must be 1, was: {found}; upgrade sac-rag"):
        ChunkIndex.load(saved, embedder)


def test_an_index_of_another_embedder_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="embedder must be word hashes, was: other; load it with"):
        ChunkIndex.load(saved, WordHashEmbedder(identity="other"))


@pytest.mark.parametrize(
    ("field", "value"), [("count", 3), ("count", None), ("dimension", 63), ("embedder", None)]
)
def test_numbers_that_do_not_fit_are_refused(
    saved: Path, embedder: WordHashEmbedder, field: str, value: object
) -> None:
    change(saved, **{field: value})
    with pytest.raises(ValueError, match=r"must be .*, was: "):
        ChunkIndex.load(saved, embedder)


def test_vectors_that_faiss_cannot_read_are_refused(
    saved: Path, embedder: WordHashEmbedder
) -> None:
    (chunks,) = saved.glob("chunks-*")
    digest = chunks.stem.removeprefix("chunks-")
    (saved / f"vectors-{digest}.faiss").write_bytes(chunks.read_bytes())
    change(saved, vectors=digest)
    with pytest.raises(ValueError, match="FAISS cannot read its vectors"):
        ChunkIndex.load(saved, embedder)


def test_a_folder_without_an_index_is_not_found(tmp_path: Path, embedder: WordHashEmbedder) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"must hold index\.json"):
            ChunkIndex.load(folder, embedder)


# The real embedder

FACTS = [
    "Photosynthesis lets plants turn sunlight, water and carbon dioxide into sugar and oxygen.",
    "The French Revolution began in 1789, when a crowd stormed the Bastille prison in Paris.",
    "Mount Everest, on the border of Nepal and China, is the highest mountain above sea level.",
    "Penicillin was discovered by Alexander Fleming, who saw mould kill bacteria in a dish.",
    "The violin has four strings, tuned in perfect fifths, and is played with a bow.",
]
QUESTIONS = [
    "How do leaves make food from light?",
    "When did the uprising against the king of France start?",
    "What is the tallest peak on Earth?",
    "Who found the first antibiotic?",
    "Which instrument's cords are stroked with horsehair?",
]


@pytest.fixture(scope="session")
def minilm() -> Embedder:
    return Embedder.from_pretrained("minilm", device="cpu")


@pytest.mark.real_model
def test_paraphrased_questions_find_their_fact(minilm: Embedder) -> None:
    index = ChunkIndex.build(FACTS, minilm)
    assert [index.search(question, k=1)[0].chunk.text for question in QUESTIONS] == FACTS


@pytest.mark.real_model
def test_vectors_are_unit_and_independent_of_batch_and_order(minilm: Embedder) -> None:
    texts = [*FACTS, "owl", " ".join(FACTS), ""]
    together = minilm.embed(texts)
    assert together.shape == (8, minilm.dimension) == (8, 384)
    assert together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(8), abs=1e-5)
    # Padding changes the order of float32 sums, nothing else.
    alone = np.concatenate([minilm.embed([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(minilm.embed(texts[::-1], batch_size=3), together[::-1], atol=1e-5)


@pytest.mark.real_model
def test_only_the_first_tokens_of_a_text_are_seen(minilm: Embedder) -> None:
    long = "owl " * 254
    vectors = minilm.embed([long, long + "glacier " * 500, "glacier " + long])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-3


@pytest.mark.real_model
def test_embedding_nothing_gives_no_vectors(minilm: Embedder) -> None:
    assert minilm.embed([]).shape == (0, 384)


@pytest.mark.real_model
def test_embedding_reports_every_text_once(minilm: Embedder) -> None:
    steps: list[int] = []
    minilm.embed(FACTS, batch_size=2, on_progress=steps.append)
    assert steps == [2, 2, 1]


@pytest.mark.real_model
def test_wrong_arguments_of_the_embedder_are_refused(minilm: Embedder) -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        minilm.embed("a text")
    with pytest.raises(ValueError, match="batch_size must be at least 1, was: 0"):
        minilm.embed(FACTS, batch_size=0)


@pytest.mark.real_model
@pytest.mark.parametrize("text", ["\ud83d", "caf\udce9", "\ude42 ship"])
def test_half_a_surrogate_pair_is_embedded_as_a_replaced_character(
    minilm: Embedder, text: str
) -> None:
    replaced = re.sub("[\ud800-\udfff]", "\ufffd", text)
    np.testing.assert_array_equal(minilm.embed([text]), minilm.embed([replaced]))
    index = ChunkIndex.build([text, *FACTS], minilm)
    assert index.search(text, k=1)[0].chunk.text == text


@pytest.mark.real_model
def test_threads_can_share_an_embedder(minilm: Embedder) -> None:
    expected = minilm.embed(FACTS)
    results: list[NDArray[np.float32]] = []

    def embed(size: int) -> None:
        results.extend(minilm.embed(FACTS, batch_size=size) for _ in range(5))

    threads = [threading.Thread(target=embed, args=(size,)) for size in (1, 2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.real_model
def test_the_identity_covers_weights_settings_and_tokenizer_but_not_use(minilm: Embedder) -> None:
    before = minilm.identity
    other = Embedder.from_pretrained("minilm", device="cpu")
    other.embed(["used"])
    assert other.identity == before
    assert Embedder(other.model, other.tokenizer, max_tokens=128).identity != before
    last = [*other.model.parameters()][-1]
    last.view(-1)[0] += 1e-3
    assert Embedder(other.model, other.tokenizer).identity != before
    last.copy_([*minilm.model.parameters()][-1])
    assert Embedder(other.model, other.tokenizer).identity == before
    other.tokenizer.add_tokens(["glacier-owl"])
    assert Embedder(other.model, other.tokenizer).identity != before


ANOTHER_PROCESS = """
import json, sys
from sac_rag.retrieval.embedder import Embedder
from sac_rag.retrieval.index import ChunkIndex

index = ChunkIndex.load(sys.argv[1], Embedder.from_pretrained("minilm", device="cpu"))
hits = [index.search(question, k=5) for question in json.loads(sys.argv[2])]
print(json.dumps([[[hit.chunk.text, hit.chunk.id, hit.score] for hit in row] for row in hits]))
"""


@pytest.mark.real_model
def test_another_process_finds_the_same_in_a_saved_index(tmp_path: Path, minilm: Embedder) -> None:
    index = ChunkIndex.build([(str(i), fact) for i, fact in enumerate(FACTS)], minilm)
    index.save(tmp_path / "index")
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS, str(tmp_path / "index"), json.dumps(QUESTIONS)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    for question, row in zip(QUESTIONS, json.loads(done.stdout), strict=True):
        hits = index.search(question, k=5)
        assert [[hit.chunk.text, hit.chunk.id] for hit in hits] == [entry[:2] for entry in row]
        # Another process may use another number of threads, which changes the order of sums.
        assert [hit.score for hit in hits] == pytest.approx([e[2] for e in row], abs=1e-5)


def test_a_folder_that_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an encoder that transformers can load"):
        Embedder.from_pretrained(str(tmp_path))
