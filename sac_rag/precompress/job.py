"""Chunks into a store ahead of any question, and whole jobs that begin with documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeAlias

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.precompress.callback import JobCallback, Step
from sac_rag.precompress.estimate import Estimate, estimate
from sac_rag.precompress.windows import compress_window, windows
from sac_rag.precompress.workers import Workers
from sac_rag.reports import BadRecord, PrecompressReport

Compress: TypeAlias = Callable[[Iterator[list[Chunk]]], Iterator[PrecompressReport]]


def precompress(
    compressor: CachedCompressor,
    chunks: Iterable[ChunkLike],
    *,
    on_progress: Callable[[int], None] | None = None,
    on_bad: Callable[[BadRecord], None] | None = None,
    whole_documents: bool = False,
) -> PrecompressReport:
    """Compresses and stores what the store does not have; see `SacRAG.precompress`."""
    if isinstance(chunks, str):
        raise TypeError("chunks must be several chunks, was: one str; put it in a list")
    started = time.perf_counter()
    total = PrecompressReport()
    for more in increments(
        compressor,
        map(Chunk.of, chunks),
        skip_bad=on_bad is not None,
        whole_documents=whole_documents,
    ):
        total += more
        for record in more.bad:
            on_bad(record)  # type: ignore[misc]  # none is skipped without it
        if on_progress is not None and more.chunks:
            on_progress(more.chunks)
    return total + PrecompressReport(seconds=time.perf_counter() - started)


def increments(
    compressor: CachedCompressor,
    chunks: Iterable[Chunk],
    *,
    skip_bad: bool,
    whole_documents: bool,
    compress: Compress | None = None,
) -> Iterator[PrecompressReport]:
    """Compresses and stores what the store does not have.

    Args:
        compressor: With the store to fill.
        chunks: Read as they are needed.
        skip_bad: Whether to count chunks that cannot be compressed, or raise.
        whole_documents: Whether to delete entries of former versions of documents at the end.
        compress: Compresses windows elsewhere, as `Workers.run` does, into the same store.
            Default: here, one after the other.

    Yields:
        The counts since the last report; they add up.
    """
    reindexing = Reindexing(compressor)
    stream = windows(reindexing.watch(chunks) if whole_documents else chunks)
    if compress is not None:
        yield from compress(stream)
    else:
        for window in stream:
            yield from compress_window(compressor, window, skip_bad=skip_bad)
    yield PrecompressReport(deleted=reindexing.finish())


def compress_documents(
    compressor: CachedCompressor,
    chunks: Iterable[Chunk],
    *,
    workers: int = 1,
    open_compressor: Callable[[], CachedCompressor] | None = None,
) -> Iterator[PrecompressReport]:
    """Compresses chunks of whole documents, here or in worker processes; bad chunks are counted.

    Args:
        compressor: With the store to fill.
        chunks: Read as they are needed.
        workers: Processes that compress side by side, each with a model of its own.
        open_compressor: Opens the compressor and its store in a worker; see `Workers`.

    Yields:
        The counts since the last report; they add up.

    Raises:
        ValueError: for less than one worker, or several without `open_compressor`.
        OSError: if the store cannot be written.
        RuntimeError: if two workers die on the same window.
    """
    if workers == 1:
        yield from increments(compressor, chunks, skip_bad=True, whole_documents=True)
        return
    if open_compressor is None:
        raise ValueError(
            f"{workers} workers need open_compressor, which opens the compressor and its store in "
            "each of them; give one, or use 1 worker"
        )
    with Workers(open_compressor, compressor.fingerprint, workers) as pool:
        yield from increments(
            compressor, chunks, skip_bad=True, whole_documents=True, compress=pool.run
        )


class Reindexing:
    """Watches the chunks of whole documents pass and deletes their documents' other entries.

    Chunks of one document need not be neighbours. In memory are the ids of all documents, and the
    keys of those that have changed.
    """

    def __init__(self, compressor: CachedCompressor) -> None:
        self._compressor = compressor
        self._store = compressor.store
        self._seen: set[str] = set()
        # New keys of each document that has other entries in the store.
        self._changed: dict[str, set[str]] = {}

    def watch(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The same chunks, each noted."""
        document: str | None = None
        keys: set[str] = set()
        for chunk in chunks:
            if chunk.id != document:
                self.note(document, keys)
                document, keys = chunk.id, set()
            if not chunk.is_empty:
                keys.add(self._compressor.key(chunk.text))
            yield chunk
        self.note(document, keys)

    def note(self, document: str | None, keys: set[str]) -> None:
        """Notes chunks of a document by their keys; it may have had others before."""
        if document is None:
            return
        if document in self._changed:
            self._changed[document] |= keys
        elif document not in self._seen:
            stored = self._store.keys_of(self._compressor.document_id(document))
            if not keys.issuperset(stored):
                self._changed[document] = keys
        # A document seen before had nothing to delete: its entries since then are of this run.
        self._seen.add(document)

    def finish(self) -> int:
        """Deletes, once all chunks are stored; a run that is killed before leaves it to the next.

        Returns:
            How many entries were deleted.
        """
        if not self._changed:
            return 0
        named = {self._compressor.document_id(name): keys for name, keys in self._changed.items()}
        deleted = self._store.replace_documents(named)
        self._changed.clear()
        return deleted


class Reader(Protocol):
    """Reads documents, from the first at every call, as `read_documents` does of given paths."""

    def __call__(self, *, on_bad: Callable[[str, str], None]) -> Iterable[Chunk]:
        """The documents; `on_bad` gets the place and the problem of each that is left out."""


class Searchable(Protocol):
    """What makes chunks searchable, as a Collection does."""

    def add(
        self,
        chunks: Iterable[Chunk],
        on_progress: Callable[[int], None] | None = None,
        *,
        whole_documents: bool = False,
    ) -> int:
        """Adds what is new; returns how many."""


@dataclass(frozen=True)
class JobReport:
    """A finished job.

    Attributes:
        documents: Number of documents read.
        indexed: Number of chunks that became searchable; None without an index.
        counts: Of the chunks and their anchors.
        estimate: Made before; None where documents can be read only once.
        bad: Records that could not be read, and chunks that could not be compressed.
    """

    documents: int
    indexed: int | None
    counts: PrecompressReport
    estimate: Estimate | None
    bad: tuple[BadRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, as JSON holds them."""
        counts = self.counts
        return {
            "documents": self.documents,
            "chunks": counts.chunks,
            "indexed": self.indexed,
            "computed": counts.computed,
            "hits": counts.hits,
            "empty": counts.empty,
            "deleted": counts.deleted,
            "source_tokens": counts.source_tokens,
            "anchors": counts.anchors,
            "bytes": counts.nbytes,
            "seconds": counts.seconds,
            "tokens_per_s": counts.source_tokens / counts.seconds,
            "padding": counts.padding,
            "workers_lost": counts.workers_lost,
            "estimate": None if self.estimate is None else asdict(self.estimate),
            "bad": [asdict(record) for record in self.bad],
        }


class PrecompressJob:
    """Documents to stored anchors: estimated, read, split, indexed, compressed.

    What is stored of former versions of the documents is deleted at the end. An interrupted job is
    resumed by running it again.

    >>> job = PrecompressJob(rag.compressor, [Chunk("The keeper counted seven ships.", id="log")])
    >>> job.estimate().chunks, job.run().counts.computed
    (1, 1)

    Args:
        compressor: With the store to fill.
        documents: A Reader, such as `partial(read_documents, ["docs/"])`, or a list of documents:
            texts, (document id, text) pairs or Chunks.
        split: Cuts a document into chunks. Default: every document is a chunk already.
        index: Makes chunks searchable, for which all of them are in memory at once. Default: left
            to a retriever of the user's own, and documents are read as they are needed.
        open_compressor: Opens the compressor and its store in each of several workers; must be
            picklable.
        reads_once: Whether the Reader can be called only once, as for standard input: without an
            index there is then no estimate.
        callback: Follows the job.

    Raises:
        TypeError: for documents that are one text or can be read only once.
    """

    def __init__(
        self,
        compressor: CachedCompressor,
        documents: Reader | Sequence[ChunkLike],
        *,
        split: Callable[[Chunk], Sequence[Chunk]] | None = None,
        index: Searchable | None = None,
        open_compressor: Callable[[], CachedCompressor] | None = None,
        reads_once: bool = False,
        callback: JobCallback | None = None,
    ) -> None:
        self._compressor = compressor
        self._reader = documents if callable(documents) else _reader_of(documents)
        self._split = split
        self._index = index
        self._open_compressor = open_compressor
        self._reads_once = reads_once
        self._callback = callback or JobCallback()
        self._documents = 0
        self._bad: list[BadRecord] = []

    @property
    def documents(self) -> int:
        """Number of documents read so far by the latest call."""
        return self._documents

    @property
    def bad(self) -> tuple[BadRecord, ...]:
        """What the latest call has left out so far."""
        return tuple(self._bad)

    def estimate(self) -> Estimate:
        """Reads all documents and measures one batch; stores nothing."""
        self._restart()
        return self._estimate(self._read("count"), self._chunks_of)

    def run(self, workers: int = 1) -> JobReport:
        """Does the whole job.

        Args:
            workers: Processes that compress side by side, each with a model of its own.

        Raises:
            FileNotFoundError: if a path that the Reader was given is not there.
            ValueError: for less than one worker, or several without `open_compressor`.
            OSError: if the store cannot be written.
            RuntimeError: if two workers die on the same window.
        """
        self._restart()
        if self._index is None:
            return self._run_streamed(workers)
        return self._run_indexed(self._index, workers)

    def _run_indexed(self, index: Searchable, workers: int) -> JobReport:
        """All chunks are in memory, so the documents are read once."""
        chunks = [chunk for d in self._read("read") for chunk in self._chunks_of(d)]
        expected = self._estimate(chunks, lambda chunk: [chunk])
        fitting = [chunk for chunk in chunks if self._fits(chunk)]
        self._callback.on_step("index", len(fitting))
        indexed = index.add(fitting, self._callback.on_progress, whole_documents=True)
        counts = self._sum(self._increments(chunks, workers), expected)
        return JobReport(self._documents, indexed, counts, expected, self.bad)

    def _run_streamed(self, workers: int) -> JobReport:
        """Documents are read twice, and never all in memory."""
        expected = None
        if not self._reads_once:
            # Bad records are reported when they are read again.
            documents = self._read("count", reports_bad=False)
            expected = self._estimate(documents, self._chunks_of)
        self._documents = 0
        chunks = (chunk for document in self._read(None) for chunk in self._chunks_of(document))
        counts = self._sum(self._increments(chunks, workers), expected)
        return JobReport(self._documents, None, counts, expected, self.bad)

    def _restart(self) -> None:
        self._documents = 0
        self._bad.clear()

    def _read(self, step: Step | None, *, reports_bad: bool = True) -> Iterator[Chunk]:
        def on_bad(place: str, problem: str) -> None:
            if reports_bad:
                self._leave_out(BadRecord(place, problem))

        if step is not None:
            self._callback.on_step(step, None)
        for document in self._reader(on_bad=on_bad):
            self._documents += 1
            if step is not None:
                self._callback.on_progress(1)
            yield document

    def _chunks_of(self, document: Chunk) -> Sequence[Chunk]:
        # A document without text is one empty chunk: counted, and its former version deleted.
        return [document] if self._split is None else self._split(document) or [document]

    def _estimate(
        self, documents: Iterable[Chunk], split: Callable[[Chunk], Sequence[Chunk]]
    ) -> Estimate:
        expected = estimate(self._compressor, documents, split)
        self._callback.on_estimate(expected)
        return expected

    def _fits(self, chunk: Chunk) -> bool:
        limit = self._compressor.generator.max_positions
        return not chunk.is_empty and len(self._compressor.tokenize(chunk.text)) <= limit

    def _leave_out(self, record: BadRecord) -> None:
        self._bad.append(record)
        self._callback.on_bad(record)

    def _increments(self, chunks: Iterable[Chunk], workers: int) -> Iterator[PrecompressReport]:
        """Compresses chunks; the counts since the last report."""
        return compress_documents(
            self._compressor, chunks, workers=workers, open_compressor=self._open_compressor
        )

    def _sum(
        self, increments: Iterator[PrecompressReport], expected: Estimate | None
    ) -> PrecompressReport:
        started = time.perf_counter()
        total = PrecompressReport()
        self._callback.on_step("compress", None if expected is None else expected.source_tokens)
        for more in increments:
            total += more
            self._callback.on_compressed(more)
            for record in more.bad:
                self._leave_out(record)
        return total + PrecompressReport(seconds=time.perf_counter() - started)


def _reader_of(documents: Sequence[ChunkLike]) -> Reader:
    """Reads documents that are in memory."""
    if isinstance(documents, str | Iterator):
        raise TypeError(
            "documents must be a Reader or a list, since they are read twice, were: "
            f"{type(documents).__name__}; put them in a list"
        )

    def read(*, on_bad: Callable[[str, str], None]) -> Iterable[Chunk]:
        return map(Chunk.of, documents)

    return read
