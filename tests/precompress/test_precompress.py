"""Chunks ahead of any question: each computed once, none lost, whatever happens on the way."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from support.collection import (
    make_collection,
    opened_and_killed_always,
    opened_and_killed_once,
    opened_on_a_full_disk,
    passages,
)
from support.models import PROSE, make_compressor, passes_of

from sac_rag import SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.collection import open_compressor
from sac_rag.compressors.base import Compressor
from sac_rag.errors import PromptTooLongError
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.precompress.estimate import estimate
from sac_rag.precompress.job import increments, precompress
from sac_rag.precompress.windows import WINDOW, place_of, windows
from sac_rag.precompress.workers import Workers
from sac_rag.reports import BadRecord, PrecompressReport
from sac_rag.stores import AnchorStore, DiskStore

TOO_LONG = "lighthouse " * 4200


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    return make_compressor(llama, "sac").merged()


@pytest.fixture
def cached(sac: Compressor) -> CachedCompressor:
    return CachedCompressor(sac, {})


@pytest.fixture
def on_disk(sac: Compressor, disk: DiskStore) -> CachedCompressor:
    return CachedCompressor(sac, disk)


def many(count: int, start: int = 0) -> list[str]:
    return [f"Passage {i}: {PROSE[i % 8]}" for i in range(start, start + count)]


# --- what is done, and counted


def test_it_counts_what_it_did(cached: CachedCompressor) -> None:
    chunks = [PROSE[0], ("d1", PROSE[1]), Chunk(PROSE[2]), PROSE[0], "", " \n"]
    report = precompress(cached, chunks)
    assert (report.computed, report.hits, report.empty, report.chunks) == (3, 1, 2, 6)
    stored = list(cached.store.values())
    assert report.source_tokens == sum(kv.num_tokens for kv in stored)
    assert report.anchors == sum(kv.num_anchors for kv in stored)
    assert report.nbytes == sum(kv.nbytes for kv in stored)
    assert report.seconds > 0
    again = precompress(cached, [PROSE[2], PROSE[3]])
    assert (again.computed, again.hits, again.empty) == (1, 1, 0)


def test_what_it_stores_is_what_the_compressor_gives(cached: CachedCompressor) -> None:
    precompress(cached, PROSE)
    for text, kv in zip(PROSE, cached.inner.compress(PROSE), strict=True):
        stored = cached.store[cached.key(text)]
        assert stored.num_tokens == kv.num_tokens
        assert (stored.keys - kv.keys).abs().max() < 1e-4


def test_the_facade_does_the_same(cached: CachedCompressor, home: Path) -> None:
    rag, told, bad = SacRAG(cached), [], []
    report = rag.precompress([*PROSE, TOO_LONG], on_progress=told.append, on_bad=bad.append)
    assert (report.computed, report.bad) == (8, tuple(bad))
    assert sum(told) == 9


def test_nothing_to_do_is_no_work(cached: CachedCompressor) -> None:
    with passes_of(cached.generator) as passes:
        report = precompress(cached, [])
        precompress(cached, ["", " "])
    assert (report.chunks, report.padding, passes) == (0, 0.0, [])


def test_progress_is_told_and_adds_up(cached: CachedCompressor) -> None:
    told: list[int] = []
    precompress(cached, [*many(70), "", PROSE[0]], on_progress=told.append)
    assert sum(told) == 72
    assert len(told) > 1


def test_chunks_of_like_length_are_read_together(cached: CachedCompressor) -> None:
    chunks = passages(200)
    with passes_of(cached.generator) as passes:
        report = precompress(cached, chunks)
    lengths = [len(cached.tokenize(chunk.text)) for chunk in chunks]
    sink = len(cached.sink_ids)
    assert sum(passes) == 200
    assert report.source_tokens == sum(lengths)
    assert report.tokens_read >= sum(lengths) + 200 * sink
    # Pads alone: in the order of the corpus they would be half of what is read.
    assert report.tokens_read < 1.1 * (sum(lengths) + 200 * sink)
    assert 0 < report.padding < 0.25
    assert report.tokens_read == cached.tokens_read(lengths)


def test_chunks_are_streamed_and_never_all_in_memory(cached: CachedCompressor) -> None:
    taken = done = most = 0

    def chunks() -> Iterator[str]:
        nonlocal taken
        for text in many(WINDOW + 40):
            taken += 1
            yield text

    def progress(count: int) -> None:
        nonlocal done, most
        most = max(most, taken - done)
        done += count

    precompress(cached, chunks(), on_progress=progress)
    assert taken == done == WINDOW + 40
    assert most <= WINDOW


# --- at other ratios


@pytest.fixture(scope="module")
def nested(llama: Generator) -> Compressor:
    return make_compressor(llama, "shared", ratio=5).merged()


def test_a_lower_ratio_computes_what_is_stored_again_and_a_higher_one_hits(
    nested: Compressor, store: AnchorStore
) -> None:
    at = {ratio: CachedCompressor(nested.at_ratio(ratio), store) for ratio in (2, 5, 15)}
    chunks = [(f"document {i}", text) for i, text in enumerate(PROSE)]
    for ratio, computed in ((5, 8), (15, 0), (2, 8), (2, 0), (5, 0), (15, 0)):
        expected = estimate(at[ratio], map(Chunk.of, chunks), lambda chunk: [chunk])
        assert expected.hits == 8 - computed
        report = precompress(at[ratio], chunks, whole_documents=True)
        assert (report.computed, report.hits, report.deleted) == (computed, 8 - computed, 0)
    for text, kv in zip(PROSE, at[2].inner.compress(PROSE), strict=True):
        assert store[at[2].key(text)].num_entries == kv.num_entries
    if isinstance(store, DiskStore):
        keys = [at[2].key(text) for text in PROSE]
        assert [store.documents(key) for key in keys] == [(name,) for name, _ in chunks]


def test_a_chunk_is_stored_at_its_own_ratio_if_that_is_lower(nested: Compressor) -> None:
    cached = CachedCompressor(nested, {})
    chunks = [Chunk(PROSE[0]), Chunk(PROSE[1], ratio=2), Chunk(PROSE[2], ratio=15)]
    assert precompress(cached, [*chunks, Chunk(PROSE[0], ratio=1)]).computed == 3
    stored = [round(cached.store[cached.key(text)].ratio) for text in PROSE[:3]]
    assert stored == [1, 2, 5]
    again = precompress(
        cached, [Chunk(PROSE[0], ratio=2), Chunk(PROSE[1]), Chunk(PROSE[2], ratio=1)]
    )
    assert (again.computed, again.hits) == (1, 2)
    assert estimate(cached, chunks, lambda chunk: [chunk]).hits == 3


# --- interrupted, and bad


def test_an_interrupted_run_is_resumed_with_the_rest_only(cached: CachedCompressor) -> None:
    class Interrupted(Exception):
        pass

    done = 0

    def interrupt(count: int) -> None:
        nonlocal done
        done += count
        if done >= 64:
            raise Interrupted

    with pytest.raises(Interrupted):
        precompress(cached, many(100), on_progress=interrupt)
    stored = len(cached.store)
    assert done == 64 <= stored  # what was computed by then is written to its end
    report = precompress(cached, many(100))
    assert (report.computed, report.hits) == (100 - stored, stored)


def test_killed_anywhere_and_run_again_it_does_the_rest_and_loses_nothing(tmp_path: Path) -> None:
    folder, count = make_collection(tmp_path / "collection"), 300
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "collection.py")]
    stored = 0
    for lines in (30, 110):
        with subprocess.Popen(
            [*command, str(folder), str(count), "0"], stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None
            for _ in range(lines):
                assert running.stdout.readline() == "stored\n"
            running.kill()
            acknowledged = lines + len(running.stdout.read().split())
        with DiskStore(folder / "anchors") as store:
            # What was said to be stored is stored; so may be some of what was computed with it.
            assert 0 <= len(store) - stored - acknowledged < 100
            stored = len(store)
    report = precompress(open_compressor(folder), passages(count))
    assert (report.computed, report.hits) == (count - stored, stored)
    with DiskStore(folder / "anchors") as store:
        assert len(store) == count
        assert store.check(fix=True) == [] or store.check() == []


def test_a_chunk_longer_than_the_context_is_reported_and_the_others_compressed(
    cached: CachedCompressor,
) -> None:
    long = Chunk(TOO_LONG, id="ships.md", metadata={"part": 2})
    bad: list[BadRecord] = []
    report = precompress(cached, [*PROSE[:3], long, *PROSE[3:], TOO_LONG], on_bad=bad.append)
    assert (report.computed, report.hits, report.chunks) == (8, 0, 10)
    assert [record.place for record in bad] == [
        "ships.md, part 2",
        "a chunk of 46,200 characters without id",
    ]
    assert "at most 8192 tokens" in bad[0].problem
    assert report.bad == tuple(bad)


def test_chunks_before_one_that_is_too_long_are_stored_and_it_is_raised(
    cached: CachedCompressor,
) -> None:
    with pytest.raises(PromptTooLongError, match="8192 tokens"):
        precompress(cached, [*PROSE[:3], TOO_LONG, *PROSE[3:]])
    assert [text in cached for text in PROSE[:4]] == [True, True, True, False]


def test_a_full_disk_ends_it_with_what_to_do(sac: Compressor) -> None:
    class Full(dict[str, AnchorKV]):
        def __setitem__(self, key: str, kv: AnchorKV) -> None:
            if len(self) == 40:
                raise OSError(errno.ENOSPC, "no space left on device")
            super().__setitem__(key, kv)

    store = Full()
    with pytest.raises(OSError, match=r"no space left .* free some space .* then run it again"):
        precompress(CachedCompressor(sac, store), many(100))
    assert len(store) == 40


def test_a_store_that_is_only_read_is_refused_unless_all_is_there(
    sac: Compressor, on_disk: CachedCompressor, disk: DiskStore
) -> None:
    precompress(on_disk, [("a", PROSE[0])])
    with DiskStore(disk.folder, read_only=True) as store:
        reading = CachedCompressor(sac, store)
        assert precompress(reading, [("a", PROSE[0])]).hits == 1
        with pytest.raises(OSError, match="read-only; open it to be written"):
            precompress(reading, [PROSE[1]])


def test_a_damaged_entry_of_another_document_is_computed_anew(
    on_disk: CachedCompressor, disk: DiskStore
) -> None:
    """Precompressing mends; what it finds must not end the run."""
    precompress(on_disk, [("a", PROSE[0])])
    (file,) = disk.folder.glob("entries/*/*.kv")
    file.write_bytes(file.read_bytes()[:-1])
    precompress(on_disk, [("b", PROSE[0]), PROSE[1]])
    assert on_disk.fetch(PROSE[:2]).misses == [None, None]
    assert "b" in disk.documents(on_disk.key(PROSE[0]))


@pytest.mark.parametrize("name", ["compressor", "facade"])
def test_one_text_in_place_of_several_is_refused(
    cached: CachedCompressor, home: Path, name: str
) -> None:
    run_it = partial(precompress, cached) if name == "compressor" else SacRAG(cached).precompress
    with pytest.raises(TypeError, match="must be several chunks, was: one str; put it in a list"):
        run_it("The red lighthouse")
    assert len(cached.store) == 0


def test_a_place_holds_nothing_of_a_text() -> None:
    for chunk in (Chunk("secret words"), Chunk("secret words", id="a"), Chunk("x" * 5, id="")):
        assert "secret" not in place_of(chunk)
    assert place_of(Chunk("secret words")) == "a chunk of 12 characters without id"


# --- documents


def test_documents_are_noted(on_disk: CachedCompressor, disk: DiskStore) -> None:
    precompress(on_disk, [("a", PROSE[0]), Chunk(PROSE[1], id="b"), PROSE[2]])
    precompress(on_disk, [("c", PROSE[0]), PROSE[1]])
    keys = [on_disk.key(text) for text in PROSE[:3]]
    assert [disk.documents(key) for key in keys] == [("a", "c"), ("b",), ()]


def test_documents_of_one_text_in_one_run_are_all_noted(
    on_disk: CachedCompressor, disk: DiskStore
) -> None:
    chunks = [("a", PROSE[0]), ("b", PROSE[0]), PROSE[1], ("c", PROSE[1])]
    report = precompress(on_disk, chunks)
    assert (report.computed, report.hits) == (2, 2)
    assert disk.documents(on_disk.key(PROSE[0])) == ("a", "b")
    assert disk.documents(on_disk.key(PROSE[1])) == ("c",)


def test_entries_of_a_documents_former_version_go_and_shared_texts_stay(
    on_disk: CachedCompressor,
) -> None:
    before = [("a", PROSE[0]), ("a", PROSE[1]), ("b", PROSE[1]), ("b", PROSE[2]), PROSE[3]]
    precompress(on_disk, before, whole_documents=True)
    report = precompress(on_disk, [("a", PROSE[0]), ("a", PROSE[4])], whole_documents=True)
    assert (report.computed, report.hits, report.deleted) == (1, 1, 0)  # b has PROSE[1] still
    assert [text in on_disk for text in PROSE[:5]] == [True] * 5
    assert precompress(on_disk, [("b", " ")], whole_documents=True).deleted == 2
    assert [text in on_disk for text in PROSE[:5]] == [True, False, False, True, True]


def test_documents_are_not_taken_for_whole_unless_it_is_said(on_disk: CachedCompressor) -> None:
    precompress(on_disk, [("a", PROSE[0])])
    assert precompress(on_disk, [("a", PROSE[1])]).deleted == 0
    assert PROSE[0] in on_disk


def test_a_document_whose_chunks_come_apart_is_one_document(on_disk: CachedCompressor) -> None:
    apart = [("a", PROSE[0]), ("b", PROSE[1]), ("a", PROSE[2]), PROSE[3], ("a", PROSE[4])]
    for _ in range(2):
        assert precompress(on_disk, apart, whole_documents=True).deleted == 0
        assert all(text in on_disk for text in PROSE[:5])
    changed = [("a", PROSE[0]), ("b", PROSE[1]), ("a", PROSE[5])]
    assert precompress(on_disk, changed, whole_documents=True).deleted == 2
    assert [text in on_disk for text in PROSE[:6]] == [True, True, False, True, False, True]


def test_former_versions_stay_until_the_new_ones_are_stored(on_disk: CachedCompressor) -> None:
    precompress(on_disk, [("a", PROSE[0])], whole_documents=True)
    with pytest.raises(PromptTooLongError):
        precompress(on_disk, [("a", PROSE[1]), ("z", TOO_LONG)], whole_documents=True)
    assert PROSE[0] in on_disk
    assert precompress(on_disk, [("a", PROSE[1])], whole_documents=True).deleted == 1


def test_a_namespaces_documents_are_its_own(sac: Compressor, disk: DiskStore) -> None:
    one, other = (CachedCompressor(sac, disk, namespace=name) for name in ("one", "other"))
    for each in (one, other):
        precompress(each, [("a", PROSE[0])], whole_documents=True)
    assert precompress(one, [("a", PROSE[1])], whole_documents=True).deleted == 1
    assert [PROSE[0] in each for each in (one, other)] == [False, True]


def test_a_store_that_knows_no_documents_keeps_everything(
    store: AnchorStore, sac: Compressor
) -> None:
    cached = CachedCompressor(sac, store)
    precompress(cached, [("a", PROSE[0])], whole_documents=True)
    report = precompress(cached, [("a", PROSE[1])], whole_documents=True)
    assert report.deleted == (1 if cached.store.remembers_documents else 0)


# --- several processes


def run(
    folder: Path,
    open_in_worker: Callable[[], CachedCompressor],
    chunks: Sequence[Chunk],
    count: int,
) -> PrecompressReport:
    """Precompresses in workers, small windows, and sums up."""
    done, compressor = PrecompressReport(), open_compressor(folder)
    with Workers(open_in_worker, compressor.fingerprint, count) as workers:
        for more in increments(
            compressor,
            chunks,
            skip_bad=True,
            whole_documents=True,
            compress=lambda stream: workers.run(
                small for window in stream for small in windows(window, 16)
            ),
        ):
            done += more
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_collection(tmp_path / "collection")


def is_left_of(group: int) -> bool:
    """Whether processes of a group are still there when they have had two minutes to go."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def contents(folder: Path) -> int:
    with DiskStore(folder / "anchors") as store:
        assert store.check() == []
        return len(store)


@pytest.mark.slow
def test_workers_fill_one_store_and_one_that_is_killed_is_replaced(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Without ids: a log names a chunk by its document, and never by its text.
    texts = [Chunk(chunk.text) for chunk in passages(60)]
    chunks = [*texts, Chunk(""), Chunk(TOO_LONG, id="long"), texts[0]]
    with caplog.at_level(logging.WARNING):
        done = run(folder, partial(opened_and_killed_once, folder, 20), chunks, 2)
    assert done.workers_lost == 1
    assert "killed by SIGKILL" in caplog.text
    assert "characters without id is done again" in caplog.text
    assert not any(word in caplog.text for word in ("Passage", "Owls"))
    assert [record.place for record in done.bad] == ["long"]
    assert done.chunks == len(chunks)
    assert (done.empty, done.computed + done.hits) == (1, 61)
    # What the killed worker had stored and not yet told is a hit; the text that comes twice may be
    # at two workers at once.
    assert 60 - 16 <= done.computed <= 61
    assert contents(folder) == 60
    again = run(folder, partial(open_compressor, folder), chunks, 1)
    assert (again.computed, again.hits, again.workers_lost) == (0, 61, 0)


@pytest.mark.slow
def test_a_window_that_kills_two_workers_ends_the_run_and_what_was_done_is_kept(
    folder: Path,
) -> None:
    with pytest.raises(RuntimeError, match=r"second worker ended \(killed by SIGKILL\).* from d0"):
        run(folder, partial(opened_and_killed_always, folder, 3), passages(16), 1)
    with DiskStore(folder / "anchors") as store:
        assert len(store) == 6


@pytest.mark.slow
def test_a_workers_full_disk_ends_the_run_with_what_to_do(folder: Path) -> None:
    with pytest.raises(OSError, match=r"no space left on device; free some space"):
        run(folder, partial(opened_on_a_full_disk, folder, 3), passages(16), 1)


@pytest.mark.slow
def test_a_worker_that_opens_another_compressor_stops_the_run(folder: Path) -> None:
    with (
        Workers(partial(open_compressor, folder), "0123456789ab", 1) as workers,
        pytest.raises(RuntimeError, match=r"must open the compressor 0123456789ab, opened: "),
    ):
        list(workers.run(windows(passages(2))))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send to a process")
def test_ctrl_c_ends_all_workers_and_what_was_done_is_kept(folder: Path) -> None:
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "collection.py")]
    with subprocess.Popen(
        [*command, str(folder), "2000", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        for _ in range(5):
            assert running.stdout.readline() == "stored\n"
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all of them
        told, complaint = running.communicate(timeout=120)
    assert complaint.count("Traceback") == 1, complaint  # main, which the command line catches
    assert complaint.rstrip().endswith("KeyboardInterrupt")
    assert not is_left_of(running.pid)
    with DiskStore(folder / "anchors") as store:
        store.check(fix=True)
        assert 5 + len(told.split()) <= len(store) < 2000


def test_less_than_one_worker_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 worker, was: 0"):
        Workers(partial(open_compressor, Path()), "ab", 0)


# --- before it is done


def test_an_estimate_counts_what_a_run_then_does_and_stores_nothing(
    on_disk: CachedCompressor,
) -> None:
    precompress(on_disk, many(4))
    chunks = [Chunk(text) for text in [*many(40), many(1)[0], "", TOO_LONG]]
    expected = estimate(on_disk, chunks, lambda chunk: [chunk])
    assert len(on_disk.store) == 4
    assert (expected.chunks, expected.hits, expected.empty, expected.bad) == (43, 5, 1, 1)
    assert expected.counted == 1
    assert expected.seconds == pytest.approx(expected.source_tokens / expected.tokens_per_s)
    done = precompress(on_disk, chunks, on_bad=lambda record: None)
    assert (done.hits, done.empty, len(done.bad)) == (5, 1, 1)
    assert done.source_tokens == expected.source_tokens
    assert done.nbytes == pytest.approx(expected.nbytes, rel=0.1)
    nothing = estimate(on_disk, chunks, lambda chunk: [chunk])
    assert (nothing.source_tokens, nothing.seconds, nothing.tokens_per_s) == (0, 0.0, None)


def test_a_large_corpus_is_estimated_from_a_part_that_is_told(cached: CachedCompressor) -> None:
    documents = [Chunk(text) for text in many(400)]
    cut = [chunk.text for chunk in documents]
    seen: list[str] = []

    def split(document: Chunk) -> list[Chunk]:
        seen.append(document.text)
        return [document]

    expected = estimate(cached, documents, split, counted_characters=len("".join(cut[:40])))
    assert 0.1 < expected.counted < 0.2
    assert 60 <= len(seen) <= 64
    assert expected.chunks == pytest.approx(400, rel=0.05)
    whole = sum(len(cached.tokenize(text)) for text in cut)
    assert expected.source_tokens == pytest.approx(whole, rel=0.05)
