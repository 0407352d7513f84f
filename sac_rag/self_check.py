"""Self check: tests on the loaded model that moved chunks give the logits of plain text."""

from __future__ import annotations

import json

import torch
import transformers
from torch import Tensor

from sac_rag import default_models as models
from sac_rag.compressors.full import Full
from sac_rag.errors import UnsupportedModelError
from sac_rag.kv import AnchorKV
from sac_rag.lm.attention import as_inputs
from sac_rag.lm.digests import digest_json
from sac_rag.lm.generator import Generator
from sac_rag.lm.rope import relocation_error
from sac_rag.prompts.assemble import assemble
from sac_rag.whole_file import whole_file

# Largest relative error that counts as rounding. Measured on 2 to 30 layers: at most 1e-5 in
# float32 and 0.03 in bfloat16; rotating the wrong pairs or ignoring a mask gives 0.3 and more.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
_OFFSETS = (1, 509, 1777)


def self_check(generator: Generator, *, ragged: bool = False) -> float:
    """Compares moved with unmoved reading, and records a success.

    It runs once per model and version of torch and transformers; later calls read the record in the
    package's cache folder.

    Args:
        generator: The loaded model.
        ragged: Whether heads with different numbers of entries are tested too.

    Returns:
        The largest relative error, measured now or read from the record.

    Raises:
        UnsupportedModelError: if the error is more than rounding: answers would be wrong.
    """
    about = {
        **generator.identity,
        "device": generator.device.type,
        "attention": generator.model.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ragged": ragged,
    }
    record = models.home() / "self_checks" / f"{digest_json(about)}.json"
    try:
        return float(json.loads(record.read_text())["relative_error"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no record, or an incomplete one: measure
    with generator.running() as model:
        errors = [
            relocation_error(model, generator.frequencies, offset)
            for offset in _OFFSETS
            if offset + 24 <= generator.max_positions
        ]
    errors.append(_reading_error(generator))
    if ragged:
        errors.append(_ragged_error(generator))
    error = float(torch.tensor(errors).max())  # NaN if any is, which Python's max would lose
    allowed = _ROUNDING[generator.dtype]
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{generator.model.config.model_type}: a moved chunk must read like plain text "
            f"(relative error at most {allowed} in {generator.dtype}), was: {error:.3g}; "
            + (
                "if it passes without shared budgets, use compressor='full' or budget='uniform'"
                if ragged
                else "this model's chunks cannot be cached"
            )
        )
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(record) as draft:
            draft.write_text(json.dumps({"relative_error": error, **about}, indent=1))
    except OSError:
        pass  # the next start has to measure again
    return error


@torch.no_grad()
def _reading_error(generator: Generator) -> float:
    """Relative error of the logits behind one whole chunk, against plain reading."""
    kv, question, ids = _read_chunk(generator)
    prompt = assemble([[kv, question]], generator)
    with generator.running() as model:
        got = model(**prompt.inputs()).logits[0]
        plain = model(torch.tensor([ids], device=generator.device)).logits[0]
    return _relative(got, plain[-len(question) :])


@torch.no_grad()
def _ragged_error(generator: Generator) -> float:
    """Relative error of the logits behind a chunk of which heads keep different tokens.

    The reference keeps all tokens and masks, per head, those that the chunk lacks.
    """
    whole, question, _ = _read_chunk(generator)
    is_kept = torch.arange(whole.num_entries, device=generator.device) * 7919 % 13 < 6
    ragged = assemble([[whole.map(lambda tensor: tensor[is_kept]), question]], generator)
    full = assemble([[whole, question]], generator)
    # Entries of a whole chunk are in the order of tokens.
    by_token = (~is_kept).view(whole.num_tokens, whole.num_layers, whole.num_kv_heads)
    masks = []
    for dropped in by_token.permute(1, 2, 0):
        mask = full.masks[0].repeat(1, whole.num_kv_heads, 1, 1)
        blocked = torch.finfo(mask.dtype).min
        mask[..., : whole.num_tokens].masked_fill_(dropped[None, :, None], blocked)
        masks.append(mask)
    try:
        with generator.running() as model:
            got = model(**ragged.inputs()).logits[0]
            expected = model(**{**full.inputs(), **as_inputs(masks)}).logits[0]
    except RuntimeError:  # mismatched shapes: the model does not pass `entry_masks` to its layers
        return float("inf")
    return _relative(got, expected)


def _read_chunk(generator: Generator) -> tuple[AnchorKV, list[int], list[int]]:
    """A chunk of a few fixed tokens, every token kept; a question; both as one text."""
    vocabulary = generator.model.get_input_embeddings().weight.shape[0]
    ids = ((torch.arange(40) * 7919 + 13) % vocabulary).tolist()
    config = Full.default_config(stored_dtype=generator.dtype_name)
    (kv,) = Full(generator, config).compress_tokens([ids[:32]])
    return kv, ids[32:], ids


def _relative(got: Tensor, expected: Tensor) -> float:
    difference = (got.float() - expected.float()).norm()
    return float(difference / expected.float().norm().clamp_min(1e-12))
