"""fit: a compressor for a model as it is. Knows nothing of how it is fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sac_rag.cli.console import AsJson, Dtype, all_models, loading, pull_missing
from sac_rag.cli.render import human_bytes, human_time, notes, out, print_json
from sac_rag.cli.tables import print_fit


def fit(
    folder: Annotated[
        Path,
        typer.Option("--out", help="Folder for the compressor: a new one, or one made by fit."),
    ],
    model: Annotated[
        str, typer.Option(help="Default model, local folder or hub id.")
    ] = "smollm2-135m",
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
    seed: Annotated[int, typer.Option(help="Of the choice of passages and of the scorer.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the fastest here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fits a compressor to any model as it is, in minutes; nothing of the model is trained."""
    if model in all_models():
        pull_missing([model])
    with loading():
        from sac_rag.training.fit import fit as fit_compressor
    with _watching(show=not as_json) as tell:
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
            dtype=dtype.value if dtype else None,
            on_event=tell,
        )
    if as_json:
        print_json({"out": str(folder), **fitted.to_dict()})
        return
    out.print(
        f"{model}, fitted on {fitted.passages} passages in {human_time(fitted.seconds)}, measured "
        f"on {fitted.held_out} others; {human_bytes(round(fitted.bytes_per_token))} per source "
        f"token at {ratio}x\n",
        markup=False,
    )
    print_fit(fitted.figures)
    # "fitted" alone would name the one that comes with the package.
    place = folder if len(folder.parts) > 1 else f"./{folder}"
    out.print(
        f'\nrag = SacRAG.from_pretrained("{model}", compressor="{place}")\n'
        'answer = rag.answer("Who …?", chunks)',
        markup=False,
    )


@contextmanager
def _watching(show: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar of what is being done, on stderr."""
    from rich.progress import Progress

    labels = {"read": "reading passages", "fit": "fitting", "measure": "measuring"}
    with Progress(console=notes, transient=True, disable=not show) as bar:
        task = bar.add_task("loading the model", total=None)

        def tell(event: dict[str, Any]) -> None:
            bar.update(
                task,
                description=labels[event["event"]],
                total=event.get("total"),
                completed=event.get("done", 0),
            )

        yield tell
