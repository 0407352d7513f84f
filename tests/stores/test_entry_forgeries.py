"""Bytes that `encode` did not make are refused, whoever made them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.entries import (
    CIPHER,
    FINGERPRINT,
    KEY,
    KINDS,
    KV,
    OTHER,
    blocks_of,
    header_of,
    make_small,
    read_first,
    reads,
    safetensors_file,
    sealed,
    tensors_of,
    with_checksum,
)

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import QuantizedKV, quantize
from sac_rag.stores.entry import decode, encode

# Whoever can write the folder can make a checksum, too.


QUANTIZED = quantize(KV)
PAIR = torch.stack([KV.keys, KV.values], dim=1)
FORGED = {
    "an extra tensor": sealed(
        safetensors_file({"more": torch.zeros(1), "heads": KV.heads, "positions": KV.positions})
    ),
    "a missing tensor": sealed(safetensors_file({"heads": KV.heads, "kv": PAIR})),
    "tensors in another order": sealed(
        safetensors_file({"positions": KV.positions, "heads": KV.heads, "kv": PAIR})
    ),
    "tensors as safetensors orders them": sealed(
        safetensors.torch.save({"positions": KV.positions, "heads": KV.heads, "kv": PAIR})
    ),
    "float positions": sealed(tensors_of(KV, positions=KV.positions.float())),
    "int64 positions": sealed(tensors_of(KV, positions=KV.positions.long())),
    "too few positions": sealed(tensors_of(KV, positions=KV.positions[:2])),
    "int32 heads": sealed(tensors_of(KV, heads=KV.heads.int())),
    "a head too high": sealed(tensors_of(KV, heads=torch.full_like(KV.heads, 6))),
    "a head below zero": sealed(tensors_of(KV, heads=KV.heads - 1)),
    "entries of another size": sealed(tensors_of(KV, kv=PAIR[:, :, :7])),
    "too few entries": sealed(tensors_of(KV, kv=PAIR[:19])),
    "entries of another dtype": sealed(tensors_of(KV, kv=PAIR.float())),
    "entries of half the size": sealed(tensors_of(KV, kv=PAIR.to(torch.int8))),
    "a header of fewer entries": sealed(tensors_of(KV), shape=[2, 3, 19, 8]),
    "a header of more entries": sealed(tensors_of(KV), shape=[2, 3, 21, 8]),
    "a header of no entries": sealed(tensors_of(KV), shape=[2, 3, 0, 8]),
    "a header of wider heads": sealed(tensors_of(KV), shape=[2, 3, 20, 16]),
    "a header of fewer heads": sealed(tensors_of(KV), shape=[2, 2, 20, 8]),
    "a header of no heads": sealed(tensors_of(KV), shape=[2, 0, 20, 8]),
    "a header of too many heads": sealed(tensors_of(KV), shape=[2**8, 2**8, 20, 8]),
    "a header of negative sizes": sealed(tensors_of(KV), shape=[-2, -3, 20, 8]),
    "a header of huge sizes": sealed(tensors_of(KV), shape=[2, 3, 2**70, 2**70]),
    "a header of another dtype": sealed(tensors_of(KV), dtype="float16"),
    "an unknown dtype": sealed(tensors_of(KV), dtype="float64"),
    "int8 that is none": sealed(tensors_of(KV), dtype="int8"),
    "int8 unannounced": sealed(tensors_of(QUANTIZED)),
    "int8 of another shape": sealed(tensors_of(QUANTIZED), dtype="int8", shape=[3, 2, 20, 8]),
    "more entries than tokens": sealed(tensors_of(KV), num_tokens=3),
    "tokens below zero": sealed(tensors_of(KV), num_tokens=-20),
    "tokens that are no number": sealed(tensors_of(KV), num_tokens="20"),
    "a shape that is no list": sealed(tensors_of(KV), shape="2384"),
    "a shape of lists": sealed(tensors_of(KV), shape=[[2], [3], [20], [8]]),
    "a shape of three": sealed(tensors_of(KV), shape=[6, 20, 8]),
    "a checksum too few": sealed(tensors_of(KV), blocks=[]),
    "a checksum too many": sealed(tensors_of(KV), blocks=2 * blocks_of(tensors_of(KV))),
    "checksums that are no list": sealed(tensors_of(KV), blocks="abc"),
    "checksums that are numbers": sealed(tensors_of(KV), blocks=[5]),
    "another checksum": sealed(tensors_of(KV), blocks=["0" * 32]),
    "another field": sealed(tensors_of(KV), more=1),
    "a cipher too many": sealed(tensors_of(KV), cipher=CIPHER.id),
    "a fingerprint that is no word": sealed(tensors_of(KV), fingerprint=None),
    "another magic": sealed(tensors_of(KV), magic="sac_rag.Other"),
    "a format that is no number": sealed(tensors_of(KV), format="3"),
    "a format that is a truth": sealed(tensors_of(KV), format=True),
    "another key": sealed(tensors_of(KV), key=OTHER),
    "no tensors": sealed(b""),
    "tensors that are none": sealed(b"nonsense" * 100),
    "a huge tensor header": sealed((2**63).to_bytes(8, "little") + tensors_of(KV)[8:]),
    "a tensor header that is a list": sealed(tensors_of(KV).replace(b"{", b"[", 1)),
    "offsets of strings": sealed(tensors_of(KV).replace(b"[0,40]", b"[0," + b'""]', 1)),
    "a deep header": b"[" * 4000 + b"\n",
    "a header without end": b" " * 10**6,
    "a header of many digits": b'{"magic":"sac_rag.AnchorKV","format":3' + b"0" * 4000 + b"}\n",
    "a header that is a number": b"1\n",
    "a header with room for more": sealed(tensors_of(KV)).replace(b"\n", b" " * 64 + b"\n", 1),
    "a header with a space in it": sealed(tensors_of(KV)).replace(b":", b": ", 1),
    "nothing": b"",
}
for _part in ("key_scales", "key_offsets", "value_scales"):
    _tensor = QUANTIZED.tensors()[_part]
    for _name, _changed in {"float32": _tensor.float(), "fewer": _tensor[:1]}.items():
        _payload = tensors_of(QUANTIZED, **{_part: _changed})
        FORGED[f"{_name} {_part}"] = sealed(_payload, dtype="int8")
FORGED["uint8 codes"] = sealed(
    tensors_of(QUANTIZED, kv=torch.zeros(20, 2, 8, dtype=torch.uint8)), dtype="int8"
)


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_entry_is_refused(name: str) -> None:
    assert reads(sealed(tensors_of(KV)))  # what is forged here is otherwise right
    assert reads(sealed(tensors_of(QUANTIZED), dtype="int8"))
    assert not reads(FORGED[name])
    with pytest.raises(CorruptEntryError):
        read_first(FORGED[name], 20)


# Inputs by the thousand.


SMALL = encode(KEY, make_small(), fingerprint=FINGERPRINT)
SMALL_INT8 = encode(KEY, quantize(make_small()))
SMALL_ENCRYPTED = encode(KEY, make_small(), CIPHER)


def mutants(data: bytes, random: Random) -> Iterator[bytes]:
    """Never the bytes themselves."""
    while True:
        mutant = bytearray(data)
        for _ in range(random.randrange(1, 4)):
            place, length = random.randrange(len(data)), random.randrange(1, 16)
            match random.randrange(5):
                case 0:
                    mutant[place : place + 1] = random.randbytes(1)
                case 1:
                    del mutant[place : place + length]
                case 2:
                    mutant[place:place] = random.randbytes(length)
                case 3:
                    mutant[place : place + length] = data[length : 2 * length]
                case 4:
                    del mutant[place:]
        if mutant != data:
            yield bytes(mutant)


def resealed(data: bytes) -> bytes:
    """With a right length and checksum, if the header can be read."""
    line, _, payload = data.partition(b"\n")
    try:
        fields = json.loads(line)
        del fields["xxh3_128"]
        fields["payload_bytes"] = len(payload)
        fields["blocks"] = blocks_of(payload)
    except (ValueError, KeyError, TypeError):
        return data
    return with_checksum(fields, payload)


def test_a_hundred_thousand_wrong_inputs_are_refused_and_raise_nothing_else() -> None:
    random = Random(0)
    count = 0
    for _ in range(20_000):
        size = random.randrange(300)
        assert not reads(random.randbytes(size))
        assert not reads(SMALL[: random.randrange(384)] + random.randbytes(size))
        count += 2
    for original, cipher in ((SMALL, None), (SMALL_INT8, None), (SMALL_ENCRYPTED, CIPHER)):
        for mutant, _ in zip(mutants(original, random), range(20_000), strict=False):
            assert not reads(mutant, cipher=cipher)
            with pytest.raises(CorruptEntryError):
                read_first(mutant, 1, cipher)
            count += 1
    for mutant, _ in zip(mutants(SMALL_ENCRYPTED, random), range(5_000), strict=False):
        # Whoever has no key can make a checksum, and no more.
        forged = resealed(mutant)
        assert forged == SMALL_ENCRYPTED or not reads(forged, cipher=CIPHER)
        count += 1
    assert count >= 100_000


def test_what_a_forger_can_make_is_refused_or_is_an_entry_like_any_other() -> None:
    random = Random(1)
    read = 0
    for original in (SMALL, SMALL_INT8):
        for mutant, _ in zip(mutants(original, random), range(5_000), strict=False):
            forged = resealed(mutant)
            try:
                kv = decode(KEY, forged)
            except CorruptEntryError:
                continue
            read += 1
            # It says what was forged, and is whole.
            fields = header_of(forged)
            assert (fields["key"], fields["num_tokens"]) == (KEY, kv.num_tokens)
            layers, kv_heads, entries, head_dim = fields["shape"]
            assert kv.kv_shape == (layers, kv_heads, head_dim)
            assert kv.keys.shape == kv.values.shape == (entries, head_dim)
            assert read_first(forged, 1)[0].bit_equal(kv.first(1))
            assert fields["dtype"] in KINDS
            assert isinstance(kv, QuantizedKV) == (fields["dtype"] == "int8")
            again = encode(KEY, kv)
            assert decode(KEY, again).bit_equal(kv)
    assert read > 100  # the claim is not empty


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600))
def test_random_bytes_are_no_entry(data: bytes) -> None:
    assert not reads(data)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8)), min_size=1),
    st.booleans(),
)
def test_mutated_bytes_are_no_entry(edits: list[tuple[int, bytes]], insert: bool) -> None:
    original = encode(KEY, KV)
    data = bytearray(original)
    for place, new in edits:
        data[place : place + (0 if insert else len(new))] = new
    assert reads(data) == (data == original)


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["magic", "format", "key", "cipher", "dtype", "shape", "num_tokens", "x"]),
        ANYTHING | st.lists(ANYTHING, max_size=5),
    )
)
def test_headers_that_say_anything_else_are_no_entry(changes: dict[str, Any]) -> None:
    original = sealed(tensors_of(KV))
    data = sealed(tensors_of(KV), **changes)
    assert not reads(data, cipher=CIPHER)
    if reads(data):
        kv = decode(KEY, data)
        # No other number of tokens is wrong, if the entries fit.
        assert data == original or kv.num_tokens == changes["num_tokens"]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789abcdef", min_size=1, max_size=64), st.text(max_size=80))
def test_an_entry_is_read_under_its_own_key_alone(key: str, other: str) -> None:
    data = encode(key, KV)
    assert decode(key, data).bit_equal(KV)
    assert reads(data, other) == (key == other)
