"""ICAE and 500xCompressor: learned slots behind a text hold what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor
from torch import Tensor

from sac_rag import CachedCompressor, Decoding, SacRAG
from sac_rag.compressors import checkpoint
from sac_rag.compressors.anchor_selection import num_anchors
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.memory import MemoryCompressor
from sac_rag.lm.generator import Generator
from sac_rag.stores import DiskStore

ROUNDING = 1e-4
TOKENS = [9, 8, 7, 6, 5, 4, 3]


def memory_compressor(generator: Generator, method: str, **changes: Any) -> MemoryCompressor:
    compressor = make_compressor(generator, method, **changes)
    assert isinstance(compressor, MemoryCompressor)
    return compressor


def encoded(compressor: Compressor, embeds: Tensor, positions: Tensor) -> Any:
    """Output of the plain decoder stack with LoRA on, causal, for one row."""
    with compressor.generator.running(compressor._adapter) as model, torch.no_grad():
        return model.base_model(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            use_cache=True,
            output_hidden_states=True,
        )


def by_head(cache: Any, start: int) -> tuple[Tensor, Tensor]:
    """Keys and values from a slot on. Shape of each: (layers, kv_heads, slots, head_dim)."""
    keys = torch.stack([layer.keys[0] for layer in cache.layers])
    values = torch.stack([layer.values[0] for layer in cache.layers])
    return keys[:, :, start:], values[:, :, start:]


@pytest.mark.parametrize("method", ["icae", "x500"])
@pytest.mark.parametrize(
    ("positions", "expected"),
    [("appended", [-2, -1, 0, 1, 2, 3, 4, 5, 6]), ("uniform", [0, 1, 2, 3, 4, 5, 6, 1, 4])],
)
def test_slots_stand_behind_the_text_or_spread_over_it(
    llama: Generator, method: str, positions: str, expected: list[int]
) -> None:
    compressor = memory_compressor(llama, method, positions=positions)
    layout = compressor.layout(torch.tensor(TOKENS))
    assert layout.positions.tolist() == expected
    assert layout.anchors.tolist() == [7, 8]
    assert torch.equal(layout.attends_to, torch.ones(9, 9, dtype=torch.bool).tril())
    assert torch.equal(layout.embeds[:7], llama.embed(TOKENS))
    assert torch.equal(layout.embeds[7:], compressor.weights["memory"][:2])


@pytest.mark.parametrize("positions", ["appended", "uniform"])
def test_500x_keeps_the_keys_and_values_of_its_slots(llama: Generator, positions: str) -> None:
    compressor = memory_compressor(llama, "x500", positions=positions, sink="")
    layout = compressor.layout(torch.tensor(TOKENS))
    expected = by_head(encoded(compressor, layout.embeds, layout.positions).past_key_values, 7)
    (kv,) = compressor.compress_tokens([TOKENS])
    keys, values, _ = kv.by_head()
    torch.testing.assert_close(keys, expected[0], atol=ROUNDING, rtol=0)
    torch.testing.assert_close(values, expected[1], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("positions", ["appended", "uniform"])
def test_icae_keeps_what_the_frozen_model_makes_of_the_slots_states(
    llama: Generator, positions: str
) -> None:
    compressor = memory_compressor(llama, "icae", positions=positions, sink="")
    layout = compressor.layout(torch.tensor(TOKENS))
    states = encoded(compressor, layout.embeds, layout.positions).last_hidden_state[0, 7:]
    with torch.no_grad():
        read = llama.model(
            inputs_embeds=states[None], position_ids=layout.positions[None, 7:], use_cache=True
        )
    expected = by_head(read.past_key_values, 0)
    (kv,) = compressor.compress_tokens([TOKENS])
    keys, values, _ = kv.by_head()
    torch.testing.assert_close(keys, expected[0], atol=ROUNDING, rtol=0)
    torch.testing.assert_close(values, expected[1], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("method", ["icae", "x500"])
def test_appended_slots_end_where_the_next_text_begins(llama: Generator, method: str) -> None:
    (kv,) = memory_compressor(llama, method).compress_tokens([TOKENS])
    assert kv.num_tokens == len(TOKENS)
    assert kv.positions.unique().tolist() == [5, 6]


@pytest.mark.parametrize("method", ["icae", "x500"])
@pytest.mark.parametrize("positions", ["appended", "uniform"])
def test_a_text_of_several_segments_has_the_slots_of_each(
    llama: Generator, method: str, positions: str
) -> None:
    compressor = memory_compressor(llama, method, positions=positions, segment_tokens=5)
    (kv,) = compressor.compress_tokens([TOKENS])
    segments = compressor.compress_tokens([TOKENS[:5], TOKENS[5:]])
    assert kv.num_entries == sum(segment.num_entries for segment in segments)
    torch.testing.assert_close(
        kv.values, torch.cat([s.values for s in segments]), atol=ROUNDING, rtol=0
    )


@pytest.mark.parametrize("method", ["icae", "x500"])
def test_they_are_saved_and_loaded_with_other_fingerprints_for_other_positions(
    llama: Generator, tmp_path: Path, method: str
) -> None:
    appended = memory_compressor(llama, method)
    uniform = memory_compressor(llama, method, positions="uniform")
    assert appended.fingerprint != uniform.fingerprint
    for number, compressor in enumerate((appended, uniform)):
        checkpoint.save(compressor, tmp_path / str(number))
        loaded = checkpoint.load(tmp_path / str(number), llama)
        assert loaded.fingerprint == compressor.fingerprint
        assert loaded.compress(PROSE[:1])[0].bit_equal(compressor.compress(PROSE[:1])[0])


@pytest.mark.parametrize("method", ["icae", "x500"])
@pytest.mark.parametrize(
    "changes", [{"anchor_embedding": "shared"}, {"attention": "full"}, {"anchors": "surprisal"}]
)
def test_settings_of_other_methods_are_refused(
    llama: Generator, method: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{method} keeps memory slots"):
        make_compressor(llama, method, **changes)


@pytest.mark.parametrize("method", ["icae", "x500"])
def test_another_ratio_is_refused(llama: Generator, method: str) -> None:
    compressor = memory_compressor(llama, method)
    assert compressor.at_ratio(3) is compressor
    with pytest.raises(ValueError, match="for ratio 3 only"):
        compressor.at_ratio(5)


def test_sac_has_no_slots_to_place(llama: Generator) -> None:
    with pytest.raises(ValueError, match="positions='uniform'"):
        make_compressor(llama, "sac", positions="uniform")


@pytest.mark.parametrize("method", ["icae", "x500"])
def test_they_answer_from_a_store_on_disk_as_when_computed(
    llama: Generator, home: Path, tmp_path: Path, method: str
) -> None:
    compressor = memory_compressor(llama, method)
    short = Decoding(max_new_tokens=8)
    with DiskStore(tmp_path / "anchors") as store:
        rag = SacRAG(CachedCompressor(compressor, store, guard=False), decoding=short)
        computed = rag.answer("Who counted the ships?", PROSE[:3])
        read = rag.answer("Who counted the ships?", PROSE[:3])
    assert [chunk.status for chunk in computed.chunks] == ["absent"] * 3
    assert [chunk.status for chunk in read.chunks] == ["hit"] * 3
    assert read.text == computed.text
    tokens = [len(llama.tokenize(text)) for text in PROSE[:3]]
    assert [chunk.num_anchors for chunk in read.chunks] == [num_anchors(n, 3) for n in tokens]
