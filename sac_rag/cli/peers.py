"""bench peers: what users would pick instead of SAC, on the same questions and budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sac_rag.cli.bench import samples_of
from sac_rag.cli.console import loading, pull_if_default, pull_missing
from sac_rag.cli.options import (
    AsJson,
    BatchSize,
    Compressor,
    DtypeOrDefault,
    Limit,
    MaxNewTokens,
    Model,
    NumsOfChunks,
    QuestionsOrDefault,
    Ratios,
    Seed,
    name_of,
)
from sac_rag.cli.progress import progress
from sac_rag.cli.render import notes, out, print_peers, write


def peers(
    data: QuestionsOrDefault = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of answers; run again to resume.")
    ] = Path("runs/quality"),
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a peer (see --list); may be repeated. Default: all that can run."
        ),
    ] = None,
    list_all: Annotated[
        bool, typer.Option("--list", help="List all peers, and why some cannot run.")
    ] = False,
    ratio: Ratios = None,
    k: NumsOfChunks = None,
    limit: Limit = 100,
    seed: Seed = 0,
    model: Model = "smollm2-135m",
    compressor: Compressor = "shipped",
    dtype: DtypeOrDefault = None,
    batch_size: BatchSize = 8,
    max_new_tokens: MaxNewTokens = 32,
    as_json: AsJson = False,
) -> None:
    """Answers the same questions with kvpress, LLMLingua and others, at SAC's budget."""
    with loading():
        from sac_rag.evaluation.peers import registry

        chosen, blocked = registry.select(peer or ())
    if list_all:
        rows = registry.list_peers()
        write({"peers": rows}, lambda: print_peers(rows), as_json=as_json)
        return
    for row in blocked:
        notes.print(f"skipped {row.name}: {row.reason}", style="yellow", markup=False)
    if not data:
        raise ValueError("give questions with --data FILE, or list the peers with --list")
    if not chosen:
        raise ValueError("none of these peers can run here")
    samples = samples_of(data, k or (1,), limit, seed)
    pull_if_default(model)
    if needed := sorted({name for one in chosen for name in one.models}):
        pull_missing(needed)
    with loading():
        from sac_rag import SacRAG
        from sac_rag.evaluation.comparison import to_markdown
        from sac_rag.evaluation.provenance import provenance

        rag = SacRAG.from_pretrained(model, compressor=compressor, dtype=name_of(dtype))
    ratios = sorted({*(ratio or (5, 15))})
    results = []
    total = len(chosen) * len(ratios) * sum(len(sample.trials) for sample in samples)
    with progress("answering", total=total, show=not as_json) as advance:
        for result in registry.measure_peers(
            rag,
            samples,
            chosen,
            ratios,
            folder,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            labels=provenance(model, data),
            on_progress=advance,
        ):
            results.append(result)
            notes.print(
                f"{result.system}, ratio {result.ratio}, k={result.k}: F1 {result.f1:.3f}, "
                f"{result.seconds:.0f} s",
                markup=False,
            )
    write(
        {"model": model, "rows": results, "skipped": blocked},
        lambda: out.print(to_markdown(results), markup=False),
        as_json=as_json,
    )
