"""bench choices | methods | anchors | sinks | steps: measurements of training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import typer

from sac_rag.cli.console import loading, pull_if_default
from sac_rag.cli.options import (
    AsJson,
    Compressor,
    Config,
    Limit,
    ModelOfCompressor,
    Questions,
    Ratios,
    Repeats,
    Seed,
)
from sac_rag.cli.progress import progress
from sac_rag.cli.render import notes, out, print_anchors, print_sinks, print_steps, write


def choices(
    data: Questions,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of results; run again to resume.")
    ] = Path("runs/choices"),
    config: Config = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Prose, for the choices that learn from it.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="A choice; may be repeated.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Time per run, without validation.")] = 5,
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
        )
    write(
        {"rows": outcomes},
        lambda: out.print(to_markdown(outcomes)),
        as_json=as_json,
    )


def methods(
    data: Questions,
    text: Annotated[list[Path], typer.Option(help="Prose for the first stage.")],
    held_out_text: Annotated[list[Path], typer.Option(help="Prose for the perplexity.")],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of results; run again to resume.")
    ] = Path("runs/methods"),
    config: Config = None,
    only: Annotated[list[str] | None, typer.Option(help="A method; may be repeated.")] = None,
    ratio: Annotated[int, typer.Option(min=1, help="Source tokens per anchor.")] = 5,
    prose_steps: Annotated[int, typer.Option(min=1, help="Steps on prose.")] = 100,
    question_steps: Annotated[int, typer.Option(min=1, help="Steps on questions.")] = 100,
    layers: Annotated[
        int | None, typer.Option(min=1, help="First layers of the model. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=0, help="Runs of each; 0 for times alone.")] = 2,
    repeats: Repeats = 5,
    as_json: AsJson = False,
) -> None:
    """Trains SAC, ICAE and 500xCompressor alike, and compares perplexity, answers and times."""
    with loading():
        from sac_rag.training.config import TrainConfig
        from sac_rag.training.methods import compare_methods, time_methods, to_markdown
    values = {
        "eval_ratios": [ratio],
        **(TrainConfig.read(config) if config else {}),
        "data": [str(path) for path in data],
        "text": [str(path) for path in text],
        "ratios": [ratio],
        "steps": question_steps,
        "eval_every": question_steps,
    }
    base = TrainConfig.from_dict(values)
    pull_if_default(base.model)
    with loading():
        speeds = time_methods(base, names=only or (), layers=layers, repeats=repeats)
    outcomes = []
    for outcome in compare_methods(
        base,
        [str(path) for path in held_out_text],
        folder,
        prose_steps=prose_steps,
        names=only or (),
        seeds=range(seeds),
        layers=layers,
    ):
        outcomes.append(outcome)
        notes.print(
            f"{outcome.method}, seed {outcome.seed}: perplexity {outcome.perplexity:.1f}, "
            f"F1 {outcome.f1:.3f}, accuracy {outcome.accuracy:.3f}",
            markup=False,
        )
    write(
        {"rows": outcomes, "speeds": speeds},
        lambda: out.print(to_markdown(outcomes, speeds), markup=False),
        as_json=as_json,
    )


def anchors(
    data: Questions,
    compressor: Compressor = "shipped",
    model: ModelOfCompressor = "smollm2-135m",
    ratio: Ratios = None,
    limit: Limit = 24,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Answers from anchors of other selections: the gain that a better one would bring."""
    from sac_rag.evaluation.questions import read_questions

    examples = list(read_questions(data))
    pull_if_default(model)
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
    write({"rows": figures}, lambda: print_anchors(figures), as_json=as_json)


def sinks(
    data: Questions,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Name of a training prompt; may be repeated. Default: five."),
    ] = None,
    limit: Limit = 12,
    seed: Seed = 0,
    model: ModelOfCompressor = "smollm2-135m",
    as_json: AsJson = False,
) -> None:
    """Answers from passages encoded behind several sinks: which one serves all prompts."""
    from sac_rag.evaluation.questions import read_questions

    examples = list(read_questions(data))
    pull_if_default(model)
    with loading():
        from sac_rag.lm.generator import Generator
        from sac_rag.training.sinks import compare_sinks, sinks_of

        generator = Generator.from_pretrained(model)
    chosen = random.Random(seed).sample(examples, min(limit, len(examples)))
    prompts = prompt or ["spans", "passages", "excerpts", "given-context", "knowledge-in-system"]
    texts, rows = sinks_of(generator), []
    with progress("asking", total=len(texts) * len(prompts), show=not as_json) as advance:
        for row in compare_sinks(generator, chosen, prompts, texts):
            rows.append(row)
            advance(1)
    write({"rows": rows}, lambda: print_sinks(rows), as_json=as_json)


def steps(
    data: Questions,
    config: Config = None,
    batches: Annotated[int, typer.Option(min=1, help="Of the run's first.")] = 6,
    repeats: Repeats = 3,
    as_json: AsJson = False,
) -> None:
    """Times training steps, in turn with the bare model over the same tokens."""
    with loading():
        from sac_rag.training.config import TrainConfig
        from sac_rag.training.step_speed import measure

    values = {**(TrainConfig.read(config) if config else {}), "data": [str(path) for path in data]}
    run = TrainConfig.from_dict(values)
    pull_if_default(run.model)
    with loading():
        rows = measure(run, batches=batches, repeats=repeats)
    write({"rows": rows}, lambda: print_steps(rows), as_json=as_json)
