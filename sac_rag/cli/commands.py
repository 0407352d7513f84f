"""The commands, and what becomes of their errors: a sentence and an exit code, no traceback."""

from __future__ import annotations

import io
import logging
import os
import sys

import typer

from sac_rag.cli import (
    archive,
    ask,
    bench,
    bench_answers,
    bench_stores,
    convert,
    evaluate,
    fit,
    models,
    peers,
    perplexity,
    precompress,
    report,
    serve,
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
app.command()(serve.serve)
app.command()(serve.mcp)
app.command()(fit.fit)
app.command()(fit.average)
app.command()(train.train)
app.command("train-instructions")(train.train_instructions)
app.command()(evaluate.evaluate)
app.command()(report.report)
app.command()(convert.convert)
store.app.command("export")(archive.export)
store.app.command("import")(archive.import_)
store.app.command()(archive.push)
store.app.command()(archive.pull)
for measurement in (
    bench_answers.decode,
    bench_answers.batch,
    bench_stores.store,
    bench_stores.objects,
    bench_stores.scale,
    bench_stores.load,
    training.choices,
    training.methods,
    training.anchors,
    training.sinks,
    training.steps,
    peers.peers,
    perplexity.perplexity,
):
    bench.app.command()(measurement)
bench.app.command("same-answers")(bench_answers.same_answers)
app.add_typer(store.app, name="store")
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")


# What a command raises for a reason that it can tell; anything else has its type named as well.
_TOLD = (ValueError, TypeError, LookupError, OSError, RuntimeError, ImportError)


def run() -> None:
    """Runs the command that the process was started with, and ends the process.

    Exit codes: 0 done; 1 failed, or nobody reads the output any more; 2 wrong arguments; 3 done
    except for bad records; 130 interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for stream in (sys.stdout, sys.stderr):
        # What the output cannot hold (in cp1252, say) becomes escapes in place of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # As `sac-rag … | head` does. Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SystemExit as end:
        # Typer turns Ctrl-C into a silent exit; an exit that a command raised itself has no cause.
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        if os.environ.get("SAC_RAG_TRACEBACK"):
            raise
        notes.print(f"sac-rag: {_sentence(error)}", style="red")
        sys.exit(1)


def _sentence(error: Exception) -> str:
    if isinstance(error, _TOLD) and str(error):
        return str(error)
    name = type(error).__name__
    return f"{name}: {error} (SAC_RAG_TRACEBACK=1 shows where)" if str(error) else name
