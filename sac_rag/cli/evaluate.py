"""evaluate: scores of answers to questions whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sac_rag.cli.console import loading, pull_if_default, pull_missing
from sac_rag.cli.options import (
    AsJson,
    BatchSize,
    CompressorOrDefault,
    DtypeOrDefault,
    LimitOrAll,
    MaxNewTokens,
    Model,
    NumChunks,
    Questions,
    Seed,
    WeightsOrDefault,
    name_of,
)
from sac_rag.cli.progress import progress
from sac_rag.cli.render import notes, print_quality, write

if TYPE_CHECKING:
    from sac_rag.chunk import Chunk
    from sac_rag.evaluation.questions import QAExample
    from sac_rag.evaluation.sample import Sample
    from sac_rag.pipeline import SacRAG


class System(str, Enum):
    """Systems that answer."""

    compressed = "compressed"
    full_text = "full-text"
    truncated = "truncated"
    closed_book = "closed-book"


_WITHOUT_RATIO = (System.full_text, System.closed_book)


def evaluate(
    data: Questions,
    system: Annotated[
        System, typer.Option(help="The system that answers, from anchors or from text.")
    ] = System.compressed,
    ratio: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Source tokens per anchor, or per token of the truncated. Default: the "
            "compressor's; full-text and closed-book have none.",
        ),
    ] = None,
    k: NumChunks = 1,
    retrieve: Annotated[
        bool,
        typer.Option(
            "--retrieve",
            help="Answer from what a search among all passages finds, not from the gold ones.",
        ),
    ] = False,
    by_rank: Annotated[
        bool,
        typer.Option(
            "--by-rank",
            help="With --retrieve: most of the entries of that ratio for the best passages.",
        ),
    ] = False,
    limit: LimitOrAll = None,
    seed: Seed = 0,
    model: Model = "smollm2-135m",
    compressor: CompressorOrDefault = None,
    prompt: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            exists=True,
            help="Prompt format, JSON. Default: the compressor's, else few-shot spans.",
        ),
    ] = None,
    dtype: DtypeOrDefault = None,
    weights: WeightsOrDefault = None,
    batch_size: BatchSize = 8,
    max_new_tokens: MaxNewTokens = 32,
    out: Annotated[
        Path | None, typer.Option(help="JSONL file for the answers; run again to continue it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answers questions whose answers are known, and scores: EM, F1, contains."""
    from sac_rag.evaluation.sample import draw

    if by_rank and not (retrieve and system is System.compressed):
        raise ValueError(
            "--by-rank needs --retrieve, which ranks passages, and --system compressed"
        )
    examples, bad = _read(data, show=not as_json)
    search = _search(examples, show=not as_json) if retrieve else None
    sample = draw(examples, k=k, limit=limit, seed=seed, retrieve=search)
    pull_if_default(model)
    with loading():
        from sac_rag import SacRAG
        from sac_rag.compressors import checkpoint
        from sac_rag.evaluation import quality
        from sac_rag.evaluation.provenance import provenance
        from sac_rag.prompts.format import SPANS, PromptFormat

        # One and the same prompt for every system, whether or not it needs the compressor.
        folder = checkpoint.find(compressor or checkpoint.default(model), model)
        prompt_format = checkpoint.load_prompt_format(folder) if folder else None
        if prompt:
            prompt_format = PromptFormat.from_json(prompt.read_text(encoding="utf-8"))
        rag = SacRAG.from_pretrained(
            model,
            # Systems that read the whole text or none need no weights, unless asked for.
            compressor=compressor or ("full" if system in _WITHOUT_RATIO else None),
            ratio=ratio if system is System.compressed else None,
            prompt_format=prompt_format or SPANS,
            dtype=name_of(dtype),
            model_kwargs={"weights": weights.value} if weights else None,
        )
    if by_rank:
        sample = _ranked(sample, rag)
    try:
        with progress("answering", total=len(sample.trials), show=not as_json) as advance:
            result = quality.evaluate(
                rag,
                sample,
                system=system.value,
                ratio=None if system in _WITHOUT_RATIO else ratio,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                out=out,
                labels=provenance(model, data),
                on_progress=advance,
            )
    except KeyboardInterrupt:
        notes.print(
            f"interrupted; run it again to resume, the answers so far are in {out}"
            if out
            else "interrupted; with --out FILE.jsonl the answers so far would have been kept",
        )
        raise typer.Exit(130) from None
    write(
        {"model": model, **asdict(result), "skipped": bad},
        lambda: print_quality(model, result),
        as_json=as_json,
    )
    if bad:
        raise typer.Exit(1)


def _ranked(sample: Sample, rag: SacRAG) -> Sample:
    """The same questions, their passages with ratios by rank."""
    from sac_rag.ranks import by_rank

    trials = (
        replace(trial, chunks=tuple(by_rank(trial.chunks, rag.compressor, lowest=1)))
        for trial in sample.trials
    )
    return replace(sample, trials=tuple(trials))


def _search(examples: Sequence[QAExample], *, show: bool) -> Callable[[str, int], Sequence[Chunk]]:
    """Search for a question among all passages of the data, by their embeddings."""
    pull_missing(["minilm"])
    with loading():
        from sac_rag.evaluation.sample import passages_of
        from sac_rag.retrieval.embedder import Embedder
        from sac_rag.retrieval.index import ChunkIndex

        embedder = Embedder.from_pretrained()
    passages = passages_of(examples)
    with progress("embedding passages", total=len(passages), show=show) as advance:
        index = ChunkIndex.build(passages, embedder, on_progress=advance)
    return lambda question, k: [hit.chunk for hit in index.search(question, k)]


def _read(data: Sequence[Path], *, show: bool) -> tuple[list[QAExample], list[str]]:
    """Questions, and a line per record that is left out."""
    from sac_rag.evaluation.questions import read_questions

    bad: list[str] = []

    def report(place: str, problem: str) -> None:
        bad.append(f"{place}: {problem}")
        notes.print(f"skipped {place}: {problem}", style="yellow")

    examples = []
    with progress("reading questions", show=show) as advance:
        for example in read_questions(data, on_bad=report):
            examples.append(example)
            advance(1)
    return examples, bad
