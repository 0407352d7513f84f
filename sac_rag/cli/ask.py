"""demo, precompress and ask: from documents to answers. Knows nothing of measuring or training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sac_rag.cli.console import AsJson, NumChunks, loading, progress, pull_missing
from sac_rag.show import (
    answer_as_json,
    human_bytes,
    notes,
    out,
    print_account,
    print_demo,
    print_introduction,
    print_json,
)

if TYPE_CHECKING:
    from sac_rag.chunk import Chunk
    from sac_rag.collection import Collection

Store = Annotated[Path, typer.Option("--store", help="Folder of the collection.")]


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

    folder = store or models.home() / "leads"
    pull_missing()
    collection = _open(folder)
    with progress("embedding leads, once", show=not as_json) as advance:
        index_leads(collection, advance)
    if not as_json:
        print_introduction(collection, folder)
    results = []
    with progress("precompressing", show=not as_json) as advance:
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


def precompress(
    paths: Annotated[
        list[str], typer.Argument(help="txt, md or jsonl files, folders, - for stdin")
    ],
    store: Store,
    model: Annotated[
        str | None, typer.Option(help="Default model, local folder or hub id.")
    ] = None,
    compressor: Annotated[
        str | None, typer.Option(help="'shipped', 'full' or the folder of a trained compressor.")
    ] = None,
    ratio: Annotated[int | None, typer.Option(min=1, help="Source tokens per anchor.")] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest chunk, in tokens. Default: 256.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cuts documents into chunks, makes them searchable and caches their anchors."""
    from sac_rag.corpus import read_documents

    pull_missing()
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
    with progress("reading documents", show=not as_json) as advance:
        for document in read_documents(paths, on_bad=report):
            chunks += collection.split([document])
            advance(1)
    with progress("embedding", total=len(chunks), show=not as_json) as advance:
        added = collection.add(chunks, advance)
    with progress("compressing", total=len(chunks), show=not as_json) as advance:
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


def _open(folder: Path, must_exist: bool = False, **settings: Any) -> Collection:
    with loading():
        from sac_rag.collection import Collection, CollectionSettings

        if must_exist and not Collection.exists(folder):
            raise ValueError(
                f"{folder} is no collection yet; make one: sac-rag precompress PATH "
                f"--store {folder}"
            )
        return Collection(folder, CollectionSettings(**settings) if settings else None)
