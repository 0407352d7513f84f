"""precompress: documents to chunks and anchors, as a job. Knows nothing of how it is done."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sac_rag.cli.console import AsJson, Store, open_collection, progress, pull_missing
from sac_rag.cli.job import job_progress
from sac_rag.cli.render import notes, out, print_estimate, print_json, print_precompressed

if TYPE_CHECKING:
    from sac_rag.chunk import Chunk
    from sac_rag.collection import Collection
    from sac_rag.precompress.estimate import Estimate
    from sac_rag.reports import BadRecord, PrecompressReport

# Done, but not with everything: scripts may go on, and somebody has to look.
_SOME_WERE_BAD = 3


class Stored(str, Enum):
    """What anchors are kept in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


def precompress(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="txt, md, jsonl, json and parquet files, exports of LangChain and LlamaIndex, "
            "folders, - for stdin"
        ),
    ],
    store: Store,
    model: Annotated[
        str | None, typer.Option(help="Default model, local folder or hub id.")
    ] = None,
    compressor: Annotated[
        str | None, typer.Option(help="'shipped', 'fitted', 'full' or the folder of a compressor.")
    ] = None,
    ratio: Annotated[int | None, typer.Option(min=1, help="Source tokens per anchor.")] = None,
    stored_dtype: Annotated[
        Stored | None,
        typer.Option(help="What anchors are kept in; int8 takes half. Default: the compressor's."),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest chunk, in tokens. Default: 256.")
    ] = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Every text is a chunk already: do not cut it.")
    ] = False,
    index: Annotated[
        bool,
        typer.Option(
            help="Make the chunks searchable. With --no-index only anchors are kept, for a "
            "retriever of your own, and the documents are never all in memory."
        ),
    ] = True,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; each loads the model, and they share the cores.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and store nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Cuts documents into chunks, makes them searchable and caches their anchors.

    Interrupted, it is to be run again, and does only the rest. What is stored of former versions of
    a document is deleted; documents that are no longer given stay.

    Exit codes: 0 all is done; 3 all is done but for bad records, which are reported with their
    places; 1 it failed; 130 it was interrupted.
    """
    pull_missing()
    given: dict[str, Any] = {
        "model": model,
        "compressor": compressor,
        "ratio": ratio,
        "stored_dtype": stored_dtype.value if stored_dtype else None,
        "chunk_tokens": chunk_tokens,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    with _collection(store, dry_run, **settings) as collection:
        job = _Job(collection, store, paths, as_is, shown=not as_json)
        if dry_run:
            summary = job.estimate()
        elif index:
            summary = job.fill(workers)
        else:
            summary = job.cache(workers)
    if as_json:
        print_json({**summary, "bad": [asdict(record) for record in job.bad]})
    elif not dry_run and index:
        out.print(f'Ask: sac-rag ask "…" --store {store}', style="dim", markup=False)
    if job.bad:
        raise typer.Exit(_SOME_WERE_BAD)


@contextmanager
def _collection(folder: Path, dry_run: bool, **settings: Any) -> Iterator[Collection]:
    """The collection in a folder; for a dry run, one that leaves no trace where there is none."""
    if dry_run and (not folder.exists() or not any(folder.iterdir())):
        with tempfile.TemporaryDirectory() as elsewhere:
            yield open_collection(Path(elsewhere) / folder.name, **settings)
    else:
        yield open_collection(folder, **settings)


@dataclass
class _Job:
    """What one call of the command reads, and into what.

    Attributes:
        folder: Where the collection is, or would be if this were no dry run.
        bad: What was left out so far.
        documents: How many were read.
    """

    collection: Collection
    folder: Path
    paths: list[str]
    as_is: bool
    shown: bool
    bad: list[BadRecord] = field(default_factory=list)
    documents: int = 0

    def estimate(self) -> dict[str, Any]:
        """Reads everything and stores nothing."""
        with progress("counting", show=self.shown) as advance:
            expected = self.collection.estimate(self._read(advance), self._cut)
        self._announce(expected)
        return {"documents": self.documents, "estimate": asdict(expected)}

    def fill(self, workers: int) -> dict[str, Any]:
        """Makes everything searchable, which takes all chunks in memory, and caches the anchors."""
        with progress("reading documents", show=self.shown) as advance:
            chunks = [chunk for document in self._read(advance) for chunk in self._cut(document)]
        expected = self.collection.estimate(chunks, lambda chunk: [chunk])
        self._announce(expected)
        fitting = [chunk for chunk in chunks if self._fits(chunk)]
        with progress("embedding", total=len(fitting), show=self.shown) as advance:
            added = self.collection.add(fitting, advance, whole_documents=True)
        done = self._compress(iter(chunks), expected, workers)
        return self._summary(done, expected, indexed=added)

    def cache(self, workers: int) -> dict[str, Any]:
        """Caches the anchors, reading the documents as they are needed."""
        expected = None
        if "-" in self.paths:
            notes.print("Standard input can be read only once: there is no estimate of it.")
        else:
            with progress("counting", show=self.shown) as advance:
                documents = self._read(advance, report=False)
                expected = self.collection.estimate(documents, self._cut)
            self._announce(expected)
        chunks = (chunk for document in self._read() for chunk in self._cut(document))
        return self._summary(self._compress(chunks, expected, workers), expected)

    def _read(self, advance: Any = None, report: bool = True) -> Iterator[Chunk]:
        from sac_rag.reports import BadRecord
        from sac_rag.retrieval.readers import read_documents

        def on_bad(place: str, problem: str) -> None:
            if report:
                self._skipped(BadRecord(place, problem))

        self.documents = 0
        for document in read_documents(self.paths, on_bad=on_bad):
            self.documents += 1
            if advance is not None:
                advance(1)
            yield document

    def _cut(self, document: Chunk) -> list[Chunk]:
        # A document without text is one empty chunk: counted, and its former version deleted.
        return [document] if self.as_is else self.collection.split([document]) or [document]

    def _fits(self, chunk: Chunk) -> bool:
        compressor = self.collection.rag.compressor.compressor
        limit = compressor.generator.max_positions
        return not chunk.is_empty and len(compressor.tokenize(chunk.text)) <= limit

    def _skipped(self, record: BadRecord) -> None:
        self.bad.append(record)
        notes.print(f"skipped {record.place}: {record.problem}", style="yellow", markup=False)

    def _announce(self, expected: Estimate) -> None:
        store = self.collection.rag.compressor.store
        if self.shown:
            print_estimate(expected, self.folder)
        room = getattr(store, "max_bytes", sys.maxsize) - getattr(store, "nbytes", 0)
        there = next(
            path for path in (self.folder, *self.folder.absolute().parents) if path.exists()
        )
        free = shutil.disk_usage(there).free
        for what, left in (("the store may grow by", room), ("the disk has", free)):
            if expected.nbytes > left:
                notes.print(
                    f"{what} only {left:,} bytes more, the anchors will take {expected.nbytes:,}: "
                    "the least recently used will be dropped, or the run fail",
                    style="yellow",
                )

    def _compress(
        self, chunks: Iterator[Chunk], expected: Estimate | None, workers: int
    ) -> PrecompressReport:
        from sac_rag.reports import PrecompressReport

        started = time.perf_counter()
        done = PrecompressReport()
        total = expected.source_tokens if expected is not None else None
        with job_progress(total, show=self.shown) as advance:
            for more in self.collection.precompress(chunks, workers=workers):
                done += more
                advance(more)
                for record in more.bad:
                    self._skipped(record)
        return done + PrecompressReport(seconds=time.perf_counter() - started)

    def _summary(
        self, done: PrecompressReport, expected: Estimate | None, indexed: int | None = None
    ) -> dict[str, Any]:
        if self.shown:
            print_precompressed(done, indexed)
        return {
            "documents": self.documents,
            "chunks": done.chunks,
            "indexed": indexed,
            "computed": done.computed,
            "hits": done.hits,
            "empty": done.empty,
            "deleted": done.deleted,
            "source_tokens": done.source_tokens,
            "anchors": done.anchors,
            "bytes": done.nbytes,
            "seconds": done.seconds,
            "tokens_per_s": done.source_tokens / done.seconds,
            "padding": done.padding,
            "workers_lost": done.workers_lost,
            "estimate": None if expected is None else asdict(expected),
        }
