"""Loads a model together with its compressor, by names, folders and hub ids."""

from __future__ import annotations

import logging
import os
import shlex
from functools import cache
from typing import Any

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
    compressor_revision: str | None = None,
    **model_kwargs: Any,
) -> tuple[Compressor, PromptFormat | None]:
    """Loads the model and compressor of `SacRAG.from_pretrained`, which documents the errors.

    Args:
        model: As there.
        compressor: As there.
        ratio: As there.
        stored_dtype: As there.
        prompt_format: As there.
        compressor_revision: As there.
        **model_kwargs: Arguments of `Generator.from_pretrained`; `token` and `cache_dir` apply to
            the compressor too.

    Returns:
        The compressor; and the prompt format: the argument, or else that of the compressor's
        training, if it has one.
    """
    named = default_compressor(model) if compressor is None else compressor
    hub = {name: model_kwargs.get(name) for name in ("token", "cache_dir")}
    folder = checkpoint.find(named, model, revision=compressor_revision, **hub)
    generator = Generator.from_pretrained(model, **model_kwargs)
    if folder is not None:
        asked = {"ratio": ratio, "stored_dtype": stored_dtype}
        changes = {name: value for name, value in asked.items() if value is not None}
        loaded = checkpoint.load(folder, generator, **changes)
        return loaded, prompt_format or loaded.prompt_format
    if ratio not in (None, 1):
        raise ValueError(
            f"'full' keeps every token (ratio 1), was asked for ratio {ratio}; give the folder of "
            f"a compressor, or fit one: {_fitting(model)}"
        )
    sink = (prompt_format or PromptFormat()).opening(generator.tokenizer)
    config = Full.default_config(sink=sink, stored_dtype=stored_dtype or generator.dtype_name)
    return checkpoint.make(generator, config), prompt_format


def default_compressor(model: str | os.PathLike[str]) -> str:
    """Name of the default compressor of a model; logs once per model if it is "full"."""
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
    """The command that fits a compressor to a model."""
    return f"sac-rag fit --model {shlex.quote(os.fspath(model))} --out FOLDER"


def load_stored(
    model: str | os.PathLike[str],
    origin: Origin,
    device: str | torch.device | None,
    **model_kwargs: Any,
) -> Stored:
    """Loads a model to answer from stored chunks, in the dtype that they were compressed in.

    Raises:
        ValueError: if the chunks were compressed for another model; it names what differs.
    """
    dtype = origin.fields.get("generator.dtype")
    generator = Generator.from_pretrained(model, device=device, dtype=dtype, **model_kwargs)
    return Stored(generator, origin.config, origin.fields, origin.cue)
