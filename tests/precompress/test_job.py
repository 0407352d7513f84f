"""A whole job: documents estimated, split, indexed and compressed, whoever starts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from support.models import PROSE, make_compressor

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator
from sac_rag.precompress.callback import JobCallback, Step
from sac_rag.precompress.estimate import Estimate, shortages
from sac_rag.precompress.job import PrecompressJob
from sac_rag.reports import BadRecord, PrecompressReport
from sac_rag.stores import DiskStore, MemoryStore

TOO_LONG = Chunk("lighthouse " * 4200, id="long")
DOCUMENTS = [
    Chunk(f"{PROSE[0]}\n{PROSE[1]}", id="a"),
    Chunk(PROSE[2], id="b"),
    Chunk(" ", id="empty"),
    TOO_LONG,
]


@pytest.fixture(scope="module")
def full(llama: Generator) -> Compressor:
    return make_compressor(llama, "full")


@pytest.fixture
def on_disk(full: Compressor, disk: DiskStore) -> CachedCompressor:
    return CachedCompressor(full, disk)


def lines(document: Chunk) -> list[Chunk]:
    return [Chunk(line, id=document.id) for line in document.text.splitlines() if line.strip()]


class Log(JobCallback):
    """Records everything a job calls."""

    def __init__(self) -> None:
        self.steps: list[tuple[Step, int | None]] = []
        self.progress: list[int] = []
        self.estimates: list[Estimate] = []
        self.bad: list[BadRecord] = []
        self.counts = PrecompressReport()

    def on_step(self, step: Step, total: int | None) -> None:
        self.steps.append((step, total))

    def on_progress(self, count: int) -> None:
        self.progress.append(count)

    def on_compressed(self, report: PrecompressReport) -> None:
        self.counts += report

    def on_estimate(self, expected: Estimate) -> None:
        self.estimates.append(expected)

    def on_bad(self, record: BadRecord) -> None:
        self.bad.append(record)


class Shelf:
    """What is searchable, in a list."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def add(
        self,
        chunks: Iterable[Chunk],
        on_progress: Callable[[int], None] | None = None,
        *,
        whole_documents: bool = False,
    ) -> int:
        assert whole_documents
        self.chunks += chunks
        return len(self.chunks)


def test_a_dry_run_stores_nothing_and_predicts_the_run(on_disk: CachedCompressor) -> None:
    job = PrecompressJob(on_disk, DOCUMENTS, split=lines)
    expected = job.estimate()
    assert (len(on_disk.store), job.documents) == (0, 4)
    assert (expected.chunks, expected.empty, expected.bad) == (5, 1, 1)
    report = job.run()
    assert (report.documents, report.indexed) == (4, None)
    assert report.estimate is not None
    assert report.estimate.nbytes == expected.nbytes
    assert report.counts.source_tokens == expected.source_tokens
    assert (report.counts.computed, report.counts.empty) == (3, 1)
    assert [record.place for record in report.bad] == ["long"]
    assert report.to_dict()["bad"][0]["place"] == "long"


def test_former_versions_go_when_the_new_ones_are_stored(on_disk: CachedCompressor) -> None:
    PrecompressJob(on_disk, DOCUMENTS[:2], split=lines).run()
    report = PrecompressJob(on_disk, [Chunk(PROSE[1], id="a")], split=lines).run()
    assert (report.counts.hits, report.counts.deleted) == (1, 1)
    assert [text in on_disk for text in PROSE[:3]] == [False, True, True]


def test_an_index_gets_what_can_be_compressed(on_disk: CachedCompressor) -> None:
    shelf = Shelf()
    report = PrecompressJob(on_disk, DOCUMENTS, split=lines, index=shelf).run()
    assert [chunk.text for chunk in shelf.chunks] == list(PROSE[:3])
    assert (report.indexed, report.documents) == (3, 4)
    assert (report.counts.computed, len(report.bad)) == (3, 1)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_callback_follows_every_step(on_disk: CachedCompressor, indexed: bool) -> None:
    log = Log()
    report = PrecompressJob(
        on_disk, DOCUMENTS, split=lines, index=Shelf() if indexed else None, callback=log
    ).run()
    first = [("read", None), ("index", 3)] if indexed else [("count", None)]
    assert log.steps == [*first, ("compress", report.counts.source_tokens)]
    assert sum(log.progress) == 4
    assert log.estimates == [report.estimate]
    assert tuple(log.bad) == report.bad
    assert log.counts.chunks == report.counts.chunks == 5


def test_what_cannot_be_read_is_reported_once(on_disk: CachedCompressor) -> None:
    def read(*, on_bad: Callable[[str, str], None]) -> Iterable[Chunk]:
        on_bad("x.jsonl:2", "no text")
        yield DOCUMENTS[1]

    report = PrecompressJob(on_disk, read).run()
    assert report.bad == (BadRecord("x.jsonl:2", "no text"),)
    assert report.counts.computed == 1


def test_what_can_be_read_once_has_no_estimate(on_disk: CachedCompressor) -> None:
    stream = iter(DOCUMENTS[:2])
    job = PrecompressJob(on_disk, lambda *, on_bad: stream, reads_once=True)
    report = job.run()
    assert (report.estimate, report.counts.computed) == (None, 2)


def test_documents_that_are_gone_after_one_reading_are_refused(on_disk: CachedCompressor) -> None:
    for documents in (iter(DOCUMENTS), "one text"):
        with pytest.raises(TypeError, match="put them in a list"):
            PrecompressJob(on_disk, documents)  # type: ignore[arg-type]


def test_workers_must_know_what_to_open(on_disk: CachedCompressor) -> None:
    with pytest.raises(ValueError, match="2 workers need open_compressor"):
        PrecompressJob(on_disk, DOCUMENTS).run(workers=2)


def test_too_little_room_is_a_sentence_about_the_store(tmp_path: Path) -> None:
    expected = Estimate(1, 0, 0, 0, 100, 2**20, 1.0, 100.0, 1.0)
    (line,) = shortages(expected, MemoryStore(1000), tmp_path / "later")
    assert "the store may grow by only 1,000 bytes more, the anchors will take 1,048,576" in line
    assert shortages(expected, {}, tmp_path) == []
