"""The bytes of an entry: what was encoded is decoded bit for bit, and nothing else is decoded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV, QuantizedKV, quantize
from sac_rag.stores import DiskStore
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.entry import decode, decode_first, encode, reencrypt

KEY = "ab" * 32
OTHER = "cd" * 32
FINGERPRINT = "ef" * 16
DATA = Path(__file__).parents[1] / "data"
CIPHER = Cipher(bytes(range(32)))
OTHER_CIPHER = Cipher(bytes(32))


def make_kv(
    dtype: torch.dtype = torch.bfloat16,
    counts: tuple[int, ...] = (5, 0, 4, 3, 2, 6),
    layers: int = 2,
    head_dim: int = 8,
    num_tokens: int = 20,
) -> AnchorKV:
    """Numbers that no other version of torch draws differently, and entries of all heads mixed."""
    entries = sum(counts)
    order = torch.arange(entries) * 7 % entries
    assert len(order.unique()) == entries
    numbers = torch.arange(2 * entries * head_dim).reshape(2, entries, head_dim)
    numbers = (numbers * 7919 % 1009 - 500) / 128
    heads = torch.arange(len(counts), dtype=torch.int16).repeat_interleave(torch.tensor(counts))
    return AnchorKV(
        keys=numbers[0].to(dtype),
        values=numbers[1].to(dtype),
        positions=(order * 3 % num_tokens).int(),
        heads=heads[order],
        num_layers=layers,
        num_kv_heads=len(counts) // layers,
        num_tokens=num_tokens,
    )


def make_small(dtype: torch.dtype = torch.float16) -> AnchorKV:
    return make_kv(dtype, counts=(2, 0), layers=1, head_dim=4)


KV = make_kv()
KINDS: dict[str, AnchorKV] = {
    "float32": make_kv(torch.float32),
    "float16": make_kv(torch.float16),
    "bfloat16": KV,
    "int8": quantize(KV),
}
# Of five blocks, the last of them not full.
LARGE = make_kv(counts=(300, 0, 500, 700, 200, 401), head_dim=32, num_tokens=1000)
BLOCK = 64 * 1024


def sealed(payload: bytes, **changes: Any) -> bytes:
    """An entry as the format describes it, with right checksums over whatever it says."""
    fields = {
        "magic": "sac_rag.AnchorKV",
        "format": 3,
        "key": KEY,
        "fingerprint": FINGERPRINT,
        "num_tokens": 20,
        "dtype": "bfloat16",
        "shape": [2, 3, 20, 8],
        "payload_bytes": len(payload),
        "blocks": blocks_of(payload),
        **changes,
    }
    return with_checksum(fields, payload)


def blocks_of(payload: bytes) -> list[str]:
    blocks = [payload[begin : begin + BLOCK] for begin in range(0, len(payload), BLOCK)]
    return [xxhash.xxh3_128_hexdigest(block) for block in blocks]


def with_checksum(fields: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(fields, separators=(",", ":"))
    line = f'{text[:-1]},"xxh3_128":"{xxhash.xxh3_128_hexdigest(text.encode())}"}}'
    return line.ljust(-(len(line) + 1) % 64 + len(line)).encode() + b"\n" + payload


def tensors_of(value: AnchorKV, **changes: torch.Tensor) -> bytes:
    """The safetensors file: what is small by item size, then keys and values side by side."""
    names = ("key_codes", "value_codes") if isinstance(value, QuantizedKV) else ("keys", "values")
    tensors = value.tensors()
    pair = torch.stack([tensors.pop(name) for name in names], dim=1)
    small = sorted(tensors, key=lambda name: (tensors[name].itemsize, name))
    return safetensors_file({**{name: tensors[name] for name in small}, "kv": pair, **changes})


def safetensors_file(tensors: dict[str, torch.Tensor]) -> bytes:
    """With the last tensor at a multiple of 64 bytes, which safetensors' own `save` cannot do."""
    dtypes = {torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.bfloat16: "BF16"}
    dtypes |= {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}
    layout, data, begin = {}, b"", 0
    for name, tensor in tensors.items():
        begin = len(data)
        data += tensor.contiguous().view(torch.uint8).numpy().tobytes()
        layout[name] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + begin) % 64)
    return len(text).to_bytes(8, "little") + text + data


def header_of(data: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(data.partition(b"\n")[0])
    return fields


def reads(data: bytes | bytearray, key: str = KEY, cipher: Cipher | None = None) -> bool:
    """Whether bytes are taken for an entry; anything but a CorruptEntryError passes through."""
    try:
        decode(key, data, cipher)
    except CorruptEntryError:
        return False
    return True


def why_refused(data: bytes, key: str = KEY, cipher: Cipher | None = None) -> str:
    with pytest.raises(CorruptEntryError) as error:
        decode(key, data, cipher)
    return error.value.reason


def read_first(
    data: bytes | bytearray, entries: int, cipher: Cipher | None = None, key: str = KEY
) -> tuple[AnchorKV, int]:
    """The first entries of an entry's value, and how many bytes were read for them."""
    most = 0

    def first(nbytes: int) -> memoryview:
        nonlocal most
        most = max(most, nbytes)
        return memoryview(bytearray(data[:nbytes]))

    return decode_first(key, first, len(data), lambda _: entries, cipher), most


# What is written.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cipher", [None, CIPHER], ids=["plain", "encrypted"])
def test_what_was_encoded_is_decoded_bit_for_bit(kind: str, cipher: Cipher | None) -> None:
    kv = decode(KEY, encode(KEY, KINDS[kind], cipher, FINGERPRINT), cipher)
    assert type(kv) is type(KINDS[kind])
    assert kv.bit_equal(KINDS[kind])
    assert torch.equal(kv.keys, KINDS[kind].keys)
    assert torch.equal(kv.values, KINDS[kind].values)


def test_an_entry_is_a_line_of_json_and_a_safetensors_file() -> None:
    data = encode(KEY, KV, fingerprint=FINGERPRINT)
    line, _, payload = data.partition(b"\n")
    assert (len(line) + 1) % 64 == 0
    fields = json.loads(line)
    assert fields["key"] == KEY
    assert fields["fingerprint"] == FINGERPRINT
    assert fields["num_tokens"] == KV.num_tokens
    loaded = safetensors.torch.load(payload)
    keys, values = loaded.pop("kv").unbind(1)
    assert AnchorKV(keys, values, **loaded, num_layers=2, num_kv_heads=3, num_tokens=20).bit_equal(
        KV
    )
    assert data == sealed(tensors_of(KV))  # the format is what this file says it is
    quantized = quantize(KV)
    expected = sealed(tensors_of(quantized), dtype="int8")
    assert encode(KEY, quantized, fingerprint=FINGERPRINT) == expected
    payload = tensors_of(LARGE)
    assert len(blocks_of(payload)) == 5
    expected = sealed(payload, num_tokens=1000, shape=[2, 3, 2101, 32])
    assert encode(KEY, LARGE, fingerprint=FINGERPRINT) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_lies_at_a_multiple_of_its_item_size(kind: str) -> None:
    for entries in range(1, 9):
        kv = KINDS[kind].first(entries)
        tensors = decode(KEY, bytearray(encode(KEY, kv))).tensors()
        assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in tensors.values())


@pytest.mark.parametrize("mebibytes", [1, 4, 5, 33])
def test_a_header_is_small_however_large_the_entry(mebibytes: int) -> None:
    """At most 64 blocks, each of a power of two and 64 KiB or more."""
    entries = mebibytes * 2**20 // 4096
    kv = AnchorKV.uniform(
        torch.zeros(1, 1, entries, 512),
        torch.zeros(1, 1, entries, 512),
        torch.arange(entries, dtype=torch.int32),
        entries,
    )
    data = encode(KEY, kv)
    assert data.index(b"\n") < 3000
    size = {1: 2**16, 4: 2**17, 5: 2**17, 33: 2**20}[mebibytes]  # 4 MiB of keys and some more
    assert len(header_of(data)["blocks"]) == -(-header_of(data)["payload_bytes"] // size)
    assert reads(data)
    assert read_first(data, entries // 2)[0].bit_equal(kv.first(entries // 2))


def test_a_fingerprint_that_is_not_known_is_an_empty_word() -> None:
    data = encode(KEY, KV)
    assert header_of(data)["fingerprint"] == ""
    assert reads(data)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_the_format_is_that_of_the_golden_file(kind: str) -> None:
    """If this fails, the format has changed: raise FORMAT, and make files of the new one."""
    golden = (DATA / f"entry-3-{kind}.kv").read_bytes()
    assert decode(KEY, golden).bit_equal(KINDS[kind])
    assert encode(KEY, KINDS[kind], fingerprint=FINGERPRINT) == golden


def test_the_encrypted_format_is_that_of_the_golden_file() -> None:
    golden = (DATA / "entry-3-encrypted.kv").read_bytes()
    assert decode(KEY, golden, CIPHER).bit_equal(KV)
    assert reencrypt(golden, CIPHER, None) == (DATA / "entry-3-bfloat16.kv").read_bytes()


def test_int8_takes_about_half_the_bytes_of_bfloat16() -> None:
    # SmolLM2-135M, 510 tokens at 5x.
    kv = make_kv(counts=(102,) * 90, layers=30, head_dim=64, num_tokens=510)
    full, half = len(encode(KEY, kv)), len(encode(KEY, quantize(kv)))
    assert half < 0.53 * full
    assert quantize(kv).nbytes < half < quantize(kv).nbytes + 4096


def test_decoding_writable_bytes_copies_nothing() -> None:
    data = bytearray(encode(KEY, KV))
    kv = decode(KEY, data)
    before = kv.keys.clone()
    kv.keys.zero_()
    assert not torch.equal(before, kv.keys)
    assert not reads(bytes(data))  # the buffer was what changed


def test_decoding_leaves_read_only_bytes_alone() -> None:
    data = encode(KEY, KV)
    decode(KEY, data).keys.zero_()
    assert reads(data)


# What is refused when it is written.


@pytest.mark.parametrize("key", ["", "AB", "../ab", "ab\n", "a" * 65, "g0", 5])
def test_a_key_that_is_no_digest_is_refused(key: Any, disk: DiskStore) -> None:
    with pytest.raises(ValueError, match="key must be a lower-case hex digest"):
        encode(key, KV)
    with pytest.raises(ValueError, match="must be a lower-case hex digest"):
        disk[key] = KV
    with pytest.raises(KeyError):
        disk[key]
    assert not list((disk.folder / "entries").glob("*/*"))


@pytest.mark.parametrize("fingerprint", ["AB", "of my model", "a" * 65])
def test_a_fingerprint_that_is_no_digest_is_refused(fingerprint: str) -> None:
    with pytest.raises(ValueError, match="fingerprint must be a lower-case hex digest"):
        encode(KEY, KV, fingerprint=fingerprint)


def test_a_dtype_that_cannot_be_stored_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"were: torch.float64; convert them with kv.to"):
        encode(KEY, make_kv(dtype=torch.float64))


# Encryption.


def test_an_encrypted_entry_tells_its_key_and_its_length_alone() -> None:
    data = encode(KEY, KV, CIPHER, FINGERPRINT)
    assert header_of(data).keys() == {
        "magic",
        "format",
        "key",
        "cipher",
        "payload_bytes",
        "blocks",
        "xxh3_128",
    }
    assert header_of(data)["cipher"] == CIPHER.id
    for told in (FINGERPRINT.encode(), b"bfloat16", b"positions", tensors_of(KV)[-64:]):
        assert told in encode(KEY, KV, fingerprint=FINGERPRINT)
        assert told not in data


def test_one_value_is_never_encrypted_to_the_same_bytes_twice() -> None:
    assert encode(KEY, KV, CIPHER) != encode(KEY, KV, CIPHER)


def test_without_its_cipher_an_entry_is_refused_for_want_of_the_key() -> None:
    plain, encrypted = encode(KEY, KV), encode(KEY, KV, CIPHER)
    assert why_refused(encrypted) == "key"
    assert why_refused(encrypted, cipher=OTHER_CIPHER) == "key"
    assert why_refused(plain, cipher=CIPHER) == "key"  # or whoever writes the folder could answer


def test_who_does_not_have_the_key_cannot_change_an_encrypted_entry() -> None:
    data = encode(KEY, KV, CIPHER)
    fields = header_of(data)
    del fields["xxh3_128"]
    payload = data.partition(b"\n")[2]

    def forged(payload: bytes, **changes: Any) -> bytes:
        return with_checksum({**fields, "blocks": blocks_of(payload), **changes}, payload)

    assert reads(forged(payload), cipher=CIPHER)
    changed = payload[:-20] + bytes([payload[-20] ^ 1]) + payload[-19:]
    assert why_refused(forged(changed), cipher=CIPHER) == "corrupt"
    assert why_refused(forged(payload, key=OTHER), OTHER, CIPHER) == "corrupt"
    assert why_refused(forged(payload[:20], payload_bytes=20), cipher=CIPHER) == "corrupt"


def test_what_was_encrypted_must_be_the_entry_itself() -> None:
    for inner in (encode(OTHER, KV), encode(KEY, KV, CIPHER), b"no entry"):
        fields = {
            "magic": "sac_rag.AnchorKV",
            "format": 3,
            "key": KEY,
            "cipher": CIPHER.id,
            "payload_bytes": len(inner) + CIPHER.overhead,
        }
        about = json.dumps(fields, separators=(",", ":")).encode()
        payload = CIPHER.encrypt(inner, about)
        forged = with_checksum({**fields, "blocks": blocks_of(payload)}, payload)
        assert why_refused(forged, cipher=CIPHER)


@pytest.mark.parametrize("old", [None, CIPHER], ids=["plain", "encrypted"])
@pytest.mark.parametrize("new", [None, CIPHER, OTHER_CIPHER], ids=["plain", "same", "other"])
def test_an_entry_is_encrypted_anew_without_other_changes(
    old: Cipher | None, new: Cipher | None
) -> None:
    plain = encode(KEY, KV, fingerprint=FINGERPRINT)
    again = reencrypt(encode(KEY, KV, old, FINGERPRINT), old, new)
    assert decode(KEY, again, new).bit_equal(KV)
    assert reencrypt(again, new, None) == plain


def test_damage_is_not_encrypted_anew() -> None:
    for old in (None, CIPHER):
        data = bytearray(encode(KEY, KV, old))
        data[-1] ^= 1
        with pytest.raises(CorruptEntryError, match="checksum"):
            reencrypt(data, old, OTHER_CIPHER)
    with pytest.raises(CorruptEntryError) as error:
        reencrypt(encode(KEY, KV, CIPHER), OTHER_CIPHER, None)
    assert error.value.reason == "key"


# Accidents.


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "encrypted"])
def test_no_bit_of_an_entry_can_flip_unseen(kind: str) -> None:
    cipher = CIPHER if kind == "encrypted" else None
    kv = make_small()
    data = bytearray(encode(KEY, quantize(kv) if kind == "int8" else kv, cipher))
    assert reads(data, cipher=cipher)
    for i in range(len(data)):
        for bit in range(8):
            data[i] ^= 1 << bit
            assert not reads(data, cipher=cipher), f"bit {bit} of byte {i}"
            data[i] ^= 1 << bit


def test_no_part_of_an_entry_is_an_entry() -> None:
    data = encode(KEY, KV)
    assert not any(reads(data[:length]) for length in range(len(data)))
    assert not reads(data + b"\0")


@pytest.mark.parametrize("version", [1, 2, 4, 0, 10**30])
def test_an_entry_of_another_format_is_refused_by_both_versions(version: int) -> None:
    data = sealed(b"no idea", format=version, some_new_field=True)
    expected = f"of format {str(version)[:20]}, this sac_rag reads format 3"
    with pytest.raises(CorruptEntryError, match=expected) as error:
        decode(KEY, data)
    assert error.value.reason == "format"


def test_an_entry_as_format_2_had_it_is_refused_as_that() -> None:
    data = (DATA / "entry-2-bfloat16.kv").read_bytes()
    assert why_refused(data) == "format"
    with pytest.raises(CorruptEntryError) as error:
        read_first(data, 1)
    assert error.value.reason == "format"


def test_no_more_than_the_first_4096_bytes_are_searched_for_a_header() -> None:
    header = b'{"magic":"sac_rag.AnchorKV","format":4'
    for spaces, reason in ((4000, "format"), (5000, "corrupt")):
        assert why_refused(header + b" " * spaces + b"}\n") == reason


# The first entries alone.


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "encrypted"])
@pytest.mark.parametrize("entries", [1, 7, 1000, 2100, 2101, 10**9])
def test_the_first_entries_are_those_of_the_whole_bit_for_bit(kind: str, entries: int) -> None:
    cipher = CIPHER if kind == "encrypted" else None
    kv = quantize(LARGE) if kind == "int8" else LARGE
    found, _ = read_first(encode(KEY, kv, cipher), entries, cipher)
    assert type(found) is type(kv)
    assert found.bit_equal(kv.first(min(entries, kv.num_entries)))


@pytest.mark.parametrize("cipher", [None, CIPHER], ids=["plain", "encrypted"])
def test_how_many_entries_are_wanted_is_asked_with_the_source_tokens(cipher: Cipher | None) -> None:
    data = encode(KEY, LARGE, cipher)
    asked: list[int] = []

    def wanted(num_tokens: int) -> int:
        asked.append(num_tokens)
        return 2

    def first(nbytes: int) -> memoryview:
        return memoryview(bytearray(data[:nbytes]))

    assert decode_first(KEY, first, len(data), wanted, cipher).num_entries == 2
    assert asked == [1000]
    for entries in (0, -1):
        with pytest.raises(ValueError, match=f"was: {entries}"):
            read_first(data, entries, cipher)


def test_fewer_entries_take_fewer_bytes() -> None:
    data = encode(KEY, LARGE)
    start = data.index(b"\n") + 1
    small = len(data) - start - LARGE.num_entries * 2 * 32 * 2
    for entries in (1, 500, 1000, 2101):
        _, nbytes = read_first(data, entries)
        needed = start + small + entries * 2 * 32 * 2
        assert needed <= nbytes < max(needed, 4096) + BLOCK


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_flipped_bit_is_found_in_what_is_read_and_nowhere_else(kind: str) -> None:
    kv = quantize(LARGE) if kind == "int8" else LARGE
    data = bytearray(encode(KEY, kv))
    expected, nbytes = read_first(data, 500)
    assert 4096 < nbytes < len(data) - 1000
    random = Random(0)
    places = [random.randrange(len(data)) for _ in range(300)]
    for place in (*places, 0, nbytes - 1, nbytes, len(data) - 1):
        data[place] ^= 1 << random.randrange(8)
        was = bytes(data)
        if place < nbytes:
            with pytest.raises(CorruptEntryError):
                read_first(data, 500)
        else:
            assert read_first(data, 500)[0].bit_equal(expected)
        assert not reads(data)
        data[:] = encode(KEY, kv)
        assert was != data


def test_an_entry_cut_short_is_refused_even_where_the_rest_is_not_wanted() -> None:
    data = encode(KEY, LARGE)
    for length in (0, 100, 5000, len(data) // 2, len(data) - 1):
        with pytest.raises(CorruptEntryError):
            read_first(data[:length], 1)
    with pytest.raises(CorruptEntryError, match="too early"):  # as where it is cut while it is read
        decode_first(KEY, lambda n: memoryview(bytearray(data[:n]))[:9000], len(data), lambda _: 1)


def test_only_an_entry_of_this_key_and_cipher_is_read_in_part() -> None:
    for data, key, cipher in (
        (encode(OTHER, KV), KEY, None),
        (encode(KEY, KV, CIPHER), KEY, None),
        (encode(KEY, KV), KEY, CIPHER),
    ):
        with pytest.raises(CorruptEntryError):
            read_first(data, 1, cipher, key)


# Forgeries: whoever can write the folder can make a checksum, too.


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
