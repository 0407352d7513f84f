"""bench: measurements that anyone can take again. Knows nothing of how they are taken."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from sac_rag.cli.console import AsJson, Dtype, loading, progress, pull_missing
from sac_rag.show import print_json, print_speed

app = typer.Typer(no_args_is_help=True, help="Measurements that anyone can take again.")


@app.command()
def speed(
    k: Annotated[list[int] | None, typer.Option(min=1, help="Chunks; may be repeated.")] = None,
    ratio: Annotated[
        list[int] | None, typer.Option(min=1, help="Source tokens per anchor; may be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Default model, local folder or hub id.")
    ] = "smollm2-135m",
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the fastest here.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Best of so many.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Times the first token: cached anchors against reading the text, in one process."""
    pull_missing()
    with loading():
        from sac_rag.demo import wikipedia_leads
        from sac_rag.evaluation.speed import measure
        from sac_rag.generator import Generator

        generator = Generator.from_pretrained(model, dtype=dtype.value if dtype else None)
    rows = []
    with progress("measuring", show=not as_json) as advance:
        for row in measure(
            generator,
            (lead.text for lead in wikipedia_leads()),
            ks=k or (1, 4, 8),
            ratios=ratio or (1, 5, 15),
            repeats=repeats,
        ):
            advance(1)
            rows.append(row)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
    else:
        print_speed(model, rows)
