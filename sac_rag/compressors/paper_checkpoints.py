"""Conversion of the paper's released checkpoints (arXiv 2510.08907) to compressors.

Their file is read as tensors only; their prompt is `FORMAT`. For one chunk the encoder's input is
that of the paper's code, with BOS and heading before the text and compressed with it, and the
logits of the answer are equal up to rounding, for any number of segments.

The paper's code has one context per question. Here each of several chunks has its own BOS, heading,
slots counted from 0 and cue, and chunks follow one another without separator; there the whole
context has one of each, and segments may end in the middle of a text.

Titles are not read, since the paper has none. A question without chunks begins without a BOS.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sac_rag.compressors import checkpoint
from sac_rag.compressors.anchor_selection import num_anchors
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.sac import SAC
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import PromptFormat

# The pieces of the paper's prompt, each tokenized separately, as there (raw).
FORMAT = PromptFormat(
    chat=False,
    raw=True,
    chunk="{chunk}",
    separator="",
    user="{chunks}\n### Question:\n{question}\n### Answer:\n",
)

_HEADING = "### Context:\n"  # after the BOS
_SEGMENT = 510  # tokens
_SCALE = 2  # of LoRA, whatever its rank
_PROJECTIONS = ("q_proj", "v_proj")
_LAYER = re.compile(r"model\.model\.layers\.([0-9]+)\.")


def convert(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    ratio: int | None = None,
) -> SAC:
    """Converts one of the authors' files to the folder of a compressor, whole or not at all.

    Args:
        adapter: Their file, `adapter.pt` or `instruction_adapter.pt`.
        base: The model it was trained for: a default model's name, a local folder or a hub id.
        out: A folder that does not exist yet, or is empty.
        ratio: Source tokens per anchor, if the number of slots does not determine it.

    Returns:
        The compressor that was written, on its model.

    Raises:
        ValueError: if `out` is not empty, or as `load`; where possible before the model is read.
        OSError: if `out` cannot be written.
    """
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} must be a folder that is new or empty, was: "
            f"{'one that holds something' if folder.is_dir() else 'a file'}; give another one"
        )
    config, weights = _read(adapter, ratio)
    compressor = _fitted(config, weights, Generator.from_pretrained(base), adapter)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        made = Path(beside) / "made"
        checkpoint.save(compressor, made, prompt_format=FORMAT)
        made.replace(folder)
    return compressor


def load(adapter: str | os.PathLike[str], generator: Generator, *, ratio: int | None = None) -> SAC:
    """Reads one of the authors' files.

    Args:
        adapter: Their file.
        generator: The model it was trained for.
        ratio: Source tokens per anchor, if the number of slots does not determine it.

    Raises:
        ValueError: if it is not a file of tensors only, tensors are missing, superfluous or of
            another shape, the model is another one, or the ratio is ambiguous.
    """
    config, weights = _read(adapter, ratio)
    return _fitted(config, weights, generator, adapter)


def _fitted(
    config: CompressorConfig,
    weights: Mapping[str, Tensor],
    generator: Generator,
    adapter: str | os.PathLike[str],
) -> SAC:
    """The compressor, after a check that the weights are for this model."""
    theirs = (len(weights["cue"]), sum(name.endswith("q_proj.lora_A.weight") for name in weights))
    ours = (generator.hidden_size, generator.kv_shape[0])
    if theirs != ours:
        raise ValueError(
            f"{adapter} is for a model of hidden size {theirs[0]} with {theirs[1]} layers, but "
            f"this one has hidden size {ours[0]} and {ours[1]} layers; "
            "give the base model that it was trained for (Llama-3.2-1B)"
        )
    bos = generator.tokenizer.bos_token
    if not bos:
        raise ValueError(
            "the authors' prompts begin with a BOS, and this model's tokenizer has none; "
            "give the base model that the adapter was trained for (Llama-3.2-1B)"
        )
    compressor = SAC(generator, replace(config, heading=f"{bos}{_HEADING}"))
    compressor.load_weights(weights)
    return compressor


def _read(
    adapter: str | os.PathLike[str], ratio: int | None
) -> tuple[CompressorConfig, dict[str, Tensor]]:
    """Their file as a config, without the heading yet, and weights under our names."""
    tensors = _tensors(adapter)
    layers = max(1, len({match[1] for match in map(_LAYER.match, tensors) if match}))
    lora = [
        f"model.model.layers.{layer}.self_attn.{projection}.lora_"
        for layer in range(layers)
        for projection in _PROJECTIONS
    ]
    expected = {"role_tokens", "special_tokens", *(f"{name}{m}" for name in lora for m in "AB")}
    for what, names in (
        ("lacks", expected - tensors.keys()),
        ("must not have", tensors.keys() - expected),
    ):
        if names:
            raise ValueError(
                f"{adapter} {what} {len(names)} tensors, the first is {min(names)!r}: expected "
                "role_tokens, special_tokens, and lora_A and lora_B of each layer's q_proj and "
                "v_proj; it is no adapter of the authors, or not a whole one"
            )
    # Sizes that all other tensors must agree with.
    slots, hidden = (*tensors["role_tokens"].shape, 0, 0)[:2]
    rank = _width(tensors[f"{lora[0]}A"])
    _require_shape(adapter, tensors, "role_tokens", (slots, hidden))
    _require_shape(adapter, tensors, "special_tokens", (2, hidden))
    weights = {"anchor_embedding": tensors["role_tokens"], "cue": tensors["special_tokens"][1]}
    for name in lora:
        _require_shape(adapter, tensors, f"{name}A", (hidden, rank))
        _require_shape(adapter, tensors, f"{name}B", (rank, _width(tensors[f"{name}B"])))
        for matrix in "AB":
            # y = W x + scale (x A) B, where peft has B (A x).
            ours = f"{name.removeprefix('model.')}{matrix}.weight"
            weights[ours] = tensors[f"{name}{matrix}"].T
    config = CompressorConfig(
        method=SAC.method,
        ratio=_ratio(adapter, slots, ratio),
        segment_tokens=_SEGMENT,
        attention="full",
        anchor_embedding="slot",
        first_position=1,
        lora_rank=rank,
        lora_alpha=_SCALE * rank,
        lora_targets=_PROJECTIONS,
    )
    return config, {name: tensor.float() for name, tensor in weights.items()}


def _tensors(adapter: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of the file, which must be a dict of tensors and nothing else."""
    try:
        file = Path(adapter).expanduser().open("rb")
    except OSError as error:
        raise ValueError(f"{adapter} cannot be read: {error}") from error
    try:
        with file:
            held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for damaged bytes
        # Its text is left out, since it advises to let the file run code.
        raise ValueError(
            f"{adapter} must be a dict of tensors written by torch.save, but it is something else, "
            f"damaged, or has code in it, of which nothing was run ({type(error).__name__}); "
            "get the authors' adapter.pt again"
        ) from error
    if not isinstance(held, Mapping):
        raise ValueError(
            f"{adapter} must hold a flat dict of tensors, was: {type(held).__name__}; "
            "give the authors' adapter.pt"
        )
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{adapter} must hold a flat dict of tensors, but its entry {name!r:.80} is a "
                f"{type(tensor).__name__}; give the authors' adapter.pt"
            )
        plain = tensor.layout == torch.strided and tensor.is_floating_point()
        if not plain or not tensor.float().isfinite().all():
            raise ValueError(
                f"the tensors of {adapter} must be of finite floats, but {name!r} is "
                f"{'not finite' if plain else f'{tensor.layout} of {tensor.dtype}'}; "
                "get the authors' adapter.pt again"
            )
    return dict(held)


def _width(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.ndim else 0


def _require_shape(
    adapter: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    name: str,
    expected: tuple[int, int],
) -> None:
    got = tuple(tensors[name].shape)
    if got != expected or 0 in got:
        raise ValueError(
            f"{name!r} of {adapter} must have shape {expected}, none of it 0, to fit the other "
            f"tensors, was: {got}; get the authors' adapter.pt again"
        )


def _ratio(adapter: str | os.PathLike[str], slots: int, wanted: int | None) -> int:
    """The ratio at which a whole segment has this number of anchors."""
    fitting = [r for r in range(1, _SEGMENT + 1) if num_anchors(_SEGMENT, r) == slots]
    slot_count = f"{adapter} has {slots} slots (role_tokens) for a segment of {_SEGMENT} tokens"
    if not fitting:
        raise ValueError(f"{slot_count}, which no ratio gives; give the authors' adapter.pt")
    if wanted is not None:
        if wanted not in fitting:
            raise ValueError(
                f"{slot_count}, which is ratio {_listed(fitting)}, was given: {wanted}"
            )
        return wanted
    # All ratios of the paper divide a segment: 10 slots are 51x, although 50x gives 10, too.
    if slots * (_SEGMENT // slots) == _SEGMENT:
        return _SEGMENT // slots
    if len(fitting) > 1:
        raise ValueError(f"{slot_count}, which can be ratio {_listed(fitting)}; give one of them")
    return fitting[0]


def _listed(ratios: list[int]) -> str:
    return f"{ratios[0]} to {ratios[-1]}" if len(ratios) > 1 else str(ratios[0])
