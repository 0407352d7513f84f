"""evaluate: how good answers are. Knows nothing of how they are scored."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sac_rag.cli.console import AsJson, Dtype, all_models, loading, progress, pull_missing
from sac_rag.cli.render import notes, print_json, print_quality


class System(str, Enum):
    """Who answers."""

    compressed = "compressed"
    full_text = "full-text"
    truncated = "truncated"
    no_text = "no-text"


_WITHOUT_RATIO = (System.full_text, System.no_text)


def evaluate(
    data: Annotated[
        list[Path],
        typer.Option(
            help="Questions with answers: SQuAD, MRQA or passages (README); may be repeated."
        ),
    ],
    system: Annotated[
        System, typer.Option(help="Who answers, from anchors or from text.")
    ] = System.compressed,
    ratio: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Source tokens per anchor, or per token of the truncated. Default: the "
            "compressor's; full-text and no-text have none.",
        ),
    ] = None,
    k: Annotated[
        int, typer.Option("--k", "-k", min=1, help="Chunks to answer from, gold ones among them.")
    ] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions to draw. Default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions, distractors and places.")] = 0,
    model: Annotated[
        str, typer.Option(help="Default model, local folder or hub id.")
    ] = "smollm2-135m",
    compressor: Annotated[
        str | None,
        typer.Option(help="'shipped', 'fitted', 'full' or the folder of a compressor."),
    ] = None,
    prompt: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            exists=True,
            help="Prompt format, JSON. Default: the compressor's, else few-shot spans.",
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the fastest here.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="JSONL file for the answers; run again to continue it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answers questions whose answers are known, and scores: EM, F1, contains."""
    from sac_rag.evaluation.questions import read_questions
    from sac_rag.evaluation.sample import draw

    bad: list[str] = []

    def report(place: str, problem: str) -> None:
        bad.append(f"{place}: {problem}")
        notes.print(f"skipped {place}: {problem}", style="yellow", markup=False)

    with progress("reading questions", show=not as_json) as advance:
        examples = []
        for example in read_questions(data, on_bad=report):
            examples.append(example)
            advance(1)
    sample = draw(examples, k=k, limit=limit, seed=seed)
    if model in all_models():
        pull_missing([model])
    with loading():
        from sac_rag import SacRAG
        from sac_rag.compressors import checkpoint
        from sac_rag.evaluation import quality
        from sac_rag.prompts.format import SPANS, PromptFormat

        # One and the same prompt for every system, whether or not it needs the compressor.
        folder = checkpoint.find(compressor or checkpoint.default(model), model)
        own = checkpoint.load_prompt_format(folder) if folder else None
        given = PromptFormat.from_json(prompt.read_text(encoding="utf-8")) if prompt else None
        rag = SacRAG.from_pretrained(
            model,
            # What reads the whole text or none needs no weights, unless they were asked for.
            compressor=compressor or ("full" if system in _WITHOUT_RATIO else None),
            ratio=ratio if system is System.compressed else None,
            prompt_format=given or own or SPANS,
            dtype=dtype.value if dtype else None,
        )
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
                labels={"model": model, "data": [str(path) for path in data]},
                on_progress=advance,
            )
    except KeyboardInterrupt:
        notes.print(
            f"interrupted; run it again to go on, the answers so far are in {out}"
            if out
            else "interrupted; with --out FILE.jsonl the answers so far would have been kept",
            markup=False,
        )
        raise typer.Exit(130) from None
    if as_json:
        print_json({"model": model, **asdict(result), "skipped": bad})
    else:
        print_quality(model, result)
    if bad:
        raise typer.Exit(1)
