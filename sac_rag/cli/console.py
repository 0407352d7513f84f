"""Loading: default models, heavy libraries and collections, with a note of what is awaited."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
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


def pull_missing(names: Iterable[str]) -> None:
    """Downloads default models, or the demo's text, that are not there yet."""
    from sac_rag import default_models as models

    for name in names:
        with notes.status(name) as status:
            models.pull(name, on_step=lambda step: status.update(step))


def pull_if_default(*used: str) -> None:
    """Downloads those of some models or texts that are default ones and not there yet."""
    pull_missing(name for name in used if name in all_models())


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


def open_collection(
    folder: Path, *, must_exist: bool = False, searchable: bool = True, **settings: Any
) -> Collection:
    """The collection in a folder, made with some settings if it is not there.

    Only the models that are used are downloaded and loaded: no embedder unless it is searchable.
    """
    with loading():
        from sac_rag.collection import Collection, CollectionSettings, read_settings
    exists = Collection.exists(folder)
    if must_exist and not exists:
        raise ValueError(
            f"{folder} is no collection yet; make one: sac-rag precompress PATH --store {folder}"
        )
    used = read_settings(folder) if exists else CollectionSettings(**settings)
    pull_if_default(used.model, *([used.embedder] if searchable else []))
    with loading():
        collection = Collection(folder, CollectionSettings(**settings) if settings else None)
        if searchable:
            len(collection.index)
        return collection
