"""Loads a model with its compressor, by names and folders. Knows nothing of stores or answers."""

from __future__ import annotations

import logging
import os
import shlex
from functools import cache

import torch

from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import StoredDtype
from sac_rag.compressors.full import Full
from sac_rag.compressors.precompressed import Stored
from sac_rag.lm.generator import Generator
from sac_rag.origin import Origin
from sac_rag.prompts.format import PromptFormat

log = logging.getLogger(__name__)


def load_compressor(
    model: str | os.PathLike[str],
    compressor: str | os.PathLike[str] | None,
    *,
    ratio: int | None,
    stored_dtype: StoredDtype | None,
    prompt_format: PromptFormat | None,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
) -> tuple[Compressor, PromptFormat | None]:
    """Loads what `SacRAG.from_pretrained` names; see there for arguments and errors.

    Returns:
        The compressor, and the format given or else the one that it was trained for, if it was for
        one.
    """
    named = default_compressor(model) if compressor is None else compressor
    folder = checkpoint.find(named, model)
    generator = Generator.from_pretrained(model, device=device, dtype=dtype)
    if folder is not None:
        asked = {"ratio": ratio, "stored_dtype": stored_dtype}
        changes = {name: value for name, value in asked.items() if value is not None}
        loaded = checkpoint.load(folder, generator, **changes)
        return loaded, prompt_format or checkpoint.load_prompt_format(folder)
    if ratio not in (None, 1):
        raise ValueError(
            f"'full' keeps every token (ratio 1), was asked for ratio {ratio}; give the folder of "
            f"a compressor, or fit one: {_fitting(model)}"
        )
    sink = (prompt_format or PromptFormat()).opening(generator.tokenizer)
    config = Full.default_config(sink=sink, stored_dtype=stored_dtype or generator.dtype_name)
    return checkpoint.make(generator, config), prompt_format


def default_compressor(model: str | os.PathLike[str]) -> str:
    """The compressor of a model for which none was named; logs once per model if it is "full"."""
    name = checkpoint.default(model)
    if name == Full.method:
        _warn_of_full(os.fspath(model))
    return name


@cache
def _warn_of_full(model: str) -> None:
    log.warning(
        "full keeps every token; fit a compressor for this model in a minute: %s", _fitting(model)
    )


def _fitting(model: str | os.PathLike[str]) -> str:
    """The command that makes a compressor."""
    return f"sac-rag fit --model {shlex.quote(os.fspath(model))} --out FOLDER"


def load_stored(
    model: str | os.PathLike[str], origin: Origin, device: str | torch.device | None
) -> Stored:
    """Loads a model to answer from what is stored, in the dtype in which it was compressed.

    Raises:
        ValueError: if it is not the model that it was compressed for, naming what differs.
    """
    dtype = origin.fields.get("generator.dtype")
    generator = Generator.from_pretrained(model, device=device, dtype=dtype)
    return Stored(generator, origin.config, origin.fields, origin.cue)
