"""bench choices | anchors | steps: what training is measured by."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sac_rag.cli.console import AsJson, all_models, loading, progress, pull_missing
from sac_rag.cli.render import notes, out, print_json
from sac_rag.cli.tables import print_anchors, print_steps


def choices(
    data: Annotated[list[Path], typer.Option(help="Questions with answers, as for train.")],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of results; run again to go on.")
    ] = Path("runs/choices"),
    config: Annotated[
        Path | None, typer.Option(help="Settings that all runs share, .toml or .json.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Prose, for the choices that learn from it.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="A choice; may be repeated.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Time of each run, validation not.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each choice.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Compares design choices of training on equal time, at one ratio."""
    with loading():
        from sac_rag.training.ablation import compare, to_markdown
        from sac_rag.training.config import TrainConfig
    values: dict[str, Any] = TrainConfig.read(config) if config else {}
    values["data"] = [str(path) for path in data]
    # The rows of prose are drawn only by the choices that set a share of them.
    values["text"] = [str(path) for path in text or ()]
    values["max_minutes"] = minutes
    base = TrainConfig.from_dict({"ratios": [5], "steps": 1000, "eval_every": 1000, **values})
    outcomes = []
    for outcome in compare(base, folder, names=only or (), seeds=range(seeds)):
        outcomes.append(outcome)
        notes.print(
            f"{outcome.choice}, seed {outcome.seed}: loss {outcome.loss:.3f}, accuracy "
            f"{outcome.accuracy:.3f}, content {outcome.content:.3f} after {outcome.steps} steps",
            markup=False,
        )
    if as_json:
        print_json({"rows": [asdict(outcome) for outcome in outcomes]})
    else:
        out.print(to_markdown(outcomes), markup=False)


def anchors(
    data: Annotated[list[Path], typer.Option(help="Questions with answers, as for train.")],
    compressor: Annotated[
        str,
        typer.Option(help="'shipped', 'fitted' or the folder of one with learned anchors."),
    ] = "shipped",
    model: Annotated[str, typer.Option(help="What it was trained for.")] = "smollm2-135m",
    ratio: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Passages.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the choice of passages.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Answers from anchors that others would have chosen: how much a better choice would bring."""
    from sac_rag.evaluation.questions import read_questions

    examples = list(read_questions(data))
    if model in all_models():
        pull_missing([model])
    with loading():
        from sac_rag.compressors import checkpoint
        from sac_rag.lm.generator import Generator
        from sac_rag.prompts.format import SPANS
        from sac_rag.training.anchor_oracle import compare_anchors
        from sac_rag.training.objective import Objective
        from sac_rag.training.rows import RowMaker

        folder = checkpoint.find(compressor, model)
        if folder is None:
            raise ValueError("'full' keeps every token: there is no choice to compare")
        generator = Generator.from_pretrained(model)
        loaded = checkpoint.load(folder, generator, stored_dtype="float32")
        maker = RowMaker(generator, checkpoint.load_prompt_format(folder) or SPANS)
    chosen = random.Random(seed).sample(examples, min(limit, len(examples)))
    rows = [maker.ask(example.gold[:1], example.questions[:5]) for example in chosen]
    with progress("asking", total=len(rows), show=not as_json) as advance:
        objective = Objective(loaded, maker.prefix_ids)
        figures = compare_anchors(objective, rows, ratio or (5,), on_progress=advance)
    if as_json:
        print_json({"rows": [asdict(row) for row in figures]})
    else:
        print_anchors(figures)


def steps(
    data: Annotated[list[Path], typer.Option(help="Questions with answers, as for train.")],
    config: Annotated[
        Path | None, typer.Option(help="Settings of the run, .toml or .json.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Of the run's first.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="The median of so many.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Times steps of training, by turns with the bare model over the same tokens."""
    with loading():
        from sac_rag.training.config import TrainConfig
        from sac_rag.training.step_speed import measure

    values = {**(TrainConfig.read(config) if config else {}), "data": [str(path) for path in data]}
    run = TrainConfig.from_dict(values)
    if run.model in all_models():
        pull_missing([run.model])
    with loading():
        rows = measure(run, batches=batches, repeats=repeats)
    if as_json:
        print_json({"rows": [{**asdict(row), "tokens_per_s": row.tokens_per_s} for row in rows]})
    else:
        print_steps(rows)
