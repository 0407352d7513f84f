"""models list | pull | verify: the default models and the demo's text."""

from __future__ import annotations

from typing import Annotated

import typer

from sac_rag.cli.console import all_models, pull_missing
from sac_rag.cli.options import AsJson
from sac_rag.cli.render import out, print_models, write

app = typer.Typer(no_args_is_help=True, help="The default models and the demo's text.")


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Shows the default models, their packages and licences, and their bytes on this disk."""
    from sac_rag import default_models as models

    rows = [
        {
            "name": name,
            "kind": source.kind,
            "package": source.requirement,
            "licence": source.licence,
            "bytes": models.bytes_on_disk(name),
        }
        for name, source in models.SOURCES.items()
    ]
    write(
        {"models": rows, "folder": str(models.home())},
        lambda: print_models(rows, models.home()),
        as_json=as_json,
    )


@app.command()
def pull(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all of them.")] = None,
) -> None:
    """Downloads, verifies and converts default models, once."""
    wanted = names or all_models()
    pull_missing(wanted)
    for name in wanted:
        out.print(f"{name} is ready")


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all that are pulled.")] = None,
) -> None:
    """Hashes everything that was pulled and names what has changed."""
    from sac_rag import default_models as models

    has_changed = False
    for name in names or [n for n in all_models() if models.bytes_on_disk(n) is not None]:
        problems = models.verify(name)
        has_changed = has_changed or bool(problems)
        for line in problems or [f"{name} is as it was pulled"]:
            out.print(line)
    if has_changed:
        raise typer.Exit(1)
