"""Anchors sit where the reference puts them, and segments cover a chunk without overlap."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sac_rag.compressors.anchor_selection import (
    num_anchors,
    segment_bounds,
    strided_anchors,
    top_anchors,
)


@pytest.mark.parametrize(("ratio", "count", "first"), [(5, 102, 2), (15, 34, 7), (51, 10, 25)])
def test_a_whole_segment_has_the_anchors_of_the_reference(
    ratio: int, count: int, first: int
) -> None:
    anchors = strided_anchors(510, ratio)
    assert len(anchors) == count
    assert anchors[0] == first
    assert torch.equal(anchors.diff(), torch.full((count - 1,), ratio))


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "expected"),
    [
        (1, 1, [0]),
        (1, 51, [0]),
        (7, 15, [0]),  # one token too short to have a middle at 7
        (8, 15, [7]),
        (22, 15, [7]),
        (23, 15, [7, 22]),
        (4, 2, [0, 2]),
        (6, 1, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_short_segment_has_an_anchor_all_the_same(
    num_tokens: int, ratio: int, expected: list[int]
) -> None:
    assert strided_anchors(num_tokens, ratio).tolist() == expected


@given(num_tokens=st.integers(1, 2000), ratio=st.integers(1, 600))
def test_every_block_that_reaches_its_middle_has_one_anchor_there(
    num_tokens: int, ratio: int
) -> None:
    middles = [i for i in range(num_tokens) if i % ratio == (ratio - 1) // 2]
    assert strided_anchors(num_tokens, ratio).tolist() == (middles or [0])


def test_anchors_are_indices() -> None:
    assert strided_anchors(10, 5).dtype == torch.int64


@pytest.mark.parametrize(("num_tokens", "ratio"), [(0, 5), (-1, 5), (5, 0), (5, -3)])
def test_counts_below_one_are_refused_with_the_numbers(num_tokens: int, ratio: int) -> None:
    with pytest.raises(ValueError, match=rf"at least 1, were: {num_tokens} and {ratio}"):
        strided_anchors(num_tokens, ratio)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (0, []),
        (1, [(0, 1)]),
        (509, [(0, 509)]),
        (510, [(0, 510)]),
        (511, [(0, 510), (510, 511)]),
        (1530, [(0, 510), (510, 1020), (1020, 1530)]),
    ],
)
def test_a_chunk_is_cut_into_whole_segments_and_a_rest(
    num_tokens: int, expected: list[tuple[int, int]]
) -> None:
    assert segment_bounds(num_tokens, 510) == expected


@given(num_tokens=st.integers(1, 3000), segment_tokens=st.integers(1, 700))
def test_segments_cover_a_chunk_in_order_without_gap_or_overlap(
    num_tokens: int, segment_tokens: int
) -> None:
    bounds = segment_bounds(num_tokens, segment_tokens)
    assert [i for begin, end in bounds for i in range(begin, end)] == list(range(num_tokens))
    assert all(end - begin == segment_tokens for begin, end in bounds[:-1])


@given(st.integers(1, 600), st.integers(1, 60))
def test_chosen_anchors_are_as_many_as_strided_ones(num_tokens: int, ratio: int) -> None:
    scores = torch.linspace(0, 1, num_tokens)
    chosen = top_anchors(scores, ratio)
    assert len(chosen) == num_anchors(num_tokens, ratio) == len(strided_anchors(num_tokens, ratio))
    assert torch.equal(chosen, torch.arange(num_tokens - len(chosen), num_tokens))


def test_every_head_takes_its_own_best_tokens_in_reading_order() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8], [0.7, 0.0, 0.6, 0.1]])
    assert top_anchors(scores, 2).tolist() == [[1, 3], [0, 2]]
