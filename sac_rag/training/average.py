"""average: the mean of the weights of compressors that were trained one after the other.

Weights wander around what they learn, and their mean lies nearer to it ("model soups", Wortsman et
al., 2022).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields

import torch

from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator


def average(folders: Sequence[str | os.PathLike[str]], generator: Generator) -> Compressor:
    """The mean of compressors of one config.

    That of scorers and budgets has no meaning of its own: fit them again (`sac_rag.fit`).

    Args:
        folders: At least two, for this generator, of training runs that began from one another.
        generator: The model that they were trained for.

    Raises:
        TypeError: for one str in place of several.
        ValueError: for fewer than two, for different configs, or as `checkpoint.load` does.
    """
    if isinstance(folders, str | os.PathLike):
        raise TypeError(f"folders must be several paths, was one: {folders!r}; put it in a list")
    if len(folders) < 2:
        raise ValueError(f"at least two compressors have a mean, got {len(folders)}")
    first, *others = (checkpoint.load(folder, generator) for folder in folders)
    for folder, other in zip(folders[1:], others, strict=True):
        values = [
            (field.name, getattr(first.config, field.name), getattr(other.config, field.name))
            for field in fields(first.config)
        ]
        if different := [row for row in values if row[1] != row[2]]:
            name, expected, got = different[0]
            raise ValueError(
                f"compressors must have one config, but {os.fspath(folder)} has {name}={got!r} "
                f"and {os.fspath(folders[0])} has {expected!r}"
            )
    first.load_weights(
        {
            name: torch.stack([one.weights[name].detach() for one in (first, *others)]).mean(dim=0)
            for name in first.weights
        }
    )
    return first
