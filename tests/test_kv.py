"""AnchorKV refuses what does not fit together, and equality means equal bits."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from sac_rag.kv import AnchorKV

SHAPE = (9, 8)  # of 9 entries
HEADS = torch.tensor([0, 4, 4, 0, 5, 2, 4, 3, 0], dtype=torch.int16)  # none of head 1
POSITIONS = torch.tensor([2, 7, 12, 17, 2, 0, 3, 19, 4], dtype=torch.int32)


def make_kv(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> AnchorKV:
    random = torch.Generator().manual_seed(seed)
    values = {
        "keys": torch.randn(SHAPE, generator=random).to(dtype),
        "values": torch.randn(SHAPE, generator=random).to(dtype),
        "positions": POSITIONS,
        "heads": HEADS,
        "num_layers": 2,
        "num_kv_heads": 3,
        "num_tokens": 20,
    }
    return AnchorKV(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(9)}, r"shape \(entries, head_dim\), were: \(9,\) and \(9, 8\)"),
        (
            {"keys": torch.zeros(1, *SHAPE), "values": torch.zeros(1, *SHAPE)},
            r"were: \(1, 9, 8\) and \(1, 9, 8\)",
        ),
        ({"values": torch.zeros(9, 7)}, r"were: \(9, 8\) and \(9, 7\)"),
        ({"values": torch.zeros(SHAPE, dtype=torch.float16)}, "float32 and torch.float16"),
        (
            {"keys": torch.zeros(SHAPE).int(), "values": torch.zeros(SHAPE).int()},
            "one floating dtype, were: torch.int32 and torch.int32",
        ),
        ({"positions": POSITIONS[:8]}, r"positions must be torch.int32 of shape \(9,\), were: .*8"),
        (
            {"positions": POSITIONS[:8], "heads": HEADS[:8]},
            r"positions must be torch.int32 of shape \(9,\), were: .*8",
        ),
        ({"positions": POSITIONS[:, None]}, r"were: torch.int32 of shape \(9, 1\)"),
        ({"positions": POSITIONS.long()}, "were: torch.int64"),
        ({"positions": POSITIONS.float()}, "were: torch.float32"),
        ({"heads": HEADS[:8]}, r"heads must be torch.int16 of shape \(9,\)"),
        ({"heads": HEADS.int()}, "were: torch.int32"),
        ({"heads": HEADS + 1}, "heads must be from 0 to 5, were: 1 to 6"),
        ({"heads": HEADS - 1}, "heads must be from 0 to 5, were: -1 to 4"),
        ({"num_layers": 0}, "from 1 to 32768 KV heads in all, were: 0 layers of 3"),
        ({"num_kv_heads": 2**15}, "were: 2 layers of 32768"),
        ({"num_tokens": 1}, "at most one per token and head, were: 9 for 1 tokens and 6"),
        ({"num_tokens": 0}, "at most one per token and head"),
        (
            {
                "keys": torch.zeros(0, 8),
                "values": torch.zeros(0, 8),
                "positions": POSITIONS[:0],
                "heads": HEADS[:0],
            },
            "at least 1 entry",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_kv(**changes)


def test_heads_may_keep_different_numbers_of_tokens_or_none() -> None:
    kv = make_kv()
    assert kv.counts.tolist() == [[3, 0, 1], [1, 3, 1]]
    assert kv.num_entries == 9
    assert kv.kv_shape == (2, 3, 8)


def test_the_ratio_is_the_mean_of_source_tokens_for_each_entry() -> None:
    assert make_kv().ratio == 20 * 6 / 9
    assert make_kv().first(3).ratio == 20 * 6 / 3
    every_fifth = torch.zeros(2, 3, 4, 8)
    assert AnchorKV.uniform(every_fifth, every_fifth, POSITIONS[:4], 20).ratio == 5


def test_a_value_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        make_kv().num_tokens = 21  # type: ignore[misc]


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_sizes_are_those_of_the_tensors(dtype: torch.dtype, itemsize: int) -> None:
    kv = make_kv(dtype)
    assert (kv.dtype, kv.nbytes) == (dtype, 9 * (2 * 8 * itemsize + 4 + 2))


def test_another_dtype_rounds_keys_and_values_and_nothing_else() -> None:
    kv = make_kv()
    half = kv.to(dtype=torch.float16)
    assert torch.equal(half.keys, kv.keys.half())
    assert torch.equal(half.values, kv.values.half())
    assert half.positions is kv.positions
    assert half.heads is kv.heads
    assert (half.kv_shape, half.num_tokens) == (kv.kv_shape, kv.num_tokens)


def test_another_device_takes_all_tensors() -> None:
    moved = make_kv().to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}


def test_a_dtype_without_fractions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"floating dtype, were: torch\.int8"):
        make_kv().to(dtype=torch.int8)


# Parts.


def test_the_first_entries_are_views_of_the_same_chunk() -> None:
    kv = make_kv()
    part = kv.first(4)
    assert part.keys.data_ptr() == kv.keys.data_ptr()
    assert torch.equal(part.values, kv.values[:4])
    assert part.positions.tolist() == [2, 7, 12, 17]
    assert part.heads.tolist() == [0, 4, 4, 0]
    assert (part.kv_shape, part.num_tokens) == (kv.kv_shape, 20)
    assert kv.first(9) is kv
    assert part.first(2).bit_equal(kv.first(2))


@pytest.mark.parametrize("entries", [0, -1, 10])
def test_no_more_entries_are_taken_than_there_are(entries: int) -> None:
    with pytest.raises(ValueError, match=f"entries must be from 1 to 9, was: {entries}"):
        make_kv().first(entries)


# Rectangles.


@pytest.mark.parametrize("own", [False, True], ids=["shared positions", "own positions"])
def test_a_rectangle_is_laid_out_anchor_after_anchor_and_found_again(own: bool) -> None:
    keys, values = torch.randn(2, 2, 3, 4, 8)
    positions = torch.arange(24 if own else 4, dtype=torch.int32)
    positions = positions.view(2, 3, 4) if own else positions
    kv = AnchorKV.uniform(keys, values, positions, 30)
    assert kv.counts.tolist() == [[4, 4, 4], [4, 4, 4]]
    assert kv.heads.tolist() == 4 * [0, 1, 2, 3, 4, 5]
    assert torch.equal(kv.keys[6], keys[0, 0, 1])
    for got, expected in zip(kv.by_head(), (keys, values, positions), strict=True):
        assert torch.equal(got, expected.expand(got.shape))
    fewer = kv.first(12).by_head()
    for got, expected in zip(fewer, (keys, values), strict=False):
        assert torch.equal(got, expected[:, :, :2])


def test_the_entries_of_a_rectangle_are_in_text_order_whatever_theirs_is() -> None:
    keys, values = torch.randn(2, 2, 3, 4, 8)
    kv = AnchorKV.uniform(keys, values, POSITIONS[:4], 20)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    mixed = kv.map(lambda tensor: tensor[order])
    for got, expected in zip(mixed.by_head(), kv.by_head(), strict=True):
        assert torch.equal(got, expected)


def test_heads_with_different_numbers_of_entries_make_no_rectangle() -> None:
    with pytest.raises(ValueError, match=r"same number of entries .* were: 0 to 3"):
        make_kv().by_head()


@pytest.mark.parametrize(
    ("keys", "values", "positions", "message"),
    [
        ((3, 4, 8), (3, 4, 8), (4,), r"\(layers, kv_heads, anchors, head_dim\), were: \(3, 4, 8\)"),
        ((2, 3, 4, 8), (2, 3, 5, 8), (4,), r"were: \(2, 3, 4, 8\) and \(2, 3, 5, 8\)"),
        ((2, 3, 4, 8), (2, 3, 4, 8), (5,), r"shape \(4,\) or \(2, 3, 4\), was: \(5,\)"),
        ((2, 3, 4, 8), (2, 3, 4, 8), (3, 4), r"was: \(3, 4\)"),
    ],
)
def test_what_is_no_rectangle_is_refused(
    keys: tuple[int, ...], values: tuple[int, ...], positions: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorKV.uniform(
            torch.zeros(keys), torch.zeros(values), torch.zeros(positions, dtype=torch.int32), 20
        )


# Equality.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_bits_are_equal_however_they_lie_in_memory(dtype: torch.dtype) -> None:
    kv = make_kv(dtype)
    scattered = kv.keys.T.contiguous().T
    assert not scattered.is_contiguous()
    assert kv.bit_equal(replace(kv, keys=scattered))


def test_nan_bits_equal_themselves() -> None:
    keys = torch.randn(SHAPE)
    keys[0, 0] = float("nan")
    assert make_kv(keys=keys).bit_equal(make_kv(keys=keys.clone()))


def test_another_nan_is_not_equal() -> None:
    quiet = torch.randn(SHAPE)
    quiet.view(torch.int32)[0, 0] = 0x7FC00000
    payload = quiet.clone()
    payload.view(torch.int32)[0, 0] = 0x7FC00001
    assert payload[0, 0].isnan()
    assert not make_kv(keys=quiet).bit_equal(make_kv(keys=payload))


def test_minus_zero_is_not_zero() -> None:
    assert not make_kv(keys=torch.zeros(SHAPE)).bit_equal(make_kv(keys=-torch.zeros(SHAPE)))


@pytest.mark.parametrize(
    "change",
    [
        {"keys": torch.randn(SHAPE)},
        {"values": torch.randn(SHAPE)},
        {"positions": POSITIONS + 1},
        {"heads": HEADS.flip(0)},
        {"num_tokens": 21},
        {"num_layers": 3},
        {"num_kv_heads": 4},
    ],
)
def test_any_other_part_is_not_equal(change: dict[str, Any]) -> None:
    kv = make_kv()
    assert not kv.bit_equal(replace(kv, **change))


def test_the_same_bytes_in_another_dtype_are_not_equal() -> None:
    zeros, halves = torch.zeros(SHAPE).half(), torch.zeros(SHAPE).bfloat16()
    assert not make_kv(keys=zeros, values=zeros).bit_equal(make_kv(keys=halves, values=halves))


def test_another_number_of_entries_is_not_equal() -> None:
    assert not make_kv().bit_equal(make_kv().first(8))


# Segments.


def test_joined_segments_stand_one_after_the_other() -> None:
    one = make_kv()
    two = make_kv(seed=1, positions=one.positions + 20, num_tokens=18)
    joined = AnchorKV.join([one, two])
    assert torch.equal(joined.keys, torch.cat([one.keys, two.keys]))
    assert torch.equal(joined.values, torch.cat([one.values, two.values]))
    assert joined.positions.tolist() == [*POSITIONS.tolist(), *(POSITIONS + 20).tolist()]
    assert joined.heads.tolist() == 2 * HEADS.tolist()
    assert joined.num_tokens == 38


def test_joined_segments_stand_in_the_order_that_is_asked_for() -> None:
    one, two = make_kv(), make_kv(seed=1)
    order = torch.arange(18).view(2, 9).T.flatten()  # in turn
    joined, mixed = AnchorKV.join([one, two]), AnchorKV.join([one, two], order)
    for name, tensor in mixed.tensors().items():
        assert torch.equal(tensor, joined.tensors()[name][order])
    assert mixed.num_tokens == 40


def test_one_segment_is_itself() -> None:
    kv = make_kv()
    assert AnchorKV.join([kv]) is kv


def test_no_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one segment, got none"):
        AnchorKV.join([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_whose_sum_overflows_are_finite_and_infinities_are_not(dtype: torch.dtype) -> None:
    largest = torch.full((4, 8), torch.finfo(dtype).max, dtype=dtype)
    kv = AnchorKV.uniform(
        largest.view(1, 1, 4, 8), largest.view(1, 1, 4, 8), torch.arange(4, dtype=torch.int32), 4
    )
    assert kv.is_finite
    for bad in (float("inf"), float("nan")):
        values = largest.clone()
        values[2, 3] = bad
        assert not replace(kv, values=values).is_finite
