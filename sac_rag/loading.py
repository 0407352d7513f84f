"""Loads a model with its compressor, by names and folders. Knows nothing of stores or answers."""

from __future__ import annotations

import os

import torch

from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import StoredDtype
from sac_rag.compressors.full import Full
from sac_rag.compressors.stored import Stored
from sac_rag.generator import Generator
from sac_rag.origin import Origin
from sac_rag.template import PromptFormat


def load_compressor(
    model: str | os.PathLike[str],
    compressor: str | os.PathLike[str] | None,
    *,
    ratio: int | None,
    stored_dtype: StoredDtype | None,
    format: PromptFormat | None,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
) -> tuple[Compressor, PromptFormat | None]:
    """Loads what `SacRAG.from_pretrained` names; see there for arguments and errors.

    Returns:
        The compressor, and the format given or else the one that it was trained for, if it was for
        one.
    """
    folder = checkpoint.find(checkpoint.default(model) if compressor is None else compressor, model)
    generator = Generator.from_pretrained(model, device=device, dtype=dtype)
    if folder is not None:
        asked = {"ratio": ratio, "stored_dtype": stored_dtype}
        changes = {name: value for name, value in asked.items() if value is not None}
        loaded = checkpoint.load(folder, generator, **changes)
        return loaded, format or checkpoint.load_format(folder)
    if ratio not in (None, 1):
        raise ValueError(
            f"'full' keeps every token (ratio 1), was asked for ratio {ratio}; "
            "give the folder of a trained compressor"
        )
    sink = (format or PromptFormat()).opening(generator.tokenizer)
    config = Full.default_config(sink=sink, stored_dtype=stored_dtype or generator.dtype_name)
    return checkpoint.make(generator, config), format


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
