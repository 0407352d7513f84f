"""The bytes of an entry: what was encoded is decoded bit for bit, whole or in part."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from support.entries import (
    BLOCK,
    CIPHER,
    DATA,
    FINGERPRINT,
    KEY,
    KINDS,
    KV,
    LARGE,
    OTHER,
    OTHER_CIPHER,
    blocks_of,
    header_of,
    make_kv,
    make_small,
    read_first,
    reads,
    sealed,
    tensors_of,
    why_refused,
    with_checksum,
)

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV, quantize
from sac_rag.stores import DiskStore
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.entry import decode, decode_first, encode, reencrypt

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
    for secret in (FINGERPRINT.encode(), b"bfloat16", b"positions", tensors_of(KV)[-64:]):
        assert secret in encode(KEY, KV, fingerprint=FINGERPRINT)
        assert secret not in data


def test_one_value_is_never_encrypted_to_the_same_bytes_twice() -> None:
    assert encode(KEY, KV, CIPHER) != encode(KEY, KV, CIPHER)


def test_without_its_cipher_an_entry_is_refused_for_want_of_the_key() -> None:
    plain, encrypted = encode(KEY, KV), encode(KEY, KV, CIPHER)
    assert why_refused(encrypted) == "secret"
    assert why_refused(encrypted, cipher=OTHER_CIPHER) == "secret"
    # Or whoever writes the folder could answer.
    assert why_refused(plain, cipher=CIPHER) == "secret"


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
def test_an_entry_is_re_encrypted_without_other_changes(
    old: Cipher | None, new: Cipher | None
) -> None:
    plain = encode(KEY, KV, fingerprint=FINGERPRINT)
    again = reencrypt(encode(KEY, KV, old, FINGERPRINT), old, new)
    assert decode(KEY, again, new).bit_equal(KV)
    assert reencrypt(again, new, None) == plain


def test_damage_is_not_re_encrypted() -> None:
    for old in (None, CIPHER):
        data = bytearray(encode(KEY, KV, old))
        data[-1] ^= 1
        with pytest.raises(CorruptEntryError, match="checksum"):
            reencrypt(data, old, OTHER_CIPHER)
    with pytest.raises(CorruptEntryError) as error:
        reencrypt(encode(KEY, KV, CIPHER), OTHER_CIPHER, None)
    assert error.value.reason == "secret"


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
    first, _ = read_first(encode(KEY, kv, cipher), entries, cipher)
    assert type(first) is type(kv)
    assert first.bit_equal(kv.first(min(entries, kv.num_entries)))


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
