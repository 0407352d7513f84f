"""AnchorKV refuses what does not fit together, and equality means equal bits."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from sac_rag.kv import AnchorKV

SHAPE = (2, 3, 4, 8)


def make_kv(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> AnchorKV:
    random = torch.Generator().manual_seed(seed)
    values = {
        "keys": torch.randn(SHAPE, generator=random).to(dtype),
        "values": torch.randn(SHAPE, generator=random).to(dtype),
        "positions": torch.tensor([2, 7, 12, 17], dtype=torch.int32),
        "num_tokens": 20,
    }
    return AnchorKV(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(SHAPE[1:])}, r"shape \(layers, kv_heads, anchors, head_dim\), were"),
        (
            {"keys": torch.zeros(SHAPE[1:]), "values": torch.zeros(SHAPE[1:])},
            r"were: \(3, 4, 8\) and \(3, 4, 8\)",
        ),
        ({"values": torch.zeros(2, 3, 5, 8)}, r"were: \(2, 3, 4, 8\) and \(2, 3, 5, 8\)"),
        ({"values": torch.zeros(SHAPE, dtype=torch.float16)}, "float32 and torch.float16"),
        (
            {"keys": torch.zeros(SHAPE).int(), "values": torch.zeros(SHAPE).int()},
            "one floating dtype, were: torch.int32 and torch.int32",
        ),
        (
            {"positions": torch.zeros(5, dtype=torch.int32)},
            r"shape \(4,\) or \(2, 3, 4\), was: \(5",
        ),
        ({"positions": torch.zeros(3, 4, dtype=torch.int32)}, r"was: \(3, 4\)"),
        ({"positions": torch.tensor(0, dtype=torch.int32)}, r"was: \(\)"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, "must be int32, were: torch.int64"),
        ({"positions": torch.zeros(4)}, "must be int32, were: torch.float32"),
        ({"num_tokens": 3}, "4 .* 3|no more than it has tokens"),
        ({"num_tokens": 0}, "no more than it has tokens"),
        (
            {
                "keys": torch.zeros(2, 3, 0, 8),
                "values": torch.zeros(2, 3, 0, 8),
                "positions": torch.zeros(0, dtype=torch.int32),
            },
            "at least 1 anchor",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_kv(**changes)


def test_heads_may_keep_different_tokens() -> None:
    positions = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
    assert make_kv(positions=positions).positions is positions


def test_as_many_anchors_as_tokens_are_allowed() -> None:
    assert make_kv(num_tokens=4).num_anchors == 4


def test_a_value_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        make_kv().num_tokens = 21  # type: ignore[misc]


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [(torch.float32, 2 * 192 * 4 + 16), (torch.bfloat16, 2 * 192 * 2 + 16)]
)
def test_sizes_are_those_of_the_tensors(dtype: torch.dtype, nbytes: int) -> None:
    kv = make_kv(dtype)
    assert (kv.num_anchors, kv.dtype, kv.nbytes) == (4, dtype, nbytes)


def test_another_dtype_rounds_keys_and_values_and_nothing_else() -> None:
    kv = make_kv()
    half = kv.to(dtype=torch.float16)
    assert torch.equal(half.keys, kv.keys.half())
    assert torch.equal(half.values, kv.values.half())
    assert torch.equal(half.positions, kv.positions)
    assert half.positions.dtype == torch.int32
    assert half.num_tokens == kv.num_tokens


def test_another_device_takes_all_tensors() -> None:
    moved = make_kv().to("meta")
    assert {moved.keys.device.type, moved.values.device.type, moved.positions.device.type} == {
        "meta"
    }


def test_a_dtype_without_fractions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"floating dtype, were: torch\.int8"):
        make_kv().to(dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_bits_are_equal_however_they_lie_in_memory(dtype: torch.dtype) -> None:
    kv = make_kv(dtype)
    scattered = kv.keys.transpose(0, 3).contiguous().transpose(0, 3)
    assert not scattered.is_contiguous()
    assert kv.bit_equal(replace(kv, keys=scattered))


def test_nan_bits_equal_themselves() -> None:
    keys = torch.randn(SHAPE)
    keys[0, 0, 0, 0] = float("nan")
    assert make_kv(keys=keys).bit_equal(make_kv(keys=keys.clone()))


def test_another_nan_is_not_equal() -> None:
    quiet = torch.randn(SHAPE)
    quiet.view(torch.int32)[0, 0, 0, 0] = 0x7FC00000
    payload = quiet.clone()
    payload.view(torch.int32)[0, 0, 0, 0] = 0x7FC00001
    assert payload[0, 0, 0, 0].isnan()
    assert not make_kv(keys=quiet).bit_equal(make_kv(keys=payload))


def test_minus_zero_is_not_zero() -> None:
    assert not make_kv(keys=torch.zeros(SHAPE)).bit_equal(make_kv(keys=-torch.zeros(SHAPE)))


@pytest.mark.parametrize(
    "change",
    [
        {"keys": torch.randn(SHAPE)},
        {"values": torch.randn(SHAPE)},
        {"positions": torch.tensor([2, 7, 12, 18], dtype=torch.int32)},
        {"positions": torch.tensor([2, 7, 12, 17], dtype=torch.int32).expand(2, 3, 4)},
        {"num_tokens": 21},
    ],
)
def test_any_other_part_is_not_equal(change: dict[str, Any]) -> None:
    kv = make_kv()
    assert not kv.bit_equal(replace(kv, **change))


def test_the_same_bytes_in_another_dtype_are_not_equal() -> None:
    zeros, halves = torch.zeros(SHAPE).half(), torch.zeros(SHAPE).bfloat16()
    assert not make_kv(keys=zeros, values=zeros).bit_equal(make_kv(keys=halves, values=halves))


def test_another_number_of_anchors_is_not_equal() -> None:
    kv = make_kv()
    fewer = AnchorKV(kv.keys[:, :, :3], kv.values[:, :, :3], kv.positions[:3], 20)
    assert not kv.bit_equal(fewer)


def test_joined_segments_stand_one_after_the_other() -> None:
    one = make_kv()
    two = make_kv(seed=1, positions=one.positions + 20, num_tokens=18)
    joined = AnchorKV.join([one, two])
    assert torch.equal(joined.keys[:, :, :4], one.keys)
    assert torch.equal(joined.keys[:, :, 4:], two.keys)
    assert torch.equal(joined.values, torch.cat([one.values, two.values], dim=2))
    assert joined.positions.tolist() == [2, 7, 12, 17, 22, 27, 32, 37]
    assert joined.num_tokens == 38


def test_positions_of_single_heads_are_joined_too() -> None:
    positions = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
    joined = AnchorKV.join([make_kv(positions=positions), make_kv(positions=positions + 20)])
    assert torch.equal(joined.positions, torch.cat([positions, positions + 20], dim=2))


def test_one_segment_is_itself() -> None:
    kv = make_kv()
    assert AnchorKV.join([kv]) is kv


def test_no_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one segment, got none"):
        AnchorKV.join([])
