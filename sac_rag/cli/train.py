"""train | train-instructions: trains a compressor, and writes rows to train it on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sac_rag.cli.console import loading, pull_if_default
from sac_rag.cli.options import AsJson, Config, Model, Questions, QuestionsOrDefault, Seed
from sac_rag.cli.progress import progress, train_progress
from sac_rag.cli.render import out, print_json, write


def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to change: steps=200 compressor.attention=full ratios=[2,5]"),
    ] = None,
    config: Config = None,
    data: QuestionsOrDefault = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of the run; run again to resume it.")
    ] = Path("runs/train"),
    show: Annotated[bool, typer.Option("--show", help="Print all settings and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Trains a compressor; Ctrl-C saves, and running it again resumes."""
    from sac_rag.training.config import TrainConfig

    values: dict[str, Any] = TrainConfig.read(config) if config else {}
    if data:
        values["data"] = [str(path) for path in data]
    run_config = TrainConfig.complete(values, settings or [])
    if show:
        print_json(run_config.to_dict())
        return
    pull_if_default(run_config.model)
    with loading():
        from sac_rag.training import trainer
        from sac_rag.training.processes import is_main_process
    is_main = is_main_process()
    with train_progress(show=is_main and not as_json) as on_event:
        compressor = trainer.train(run_config, folder, on_event=on_event)
    if not is_main:
        return
    if as_json:
        print_json({"out": str(folder), "compressor": str(compressor)})
        return
    out.print(f"compressor: {compressor}")
    out.print(f"losses: {folder / trainer.CURVES}, {folder / trainer.HISTORY}")


def train_instructions(
    data: Questions,
    file: Annotated[
        Path, typer.Option("--out", help="JSON Lines file; run again to resume it.")
    ] = Path("runs/instructions.jsonl"),
    model: Model = "smollm2-135m",
    count: Annotated[int, typer.Option(min=1, help="Answers in all.")] = 1000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 96,
    batch: Annotated[int, typer.Option(min=1, help="Answers written together.")] = 8,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Lets the model answer open instructions about passages, to train on."""
    from sac_rag.training.config import TrainConfig

    pull_if_default(model)
    with loading():
        from sac_rag.lm.generator import Generator
        from sac_rag.training.batches import split_examples
        from sac_rag.training.instructions import write_instructions

        generator = Generator.from_pretrained(model)
    # The passages that training holds out are held out here too.
    files, _ = split_examples(TrainConfig(data=tuple(map(str, data))))
    examples = [example for examples in files for example in examples]
    with progress("answering", total=count, show=not as_json) as advance:
        write_instructions(
            generator,
            examples,
            file,
            count,
            max_tokens=max_tokens,
            batch=batch,
            seed=seed,
            on_progress=advance,
        )
    write(
        {"out": str(file)},
        lambda: out.print(f"answers: {file}"),
        as_json=as_json,
    )
