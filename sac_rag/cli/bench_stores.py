"""bench store, objects, scale and load: measurements of stores."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from sac_rag.cli.console import loading
from sac_rag.cli.options import AsJson, NumChunks, Repeats, Seed
from sac_rag.cli.progress import progress
from sac_rag.cli.render import (
    out,
    print_load,
    print_lookups,
    print_prefetch,
    print_reads,
    write,
)


def store(
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure. Default: a temporary folder.")
    ] = None,
    repeats: Repeats = 200,
    entries: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Small synthetic entries to look up among; may be repeated. Default: 10000."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Times reading a chunk of 510 tokens at 5x, beside bare safetensors, and looking chunks up."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        with loading():
            from sac_rag.benchmarks.store import measure_lookups, measure_prefetch, measure_reads

            rows = measure_reads(Path(place), repeats=repeats)
            prefetch = measure_prefetch(Path(place) / "prefetched")
        counts = entries or [10_000]
        with progress("filling stores", total=sum(counts), show=not as_json) as advance:
            lookups = [
                measure_lookups(Path(place) / f"{number}", count, repeats, advance)
                for number, count in enumerate(counts)
            ]

    def show() -> None:
        print_reads(rows)
        print_lookups(lookups)
        print_prefetch(prefetch)

    write({"reads": rows, "lookups": lookups, "prefetch": prefetch}, show, as_json=as_json)


def objects(
    url: Annotated[
        str | None,
        typer.Option(help="An empty folder, for fsspec. Default: a temporary one."),
    ] = None,
    entries: Annotated[int, typer.Option(min=1, help="Entries to fill the store with.")] = 100_000,
    reads: Annotated[int, typer.Option(min=1, help="Random reads to time.")] = 2000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Times random reads of an object store; its entries are small and synthetic."""
    with tempfile.TemporaryDirectory() as place:
        with loading():
            from sac_rag.benchmarks.objects import measure_object_reads
        with progress("filling a store", total=entries, show=not as_json) as advance:
            figures = measure_object_reads(
                url or place, entries, reads, seed=seed, on_progress=advance
            )
    line = (
        f"{figures.entries} synthetic entries of {figures.entry_nbytes} bytes in {figures.shards} "
        f"shards: opened in {figures.open_s:.2f} s with {figures.open_requests} requests; read in "
        f"{figures.p50_ms:.2f} ms (p50), {figures.p99_ms:.2f} ms (p99), "
        f"{figures.requests_per_read:.2f} requests per read"
    )
    write(figures.to_dict(), lambda: out.print(line), as_json=as_json)


def scale(
    queries: Annotated[
        int, typer.Option(min=1, help="Queries to predict and to measure.")
    ] = 10_000,
    entries: Annotated[int, typer.Option(min=10, help="Chunks; a tenth is not stored.")] = 5000,
    k: NumChunks = 1,
    exponent: Annotated[float, typer.Option(min=0, help="Of Zipf's law.")] = 1.0,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure. Default: a temporary folder.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Plans corpora of millions to billions of chunks, and tries the simulation of tiers.

    The plan is arithmetic (docs/at_scale.md). Hit rates and waits over memory, disk and a remote
    disk are predicted from read times of a tenth of the queries, and measured beside it.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        with loading():
            from sac_rag.benchmarks.scale import Workload, measure_scale, plans, to_markdown

            workload = Workload(
                entries=entries,
                stored=entries * 9 // 10,
                memory=max(1, entries // 20),
                disk=max(1, entries // 5),
                warm_up=max(1, queries // 10),
                queries=queries,
                k=k,
                exponent=exponent,
            )
        total = k * workload.warm_up + queries
        with progress("asking", total=total, show=not as_json) as advance:
            report = measure_scale(Path(place), workload, seed=seed, on_progress=advance)
    rows = plans()

    def show() -> None:
        out.print(to_markdown(rows), markup=False, soft_wrap=True)
        out.print(report.to_markdown(), markup=False, soft_wrap=True)

    write({"plans": rows, "tiers": report}, show, as_json=as_json)


def load(
    folder: Annotated[Path, typer.Argument(help="An empty folder, on the disk to try.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="How long.")] = 10.0,
    processes: Annotated[int, typer.Option(min=1, help="Processes that read and write.")] = 6,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Reads, writes, forgets and re-encrypts in one store while processes are killed and stopped.

    Exit code 1 if a value is wrong, an acknowledged entry is lost, or a process hangs.
    """
    with loading():
        from sac_rag.benchmarks.load import measure_load
    with progress("operations", show=not as_json) as advance:
        report = measure_load(
            folder, seconds=60 * minutes, processes=processes, seed=seed, on_progress=advance
        )
    write(report, lambda: print_load(report), as_json=as_json)
    if not report.is_in_order:
        raise typer.Exit(1)
