"""A cache with room holds what HF's holds, and copies nothing until the room is full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sac_rag.lm.cache import ROOM, RoomyCache


def entries(count: int, seed: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, count, 4, generator=made), torch.randn(2, 3, count, 4, generator=made)


def caches(length: int, room: int) -> tuple[RoomyCache, DynamicCache]:
    """One layer with the same entries in both."""
    keys, values = entries(length, seed=0)
    larger = torch.zeros(2, 3, length + room, 4), torch.zeros(2, 3, length + room, 4)
    larger[0][:, :, :length], larger[1][:, :, :length] = keys, values
    expected = DynamicCache()
    expected.update(keys, values, 0)
    return RoomyCache([larger], room=room), expected


@pytest.mark.parametrize("counts", [(3, 1, 1), (5, 1), (7, ROOM, 1, 1)])
def test_what_is_appended_is_what_hf_concatenates(counts: tuple[int, ...]) -> None:
    cache, expected = caches(4, room=5)
    with torch.no_grad():
        for seed, count in enumerate(counts, 1):
            appended = cache.update(*entries(count, seed), 0)
            for got, wanted in zip(
                appended, expected.update(*entries(count, seed), 0), strict=True
            ):
                assert torch.equal(got, wanted)
            assert cache.get_seq_length() == expected.get_seq_length()


@torch.no_grad()
def test_nothing_is_copied_while_there_is_room() -> None:
    cache, _ = caches(4, room=5)
    before = cache.layers[0].keys.data_ptr()
    cache.update(*entries(5, seed=1), 0)
    assert cache.layers[0].keys.data_ptr() == before
    cache.update(*entries(1, seed=2), 0)
    extended = cache.layers[0].keys.data_ptr()
    assert extended != before
    for seed in range(ROOM):
        cache.update(*entries(1, seed), 0)
    assert cache.layers[0].keys.data_ptr() == extended


def test_gradients_reach_entries_and_what_is_appended() -> None:
    cache, _ = caches(4, room=5)
    first, second = (tuple(t.requires_grad_() for t in entries(2, seed)) for seed in (1, 2))
    keys, values = cache.update(*first, 0)
    early = (keys * values).sum()
    keys, values = cache.update(*second, 0)
    (early + (keys * values).sum()).backward()
    for appended, times in ((first, 2), (second, 1)):
        assert torch.equal(appended[0].grad, times * appended[1])


@torch.no_grad()
def test_rows_that_hf_has_reordered_are_appended_to_as_they_are_now() -> None:
    cache, expected = caches(4, room=5)
    for each in (cache, expected):
        each.reorder_cache(torch.tensor([1, 0]))
    got, wanted = (each.update(*entries(1, seed=1), 0) for each in (cache, expected))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
