"""Compressors by name: those that come with the package, folders, and repositories on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sac_rag import default_models as models
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.full import Full
from sac_rag.compressors.pretrained import (
    CONFIG,
    METHODS,
    load_prompt_format,
    method_class,
    pretrained_folder,
    read,
)
from sac_rag.default_models import is_hub_id
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import PromptFormat

__all__ = [
    "METHODS",
    "WEIGHTS",
    "default",
    "find",
    "load",
    "load_prompt_format",
    "make",
    "read",
    "save",
]

# Compressors that come with the package, in folders named like the default model that they are for.
# Those that were fitted to the unchanged model, without LoRA, have a folder of their own.
WEIGHTS = Path(__file__).parents[1] / "weights"

# Names of the compressors that come with the package for the model in use: trained, and fitted.
SHIPPED, FITTED = "shipped", "fitted"


def make(generator: Generator, config: CompressorConfig) -> Compressor:
    """Creates an untrained compressor of the method that a config names.

    Raises:
        ValueError: for an unknown method.
    """
    compressor: Compressor = method_class(config.method)(generator, config)
    return compressor


def default(model: str | os.PathLike[str]) -> str:
    """Name of the compressor that a model has by default.

    "shipped" if there is one for this model, else "fitted" if there is one, else "full".
    """
    for name in (SHIPPED, FITTED):
        if _packaged_folder(name, model) is not None:
            return name
    return Full.method


def find(
    compressor: str | os.PathLike[str],
    model: str | os.PathLike[str] = "smollm2-135m",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path | None:
    """Folder of the compressor that the user named; None for "full", which needs none.

    Args:
        compressor: "full", "shipped" or "fitted"; a folder; or the id of a repository on the Hub,
            which is downloaded if need be. Write "./full" or a Path for a folder of that name.
        model: The model that "shipped" or "fitted" is for, as the user named it.
        revision: Branch, tag or commit of a repository on the Hub.
        token: Access token of the Hub.
        cache_dir: Folder of downloads. Default: that of huggingface_hub.

    Raises:
        ValueError: if it is none of these, or none comes with the package for the model.
    """
    if compressor == Full.method:
        return None
    if compressor in (SHIPPED, FITTED):
        return _require_packaged(os.fspath(compressor), model)
    if isinstance(compressor, str) and is_hub_id(compressor):
        return pretrained_folder(compressor, revision=revision, token=token, cache_dir=cache_dir)
    folder = Path(compressor).expanduser()
    if not os.fspath(compressor) or not folder.is_dir():
        raise ValueError(
            "a compressor must be 'full', 'shipped' or 'fitted', the folder of a compressor, or a "
            f"hub id such as 'user/compressor', was: {os.fspath(compressor)!r}"
        )
    return folder


def save(
    compressor: Compressor,
    folder: str | os.PathLike[str],
    *,
    prompt_format: PromptFormat | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a compressor, see `Compressor.save_pretrained`."""
    compressor.save_pretrained(folder, prompt_format=prompt_format, dtype=dtype)


def load(folder: str | os.PathLike[str], generator: Generator, **changes: Any) -> Compressor:
    """Reads a compressor from a folder, see `Compressor.from_pretrained`.

    Args:
        folder: What `save` wrote.
        generator: The model it was trained for.
        **changes: Fields of the config to change, for example ratio=15.

    Raises:
        ValueError: if the folder is not a compressor's, or not one for this generator.
    """
    return Compressor.from_pretrained(Path(folder), generator, **changes)


def _require_packaged(name: str, model: str | os.PathLike[str]) -> Path:
    folder = _packaged_folder(name, model)
    if folder is None:
        models_with_one = sorted(path.parent.name for path in _weights(name).glob(f"*/{CONFIG}"))
        raise ValueError(
            f"no compressor ({name!r}) comes with sac_rag for {os.fspath(model)!r}, only for: "
            f"{', '.join(models_with_one) or 'none'}; give 'full', or the folder of one, made by "
            "`sac-rag fit` or `sac-rag train`"
        )
    return folder


def _packaged_folder(name: str, model: str | os.PathLike[str]) -> Path | None:
    """Folder of the compressor that the package has for a model, if it has one."""
    # By name only: a folder of the user may hold any weights.
    if not isinstance(model, str) or model not in models.names():
        return None
    folder = _weights(name) / model
    return folder if (folder / CONFIG).is_file() else None


def _weights(name: str) -> Path:
    return WEIGHTS / FITTED if name == FITTED else WEIGHTS
