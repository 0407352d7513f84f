"""A compressor to a folder and back. Knows nothing of training state or of any one method.

config.json              what determines the compressor besides its weights
compressor.safetensors   its trained weights
format.json              the format of the prompts it was trained for, if it was for one
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sac_rag import default_models as models
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.full import Full
from sac_rag.compressors.sac import SAC
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import PromptFormat

METHODS: dict[str, type[Compressor]] = {SAC.method: SAC, Full.method: Full}

# Compressors that come with the package: a folder each, named like the default model; those that
# were fitted to it as it is, without LoRA, in a folder of their own.
WEIGHTS = Path(__file__).parents[1] / "weights"

# The names of those among them that are for the model in hand: trained, and fitted.
SHIPPED, FITTED = "shipped", "fitted"

_CONFIG, _WEIGHTS, _FORMAT = "config.json", "compressor.safetensors", "format.json"


def make(generator: Generator, config: CompressorConfig) -> Compressor:
    """Makes the compressor that a config names, untrained.

    Raises:
        ValueError: for an unknown method.
    """
    if config.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, was: {config.method!r}")
    return METHODS[config.method](generator, config)


def default(model: str | os.PathLike[str]) -> str:
    """The compressor of a model for which none was named.

    "shipped" if there is one for this model, else "fitted" if there is one, else "full".
    """
    for name in (SHIPPED, FITTED):
        if _with_package(name, model) is not None:
            return name
    return Full.method


def find(
    compressor: str | os.PathLike[str], model: str | os.PathLike[str] = "smollm2-135m"
) -> Path | None:
    """The folder of a compressor that the user named; None for "full", which needs none.

    Args:
        compressor: "full", "shipped", "fitted" or a folder; write "./full" or a Path for a folder
            of that name.
        model: What "shipped" or "fitted" is for, as the user named it.

    Raises:
        ValueError: if it is none of these, or none comes with the package for the model.
    """
    if compressor == Full.method:
        return None
    if compressor in (SHIPPED, FITTED):
        name = os.fspath(compressor)
        found = _with_package(name, model)
        if found is None:
            there = sorted(path.parent.name for path in _weights(name).glob(f"*/{_CONFIG}"))
            raise ValueError(
                f"no compressor ({name!r}) comes with sac_rag for {os.fspath(model)!r}, only for: "
                f"{', '.join(there) or 'none'}; give 'full', or the folder of one, made by "
                "`sac-rag fit` or `sac-rag train`"
            )
        return found
    folder = Path(compressor).expanduser()
    if not os.fspath(compressor) or not folder.is_dir():
        raise ValueError(
            "a compressor must be 'full', 'shipped' or 'fitted', or the folder of a compressor, "
            f"was: {os.fspath(compressor)!r}"
        )
    return folder


def save(
    compressor: Compressor,
    folder: str | os.PathLike[str],
    *,
    prompt_format: PromptFormat | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a compressor; each file appears whole or not at all.

    Args:
        compressor: Its config and weights are written.
        folder: Made if it is not there; what it held of another compressor is replaced.
        prompt_format: The format of the prompts it was trained for.
        dtype: What the weights are written in: float32 to go on training, float16 to hand on.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in compressor.weights.items()
    }
    save_file(tensors, folder / f"{_WEIGHTS}.part")
    (folder / f"{_CONFIG}.part").write_text(compressor.config.to_json())
    if prompt_format is None:
        (folder / _FORMAT).unlink(missing_ok=True)
    else:
        (folder / f"{_FORMAT}.part").write_text(prompt_format.to_json())
    for name in (_WEIGHTS, _CONFIG, *([_FORMAT] if prompt_format is not None else [])):
        (folder / f"{name}.part").replace(folder / name)


def load(folder: str | os.PathLike[str], generator: Generator, **changes: Any) -> Compressor:
    """Reads what `save` wrote.

    Args:
        folder: Holds config.json and compressor.safetensors.
        generator: The model it was trained for.
        **changes: Config fields to set otherwise, for example ratio=15.

    Raises:
        ValueError: if the folder is no compressor, or not one for this generator.
    """
    config, weights = read(folder)
    compressor = make(generator, replace(config, **changes))
    compressor.load_weights(weights)
    return compressor


def read(folder: str | os.PathLike[str]) -> tuple[CompressorConfig, dict[str, Tensor]]:
    """The config and the weights that `save` wrote, without a model.

    Raises:
        ValueError: if the folder is no compressor.
    """
    folder = Path(folder)
    try:
        config = CompressorConfig.from_json((folder / _CONFIG).read_text())
        return config, load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} must hold {_CONFIG} and {_WEIGHTS} of a compressor: {error}"
        ) from error


def load_prompt_format(folder: str | os.PathLike[str]) -> PromptFormat | None:
    """Reads the format that `save` wrote; None if the compressor was trained for no one format.

    Raises:
        ValueError: if there is a file that is not that of a format.
    """
    path = Path(folder) / _FORMAT
    try:
        return PromptFormat.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a prompt format: {error}") from error


def _with_package(name: str, model: str | os.PathLike[str]) -> Path | None:
    """The folder of what the package has for a model under one of its names."""
    # By name only: a folder of the user's own may hold any weights.
    if not isinstance(model, str) or model not in models.names():
        return None
    folder = _weights(name) / model
    return folder if (folder / _CONFIG).is_file() else None


def _weights(name: str) -> Path:
    return WEIGHTS / FITTED if name == FITTED else WEIGHTS
