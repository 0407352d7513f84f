"""bench perplexity: how well text is continued from anchors, from text and from nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import typer

from sac_rag.cli.console import loading, pull_if_default
from sac_rag.cli.evaluate import System
from sac_rag.cli.options import (
    AsJson,
    Compressor,
    DtypeOrDefault,
    Limit,
    Model,
    Ratios,
    Seed,
    name_of,
)
from sac_rag.cli.progress import progress
from sac_rag.cli.render import out, write


def perplexity(
    text: Annotated[
        list[Path],
        typer.Option(
            exists=True, dir_okay=False, help="Prose, a blank line between texts; or .gz."
        ),
    ],
    system: Annotated[
        list[System] | None, typer.Option(help="May be repeated. Default: all.")
    ] = None,
    ratio: Ratios = None,
    limit: Limit = 100,
    text_tokens: Annotated[
        int, typer.Option(min=16, help="Most tokens of each half of a text.")
    ] = 256,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of results; run again to resume.")
    ] = None,
    seed: Seed = 0,
    model: Model = "smollm2-135m",
    compressor: Compressor = "shipped",
    dtype: DtypeOrDefault = None,
    as_json: AsJson = False,
) -> None:
    """Continues prose from its first half: as anchors, as text, cut, or unread."""
    pull_if_default(model)
    with loading():
        from sac_rag import SacRAG
        from sac_rag.evaluation.perplexity import measure_perplexity, to_markdown
        from sac_rag.evaluation.provenance import provenance
        from sac_rag.training.batches import read_documents

        rag = SacRAG.from_pretrained(model, compressor=compressor, dtype=name_of(dtype))
    texts = list(read_documents([str(path) for path in text]))
    texts = random.Random(seed).sample(texts, min(limit, len(texts)))
    ratios = sorted({*(ratio or (5, 15))})
    settings = [
        (kind, at)
        for kind in system or list(System)
        for at in (ratios if kind in (System.compressed, System.truncated) else ratios[:1])
    ]
    labels = {**provenance(model, text), "seed": seed}
    rows = []
    with progress("continuing", total=len(texts) * len(settings), show=not as_json) as advance:
        for kind, at in settings:
            rows.append(
                measure_perplexity(
                    rag.compressor.inner.at_ratio(at),
                    texts,
                    rag.beginning_ids(),
                    system=kind.value,
                    half_tokens=text_tokens,
                    out=folder / f"{kind.value}-{at}x.jsonl" if folder else None,
                    labels=labels,
                    on_progress=advance,
                )
            )
    write(
        {"model": model, "rows": rows},
        lambda: out.print(to_markdown(rows)),
        as_json=as_json,
    )
