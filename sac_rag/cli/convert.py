"""convert: a checkpoint of the paper's authors to a compressor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sac_rag.cli.console import loading, pull_if_default
from sac_rag.cli.options import AsJson
from sac_rag.cli.render import out, print_json


def convert(
    adapter: Annotated[Path, typer.Argument(help="The authors' adapter.pt.")],
    base: Annotated[
        str, typer.Option(help="The model it is for: default model, local folder or hub id.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the compressor, new or empty.")],
    ratio: Annotated[
        int | None,
        typer.Option(min=1, help="Source tokens per anchor, where the file leaves it open."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turns a checkpoint that the paper's authors released into a compressor."""
    pull_if_default(base)
    with loading():
        from sac_rag.compressors import paper_checkpoints as reference

        config = reference.convert(adapter, base, folder, ratio=ratio).config
    if as_json:
        print_json({"compressor": str(folder), "ratio": config.ratio, "rank": config.lora_rank})
        return
    out.print(f"compressor: {folder}, {config.ratio}x, LoRA rank {config.lora_rank}")
    out.print(
        f"Use it: SacRAG.from_pretrained({base!r}, compressor={str(folder)!r})",
        style="dim",
    )
