"""train | train-instructions: learns a compressor. Knows nothing of how it is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sac_rag.cli.console import AsJson, all_models, loading, progress, pull_missing
from sac_rag.cli.render import notes, out, print_json


def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings given anew: steps=200 compressor.attention=full ratios=[2,5]"
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings of the run, .toml or .json (docs/training.md).")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Questions with answers: SQuAD, MRQA or passages; may be repeated."),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of the run; run again to go on with it.")
    ] = Path("runs/train"),
    show: Annotated[bool, typer.Option("--show", help="Print all settings and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Trains a compressor; Ctrl-C saves, and running it again goes on."""
    from sac_rag.training.config import TrainConfig

    values: dict[str, Any] = TrainConfig.read(config) if config else {}
    if data:
        values["data"] = [str(path) for path in data]
    chosen = TrainConfig.complete(values, settings or [])
    if show:
        print_json(chosen.to_dict())
        return
    if chosen.model in all_models():
        pull_missing([chosen.model])
    with loading():
        from sac_rag.training import trainer
    with _watching(show=not as_json) as tell:
        compressor = trainer.train(chosen, folder, on_event=tell)
    if as_json:
        print_json({"out": str(folder), "compressor": str(compressor)})
        return
    out.print(f"compressor: {compressor}", markup=False)
    out.print(f"losses: {folder / trainer.CURVES}, {folder / trainer.HISTORY}", markup=False)


def train_instructions(
    data: Annotated[list[Path], typer.Option(help="Questions with passages, as for train.")],
    file: Annotated[
        Path, typer.Option("--out", help="JSON Lines file; run again to go on with it.")
    ] = Path("runs/instructions.jsonl"),
    model: Annotated[str, typer.Option(help="The frozen LM that answers.")] = "smollm2-135m",
    count: Annotated[int, typer.Option(min=1, help="Answers in all.")] = 1000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 96,
    batch: Annotated[int, typer.Option(min=1, help="Answers written together.")] = 8,
    seed: Annotated[int, typer.Option(help="Of passages, instructions and prompts.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Lets the model answer open instructions about passages, to train on."""
    from sac_rag.training.config import TrainConfig

    if model in all_models():
        pull_missing([model])
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
    if as_json:
        print_json({"out": str(file)})
    else:
        out.print(f"answers: {file}", markup=False)


@contextmanager
def _watching(show: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar with rate, loss and time left, and a line for each validation, on stderr."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, transient=True, disable=not show) as bar:
        task = bar.add_task("loading", total=None)
        tokens, seconds, loss = 0, 0.0, 0.0

        def tell(event: dict[str, Any]) -> None:
            nonlocal tokens, seconds, loss
            kind = event["event"]
            if kind == "scorer" and "done" in event:
                bar.update(task, description="fitting the scorer", total=event["texts"])
                bar.advance(task, event["done"])
            elif kind == "start":
                bar.reset(task, total=event["steps"], completed=event["step"])
            elif kind == "step":
                tokens, seconds = tokens + event["tokens"], seconds + event["seconds"]
                loss = 0.95 * loss + 0.05 * event["loss"] if loss else event["loss"]
                rate = f"loss {loss:.3f}, {tokens / seconds:.0f} tokens/s"
                bar.update(task, description=rate, completed=event["step"])
            elif kind == "validation":
                answers = "" if event["f1"] is None else f", F1 {event['f1']:.3f}"
                answers += "" if event["ended"] is None else f", ended {event['ended']:.2f}"
                prompt = f" {event['prompt']}" if event["prompt"] else ""
                notes.print(
                    f"step {event['step']}{prompt}, {event['ratio']}x: loss {event['loss']:.3f}, "
                    f"accuracy {event['accuracy']:.3f} (wrong text {event['wrong_accuracy']:.3f}), "
                    f"first token {event['first_accuracy']:.3f}{answers}",
                    highlight=False,
                )
            elif kind == "interrupted":
                notes.print(f"saved at step {event['step']}; run it again to go on")

        yield tell
