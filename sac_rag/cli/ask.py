"""demo and ask: from chunks to answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sac_rag.cli.console import open_collection, pull_if_default
from sac_rag.cli.options import AsJson, MaxNewTokens, NumChunks, Store
from sac_rag.cli.progress import progress
from sac_rag.cli.render import (
    answer_as_json,
    out,
    print_account,
    print_demo,
    print_introduction,
    print_json,
    write,
)


def demo(
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder to keep the demo's collection in.")
    ] = None,
    k: NumChunks = 8,
    gguf: Annotated[Path | None, typer.Option(help="The same model for llama.cpp.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answers five questions from Wikipedia leads, with cached anchors and with the text."""
    from sac_rag import default_models as models
    from sac_rag.demo import LEADS, ask_questions, index_leads, open_llama, pack_leads

    folder = store or models.home() / "leads"
    collection = open_collection(folder)
    pull_if_default(LEADS)
    with progress("embedding leads, once", show=not as_json) as advance:
        index_leads(collection, advance)
    if not as_json:
        print_introduction(collection, folder)
    results = []
    with progress("precompressing", show=not as_json) as advance:
        answers = ask_questions(
            collection,
            k=k,
            passages=pack_leads(),
            llama=open_llama(gguf) if gguf else None,
            on_progress=advance,
        )
        for result in answers:
            results.append(result)
            if not as_json:
                print_demo(len(results), result)
    collection.close()
    if as_json:
        print_json({"questions": results})
        return
    out.print(f"Text: {models.SOURCES[LEADS].attribution}", style="dim")
    out.print("\nYour own question, from the same leads:")
    out.print(f'  sac-rag ask "Why is the sky blue?" --store {folder}', style="bold")


def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    store: Store,
    k: NumChunks = 4,
    max_new_tokens: MaxNewTokens = 128,
    as_json: AsJson = False,
) -> None:
    """Finds the chunks most like a question and answers from their cached anchors."""
    collection = open_collection(store, must_exist=True)
    from sac_rag.collection import in_reading_order
    from sac_rag.prompts.generate import Decoding

    hits = collection.search(question, k)
    stream = collection.rag.stream(
        question, in_reading_order(hits), Decoding(max_new_tokens=max_new_tokens)
    )
    for piece in stream:
        if not as_json:
            out.print(piece, end="")
    answer = stream.answer
    collection.close()
    write(
        answer_as_json(question, answer, hits),
        lambda: print_account(answer, hits),
        as_json=as_json,
    )
