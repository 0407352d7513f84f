"""Loading: default models, heavy libraries and collections, with a note of what is awaited."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sac_rag.cli.render import notes

if TYPE_CHECKING:
    from sac_rag.collection import Collection


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


def pull_if_default(model: str) -> None:
    """Downloads a model if it is a default one that is not there yet."""
    if model in all_models():
        pull_missing([model])


@contextmanager
def loading() -> Iterator[None]:
    """For importing heavy libraries and loading models with them."""
    with notes.status("loading models"):
        # Importing torch and transformers makes a million objects that stay; looking for garbage
        # among them takes 0.7 s.
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
