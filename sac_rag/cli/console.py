"""What commands share: options, waiting, getting what they work on. Knows nothing of any one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sac_rag.cli.render import notes

if TYPE_CHECKING:
    from sac_rag.collection import Collection

Store = Annotated[Path, typer.Option("--store", help="Folder of the collection.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
NumChunks = Annotated[int, typer.Option("--k", "-k", min=1, help="Chunks to answer from.")]


class Dtype(str, Enum):
    """What the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def all_models() -> list[str]:
    """Names of the default models and the demo's text."""
    from sac_rag import default_models as models

    return list(models.names())


def pull_missing(names: list[str] | None = None) -> None:
    """Downloads default models that are not there yet. Default: all of them."""
    from sac_rag import default_models as models

    for name in names or all_models():
        with notes.status(name) as status:
            models.pull(name, on_step=lambda step: status.update(step))


@contextmanager
def loading() -> Iterator[None]:
    """For importing heavy libraries and loading models with them."""
    with notes.status("loading models"):
        # Importing torch and transformers makes a million objects that stay; to look for garbage
        # among them meanwhile takes 0.7 s.
        gc.disable()
        try:
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            yield
        finally:
            gc.freeze()
            gc.enable()


def open_collection(folder: Path, must_exist: bool = False, **settings: Any) -> Collection:
    """The collection in a folder, made with some settings if it is not there."""
    with loading():
        from sac_rag.collection import Collection, CollectionSettings

        if must_exist and not Collection.exists(folder):
            raise ValueError(
                f"{folder} is no collection yet; make one: sac-rag precompress PATH "
                f"--store {folder}"
            )
        return Collection(folder, CollectionSettings(**settings) if settings else None)


@contextmanager
def progress(
    what: str, total: int | None = None, show: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; gives a function to call with how many more are done."""
    from rich.progress import Progress

    with Progress(console=notes, transient=True, disable=not show) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
