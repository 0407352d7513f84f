"""Infinities and NaN never reach a store, nor an answer from one that has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor

from sac_rag.cached import CachedCompressor
from sac_rag.compressors.base import Compressor
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import DiskStore

SHORT = Decoding(max_new_tokens=2)


def overflow(generator: Generator) -> None:
    """Values of 1e5 and more, finite in float32 and bfloat16."""
    generator.model.model.layers[1].self_attn.v_proj.weight.data.mul_(1e6)


def damage(generator: Generator) -> None:
    """One token's embedding is NaN."""
    token = generator.tokenize(PROSE[0])[3]
    generator.model.get_input_embeddings().weight.data[token] = torch.nan


@pytest.fixture
def own(make_generator: Callable[..., Generator]) -> Generator:
    return make_generator("llama")


@pytest.mark.parametrize("method", ["full", "sac", "learned"])
@pytest.mark.parametrize(
    ("spoil", "dtype"),
    [
        (overflow, "float16"),
        (damage, "float16"),
        (damage, "bfloat16"),
        (damage, "float32"),
        (damage, "int8"),
    ],
)
def test_kv_that_is_not_finite_is_an_error_and_is_not_stored(
    own: Generator, spoil: Callable[[Generator], None], dtype: Any, method: str
) -> None:
    store: dict[str, AnchorKV] = {}
    cached = CachedCompressor(compressor_in(own, method, dtype), store)
    rag = SacRAG(cached)
    spoil(own)
    for use in (rag.precompress, lambda texts: rag.answer("What?", texts, SHORT)):
        with pytest.raises(ValueError, match=r"must be finite to be kept.*bfloat16 or float32"):
            use(PROSE[:1])
    assert not store


def compressor_in(generator: Generator, method: str, dtype: Any) -> Compressor:
    compressor = make_compressor(generator, method)
    return compressor.storing(dtype)


def test_kv_that_is_finite_in_the_stored_dtype_is_kept(own: Generator) -> None:
    overflow(own)
    assert compressor_in(own, "full", "bfloat16").compress(PROSE[:1])[0].is_finite


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_an_entry_that_was_stored_with_infinities_is_no_hit(
    llama: Generator, disk: DiskStore, number: float
) -> None:
    compressor = make_compressor(llama, "full")
    rag = SacRAG(CachedCompressor(compressor, disk), on_miss="text")
    (kv,) = compressor.compress(PROSE[:1])
    values = kv.values.clone()
    values[1, 2] = number
    disk[rag.compressor.key(PROSE[0])] = replace(kv, values=values)
    (report,) = rag.answer("What?", PROSE[:1], SHORT).chunks
    assert (report.read_as, report.status) == (
        "text",
        "corrupt: its keys or values are not finite",
    )
