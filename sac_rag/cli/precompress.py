"""precompress: documents to searchable chunks and cached anchors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sac_rag.cli.console import loading, open_collection
from sac_rag.cli.options import (
    AsJson,
    CompressorOrDefault,
    ModelOrDefault,
    RatioOrDefault,
    Store,
)
from sac_rag.cli.progress import JobDisplay
from sac_rag.cli.render import notes, out, print_json, print_precompressed, write

if TYPE_CHECKING:
    from sac_rag.collection import Collection
    from sac_rag.precompress.job import PrecompressJob

# Finished except for bad records: scripts may continue, and somebody has to look.
_SOME_WERE_BAD = 3


class Stored(str, Enum):
    """Dtypes that anchors are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


class Engine(str, Enum):
    """What the workers are."""

    local = "local"
    ray = "ray"


def precompress(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="txt, md, jsonl, json and parquet files, exports of LangChain and LlamaIndex, "
            "folders, - for stdin"
        ),
    ],
    store: Store,
    model: ModelOrDefault = None,
    compressor: CompressorOrDefault = None,
    ratio: RatioOrDefault = None,
    stored_dtype: Annotated[
        Stored | None,
        typer.Option(help="Dtype of stored anchors; int8 takes half. Default: the compressor's."),
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
    engine: Annotated[
        Engine,
        typer.Option(help="Processes of this machine, or actors of a Ray cluster (extra ray)."),
    ] = Engine.local,
    address: Annotated[
        str | None,
        typer.Option(help="The Ray cluster: auto or HOST:PORT. Default: one on this machine."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the estimate, and store nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Cuts documents into chunks, makes them searchable and caches their anchors.

    An interrupted run is resumed by running it again. Entries of former versions of a document are
    deleted; documents that are no longer among the paths stay.

    Exit codes: 0 finished; 3 finished except for bad records, which are reported with their places;
    1 failed, or no document could be read; 130 interrupted.
    """
    from sac_rag.retrieval.readers.files import left_out, read_documents

    read_documents(paths)  # raises before anything is loaded or made
    if address is not None and engine is not Engine.ray:
        raise ValueError("--address is that of a Ray cluster: give --engine ray too")
    others = left_out(paths)
    if others:
        listed = ", ".join(f"{count} {ending}" for ending, count in others.items())
        notes.print(f"left out of folders, not read: {listed}", style="yellow")
    options: dict[str, Any] = {
        "model": model,
        "compressor": compressor,
        "ratio": ratio,
        "stored_dtype": stored_dtype.value if stored_dtype else None,
        "chunk_tokens": chunk_tokens,
    }
    settings = {name: value for name, value in options.items() if value is not None}
    with _collection(store, dry_run, searchable=index, **settings) as collection:
        cached = collection.rag.compressor
        if "-" in paths and not index and not dry_run:
            notes.print("Standard input can be read only once: there is no estimate of it.")
        with ExitStack() as stack:
            display = stack.enter_context(JobDisplay(store, cached.store, show=not as_json))
            asked = {
                "split": None if as_is else collection.splitting(),
                "index": collection if index else None,
                "callback": display,
            }
            if engine is Engine.ray and not dry_run:
                job = stack.enter_context(_ray_job(collection, paths, address, **asked))
            else:
                job = _local_job(collection, paths, **asked)
            estimate = job.estimate() if dry_run else None
            report = None if dry_run else job.run(workers)
    if report is not None:
        result = {**report.to_dict(), "left_out": others}
        write(result, partial(print_precompressed, report), as_json=as_json)
    elif as_json and estimate is not None:
        bad = [asdict(record) for record in job.bad]
        result = {"documents": job.documents, "estimate": asdict(estimate), "bad": bad}
        print_json({**result, "left_out": others})
    if not job.documents:
        raise ValueError(f"no document was read: there is none in {', '.join(paths)} that can be")
    if report is not None and index and not as_json:
        out.print(f'Ask: sac-rag ask "…" --store {store}', style="dim")
    if job.bad:
        raise typer.Exit(_SOME_WERE_BAD)


def _local_job(collection: Collection, paths: list[str], **options: Any) -> PrecompressJob:
    with loading():
        from sac_rag.collection import open_compressor
        from sac_rag.precompress.job import PrecompressJob
        from sac_rag.retrieval.readers.files import read_documents

    return PrecompressJob(
        collection.rag.compressor,
        partial(read_documents, paths),
        open_compressor=partial(open_compressor, collection.folder),
        reads_once="-" in paths,
        **options,
    )


@contextmanager
def _ray_job(
    collection: Collection, paths: list[str], address: str | None, **options: Any
) -> Iterator[PrecompressJob]:
    with loading():
        from sac_rag.collection import open_compressor
        from sac_rag.precompress.on_ray.documents import read_with_ray
        from sac_rag.precompress.on_ray.job import RayJob, cluster

    with cluster(address):
        yield RayJob(
            collection.rag.compressor,
            read_with_ray(paths),
            open_compressor=partial(open_compressor, collection.folder.absolute()),
            **options,
        )


@contextmanager
def _collection(folder: Path, dry_run: bool, **settings: Any) -> Iterator[Collection]:
    """The collection in a folder; for a dry run, one that leaves no trace where there is none."""
    if dry_run and (not folder.exists() or not any(folder.iterdir())):
        with (
            tempfile.TemporaryDirectory() as elsewhere,
            closing(open_collection(Path(elsewhere) / folder.name, **settings)) as collection,
        ):
            yield collection
    else:
        with closing(open_collection(folder, **settings)) as collection:
            yield collection
