"""report: a page of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sac_rag.cli.console import loading
from sac_rag.cli.options import AsJson
from sac_rag.cli.render import out, write


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of `sac-rag bench quality --out`.")],
    page: Annotated[
        Path | None, typer.Option("--out", help="The page. Default: report.html in the folder.")
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
    as_json: AsJson = False,
) -> None:
    """Writes one self-contained HTML page of all measurements in a folder."""
    with loading():
        from sac_rag.evaluation.report import write_report

    written = write_report(folder, page or folder / "report.html", title=title)
    write({"report": written}, lambda: out.print(written, markup=False), as_json=as_json)
