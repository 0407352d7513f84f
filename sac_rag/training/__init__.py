"""Fitting and training of compressors.

`train` needs the extra "train"; fitting (`sac_rag.fit`) needs none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sac_rag.training.config import TrainConfig
    from sac_rag.training.trainer import train

_HOME = {"TrainConfig": "config", "train": "trainer"}

__all__ = ["TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sac_rag.training' has no attribute {name!r}")
    return getattr(import_module(f"sac_rag.training.{_HOME[name]}"), name)
