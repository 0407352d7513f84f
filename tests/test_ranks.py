"""A budget spent by rank: no more entries than an equal split, most of them for the best chunk."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import PROSE, make_compressor

from sac_rag import CachedCompressor, Chunk, Decoding, DiskStore, SacRAG, by_rank
from sac_rag.compressors.anchor_selection import num_anchors
from sac_rag.lm.generator import Generator
from sac_rag.ranks import ratios_by_rank

HEADS = 6
QUESTION = "Who counted the ships?"


def num_entries(tokens: int, ratio: int) -> int:
    return num_anchors(tokens * HEADS, ratio)


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    ratio=st.integers(1, 40),
    lowest=st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_it_costs_no_more_than_an_equal_split_and_leaves_nothing_to_give(
    lengths: list[int], ratio: int, lowest: int
) -> None:
    lowest = min(lowest, ratio)
    ratios = ratios_by_rank(lengths, ratio, lowest, num_entries)
    budget = sum(num_entries(n, ratio) for n in lengths)
    spent = sum(map(num_entries, lengths, ratios))
    assert spent <= budget
    assert min(ratios) >= lowest
    assert ratios == sorted(ratios), "the best have the lowest"
    for least, chosen, tokens in zip([lowest, *ratios], ratios, lengths, strict=False):
        if chosen > least:
            more = num_entries(tokens, chosen - 1) - num_entries(tokens, chosen)
            assert spent + more > budget


def test_four_chunks_of_equal_length_have_entries_by_one_over_their_rank() -> None:
    assert ratios_by_rank([200] * 4, 15, 1, num_entries) == [8, 15, 23, 32]
    assert ratios_by_rank([200] * 4, 15, 15, num_entries) == [15] * 4
    assert ratios_by_rank([200], 5, 1, num_entries) == [5]
    assert ratios_by_rank([], 5, 1, num_entries) == []


def test_answers_are_those_of_chunks_with_these_ratios_from_one_store(
    llama: Generator, home: Path, tmp_path: Path
) -> None:
    compressor = make_compressor(llama, "shared", ratio=2)
    with DiskStore(tmp_path / "anchors") as store:
        rag = SacRAG(
            CachedCompressor(compressor, store, guard=False),
            decoding=Decoding(max_new_tokens=6),
            on_miss="raise",
        )
        rag.precompress(PROSE[:4])
        ranked = by_rank(PROSE[:4], rag.compressor, ratio=6)
        ratios = [chunk.ratio for chunk in ranked]
        answer = rag.answer(QUESTION, ranked)
        equal = rag.answer(QUESTION, PROSE[:4], ratio=6)
        same = rag.answer(
            QUESTION, [Chunk(t, ratio=r) for t, r in zip(PROSE, ratios, strict=False)]
        )
    assert [chunk.text for chunk in ranked] == list(PROSE[:4])
    assert answer.text == same.text
    assert answer.usage.kv_bytes <= equal.usage.kv_bytes
    anchors = [report.num_anchors for report in answer.chunks]
    assert anchors[0] > 1.5 * anchors[-1]


def test_chunks_with_a_ratio_or_without_text_take_no_part(llama: Generator) -> None:
    compressor = CachedCompressor(make_compressor(llama, "shared", ratio=2), {})
    own, empty = Chunk(PROSE[0], id="own", ratio=9), Chunk(" ")
    ranked = by_rank([own, empty, *PROSE[1:3]], compressor, ratio=6)
    assert ranked[:2] == [own, empty]
    assert ranked[2:] == by_rank(PROSE[1:3], compressor, ratio=6)


def test_what_has_no_ratios_to_choose_from_is_refused(llama: Generator) -> None:
    single = CachedCompressor(make_compressor(llama, "x500"), {})
    with pytest.raises(ValueError, match=r"several \(anchors='learned'\), was: 'x500'"):
        by_rank(PROSE, single)
    nested = CachedCompressor(make_compressor(llama, "shared", ratio=2), {})
    with pytest.raises(ValueError, match="lowest must be at most ratio, 2, was: 3"):
        by_rank(PROSE, nested, lowest=3)
    with pytest.raises(TypeError, match="one str"):
        by_rank(PROSE[0], nested)  # type: ignore[arg-type]
