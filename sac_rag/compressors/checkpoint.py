"""A compressor to a folder and back. Knows nothing of training state or of any one method."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.full import Full
from sac_rag.compressors.sac import SAC
from sac_rag.generator import Generator

METHODS: dict[str, type[Compressor]] = {SAC.method: SAC, Full.method: Full}

_CONFIG, _WEIGHTS = "config.json", "compressor.safetensors"


def make(generator: Generator, config: CompressorConfig) -> Compressor:
    """Makes the compressor that a config names, untrained.

    Raises:
        ValueError: for an unknown method.
    """
    if config.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, was: {config.method!r}")
    return METHODS[config.method](generator, config)


def save(compressor: Compressor, folder: str | os.PathLike[str]) -> None:
    """Writes config.json and compressor.safetensors; each appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in compressor.weights.items()}
    save_file(tensors, folder / f"{_WEIGHTS}.part")
    (folder / f"{_CONFIG}.part").write_text(compressor.config.to_json())
    for name in (_WEIGHTS, _CONFIG):
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
    folder = Path(folder)
    try:
        config = CompressorConfig.from_json((folder / _CONFIG).read_text())
        weights = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} must hold {_CONFIG} and {_WEIGHTS} of a compressor: {error}"
        ) from error
    compressor = make(generator, replace(config, **changes))
    compressor.load_weights(weights)
    return compressor
