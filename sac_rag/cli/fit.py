"""fit and average: compressors without a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sac_rag.cli.console import loading, pull_if_default
from sac_rag.cli.options import (
    AsJson,
    DtypeOrDefault,
    Model,
    ModelOfCompressor,
    Seed,
    name_of,
)
from sac_rag.cli.progress import fit_progress
from sac_rag.cli.render import human_bytes, human_time, out, print_fit, print_json, write


def fit(
    folder: Annotated[
        Path,
        typer.Option("--out", help="Folder for the compressor: a new one, or one made by fit."),
    ],
    model: Model = "smollm2-135m",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Questions with answers: SQuAD, MRQA or passages; may be repeated. Default: "
            "passages that come with the package."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prose in place of questions, a blank line between documents; may be repeated."
        ),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(help="Questions for the figures. Default: every tenth passage is held out."),
    ] = None,
    compressor: Annotated[
        str | None,
        typer.Option(
            help="Trained compressor to fit again: 'shipped' or a folder. Default: a new one."
        ),
    ] = None,
    keep_scorer: Annotated[
        bool, typer.Option("--keep-scorer", help="Fit the compressor's budgets alone.")
    ] = False,
    passages: Annotated[int, typer.Option(min=1, help="Most passages used.")] = 100,
    ratio: Annotated[
        int, typer.Option(min=1, help="Source tokens per anchor by default; any can be used later.")
    ] = 5,
    seed: Seed = 0,
    dtype: DtypeOrDefault = None,
    as_json: AsJson = False,
) -> None:
    """Fits a compressor to any model as it is, in minutes; nothing of the model is trained."""
    pull_if_default(model)
    with loading():
        from sac_rag.training.fit import fit as fit_compressor
    with fit_progress(show=not as_json) as on_event:
        fitted = fit_compressor(
            model,
            folder,
            data=data or (),
            text=text or (),
            validation=validation or (),
            compressor=compressor,
            keep_scorer=keep_scorer,
            passages=passages,
            ratio=ratio,
            seed=seed,
            dtype=name_of(dtype),
            on_event=on_event,
        )
    if as_json:
        print_json({"out": str(folder), **fitted.to_dict()})
        return
    out.print(
        f"{model}, fitted on {fitted.passages} passages in {human_time(fitted.seconds)}, measured "
        f"on {fitted.held_out} others; {human_bytes(round(fitted.bytes_per_token))} per source "
        f"token at {ratio}x\n",
    )
    print_fit(fitted.figures)
    # "fitted" alone would name the one that comes with the package.
    place = folder if len(folder.parts) > 1 else f"./{folder}"
    out.print(
        f'\nrag = SacRAG.from_pretrained("{model}", compressor="{place}")\n'
        'answer = rag.answer("Who …?", chunks)',
    )


def average(
    compressors: Annotated[list[Path], typer.Argument(help="Folders of trained compressors.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the mean.")],
    model: ModelOfCompressor = "smollm2-135m",
    as_json: AsJson = False,
) -> None:
    """Writes the mean of compressors' weights, of runs that began from one another."""
    pull_if_default(model)
    with loading():
        import torch

        from sac_rag.compressors import checkpoint
        from sac_rag.lm.generator import Generator
        from sac_rag.training.average import average as mean_of

        mean = mean_of(compressors, Generator.from_pretrained(model))
        prompt_format = checkpoint.load_prompt_format(compressors[0])
        checkpoint.save(mean, folder, prompt_format=prompt_format, dtype=torch.float16)
    text = f"{folder}; fit its scorer and budgets again: sac-rag fit --compressor {folder} …"
    write({"out": str(folder)}, lambda: out.print(text, markup=False), as_json=as_json)
