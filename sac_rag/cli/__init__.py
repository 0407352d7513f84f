"""The command line parses arguments, calls the library and prints; one file per command family.

Heavy libraries are imported inside the commands, so that --help is fast. A command's signature is
the list of its options, which may make it longer than other functions.
"""

from __future__ import annotations

import logging
import os
import sys

import typer

from sac_rag.cli import (
    archive,
    ask,
    bench,
    convert,
    evaluate,
    fit,
    models,
    precompress,
    store,
    train,
    training,
)
from sac_rag.cli.render import notes

app = typer.Typer(
    name="sac-rag",
    help="Answers from retrieved chunks whose KV is computed once and cached.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.command()(ask.demo)
app.command()(precompress.precompress)
app.command()(ask.ask)
app.command()(fit.fit)
app.command()(train.train)
app.command("train-instructions")(train.train_instructions)
app.command()(evaluate.evaluate)
app.command()(convert.convert)
store.app.command("export")(archive.export)
store.app.command("import")(archive.import_)
for measurement in (training.choices, training.anchors, training.steps):
    bench.app.command()(measurement)
app.add_typer(store.app, name="store")
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Runs the command line; an error of the user's is a sentence, not a traceback."""
    # Threads that wait for each other spin. Where another process has a core, they spin through
    # their whole time slice: 0.6 to 1.6 s per token on two cores, in place of 0.05 s. With brief
    # spinning it is 0.07 s, and 0.06 s on free cores. GNU OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except (ValueError, TypeError, LookupError, OSError, RuntimeError, ImportError) as error:
        notes.print(f"sac-rag: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        # Typer turns Ctrl-C into a silent exit; an exit that a command raised itself has no cause.
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            notes.print("sac-rag: interrupted; what was finished is kept", style="red")
        raise
