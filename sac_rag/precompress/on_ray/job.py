"""RayJob: the precompression of documents on a Ray cluster."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.data
from ray.exceptions import RayError

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.precompress.callback import JobCallback
from sac_rag.precompress.job import JobReport, PrecompressJob, Reindexing, Searchable
from sac_rag.precompress.on_ray.documents import Read, Split, chunks_of, enter, read_here
from sac_rag.precompress.windows import WINDOW, compress_window
from sac_rag.precompress.workers import opened
from sac_rag.reports import PrecompressReport


@contextmanager
def cluster(address: str | None = None) -> Iterator[None]:
    """Connects to a cluster, or starts one on this machine; ends the connection with the block.

    Args:
        address: "auto" or "HOST:PORT". None starts a cluster, without dashboard.

    Raises:
        ConnectionError: if there is no cluster at the address.
    """
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.init(address or "local", **({} if address else {"include_dashboard": False}), **quiet)
    try:
        yield
    finally:
        ray.shutdown()


class RayJob(PrecompressJob):
    """A PrecompressJob that a Ray cluster does: the same entries, documents and report.

    Tasks read and split documents, actors compress them: each holds the model once and writes to
    the store, so that several must be able to write to it, from their machines. What is in the
    store is not computed again. A window of chunks whose actor or machine is lost is done again by
    another one; chunks that are stored by then count as hits. A text of two windows may be
    computed in both; it is one entry.

    >>> job = RayJob(rag.compressor, ray.data.read_parquet("s3://bucket/corpus/"),
    ...              open_compressor=open_compressor)
    >>> job.run(workers=8).counts.computed

    Args:
        compressor: As the actors open it, with the store to fill.
        documents: `read_with_ray`, or any Dataset with a column "text"; "id" and "title" are
            optional. It is read twice where there is an index.
        open_compressor: Opens the compressor and its store in each actor; must be picklable.
        split: Cuts a document into chunks; must be picklable. Default: every document is a chunk.
        index: Makes chunks searchable, for which all of them are in the memory of this process.
        callback: Follows the job. Without an index there is no estimate.
    """

    def __init__(
        self,
        compressor: CachedCompressor,
        documents: ray.data.Dataset,
        *,
        open_compressor: Callable[[], CachedCompressor],
        split: Split | None = None,
        index: Searchable | None = None,
        callback: JobCallback | None = None,
    ) -> None:
        super().__init__(
            compressor,
            partial(read_here, documents),
            split=split,
            index=index,
            open_compressor=open_compressor,
            callback=callback,
        )
        self._dataset = documents

    def _run_streamed(self, workers: int) -> JobReport:
        chunks = self._dataset.flat_map(partial(chunks_of, split=self._split))
        counts = self._sum(self._on_cluster(chunks, workers), None)
        return JobReport(self._documents, None, counts, None, self.bad)

    def _increments(self, chunks: Iterable[Chunk], workers: int) -> Iterator[PrecompressReport]:
        rows = [{"read": Read(chunk)} for chunk in chunks]
        return self._on_cluster(ray.data.from_items(rows), workers) if rows else iter(())

    def _on_cluster(self, chunks: ray.data.Dataset, workers: int) -> Iterator[PrecompressReport]:
        """Compresses the chunks of a Dataset in the windows, and the order, of a local job."""
        if workers < 1:
            raise ValueError(f"there must be at least 1 worker, was: {workers}")
        arguments = (Path.cwd(), self._open_compressor, self._compressor.fingerprint)
        windows = chunks.repartition(target_num_rows_per_block=WINDOW, strict=True).map_batches(
            _Compressing,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=workers),
            **_share(workers),
        )
        windows.context.execution_options.preserve_order = True
        windows.context.enable_progress_bars = False
        windows.context.print_on_execution_start = False
        reindexing = Reindexing(self._compressor)
        try:
            for row in windows.iter_rows():
                window: _Finished = row["finished"]
                if window.failure is not None:
                    raise window.failure
                self._documents += window.documents
                for document, keys in window.keys.items():
                    reindexing.note(document, keys)
                yield window.report
        except RayError as error:
            raise RuntimeError(
                f"the cluster failed: {error}; what was finished is kept, run it again"
            ) from error
        yield PrecompressReport(deleted=reindexing.finish())


@dataclass(frozen=True)
class _Finished:
    """What an actor has done with a window.

    Attributes:
        report: Counts.
        documents: How many documents begin in the window.
        keys: Keys of the chunks of each document.
        failure: Why the store could not be written.
    """

    report: PrecompressReport
    documents: int
    keys: dict[str, set[str]]
    failure: OSError | None


class _Compressing:
    """An actor: opens model and store once, then compresses one window after the other."""

    def __init__(
        self, folder: Path, open_compressor: Callable[[], CachedCompressor], fingerprint: str
    ) -> None:
        enter(folder)
        self._compressor = opened(open_compressor, fingerprint)
        # Reported once, with the first window.
        self._lost = int(ray.get_runtime_context().was_current_actor_reconstructed)

    def __call__(self, window: dict[str, Any]) -> dict[str, list[_Finished]]:
        rows: list[Read] = list(window["read"])
        chunks = [row.chunk for row in rows if row.chunk is not None]
        bad = tuple(record for row in rows for record in row.bad)
        failure = None
        report = PrecompressReport(bad=bad, workers_lost=self._lost)
        self._lost = 0
        try:
            for more in compress_window(self._compressor, chunks, skip_bad=True):
                report += more
        except OSError as error:
            failure = error
        documents = sum(row.documents for row in rows)
        return {"finished": [_Finished(report, documents, self._keys(chunks), failure)]}

    def _keys(self, chunks: Iterable[Chunk]) -> dict[str, set[str]]:
        keys: dict[str, set[str]] = {}
        for chunk in chunks:
            if chunk.id is not None:
                of_document = keys.setdefault(chunk.id, set())
                if not chunk.is_empty:
                    of_document.add(self._compressor.key(chunk.text))
        return keys


def _share(workers: int) -> dict[str, float]:
    """CPUs and GPUs of each actor: an equal share, at most one. Tasks that read keep a CPU."""
    resources = ray.cluster_resources()
    cpus, gpus = max(0.0, resources.get("CPU", 0.0) - 1), resources.get("GPU", 0.0)
    shares = {"num_cpus": cpus / workers, "num_gpus": gpus / workers}
    # Ray counts in ten-thousandths.
    return {name: min(1.0, math.floor(10_000 * share) / 10_000) for name, share in shares.items()}
