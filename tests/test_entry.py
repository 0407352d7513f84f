"""The bytes of an entry: what was encoded is decoded bit for bit, and nothing else is decoded."""

from __future__ import annotations

import json
import math
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

from sac_rag.errors import CorruptEntry
from sac_rag.kv import AnchorKV
from sac_rag.quantize import QuantizedKV, quantize
from sac_rag.stores import DiskStore
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.entry import decode, encode, reencrypt

KEY = "ab" * 32
OTHER = "cd" * 32
FINGERPRINT = "ef" * 16
DATA = Path(__file__).parent / "data"
CIPHER = Cipher(bytes(range(32)))
OTHER_CIPHER = Cipher(bytes(32))


def make_kv(dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (2, 3, 4, 8)) -> AnchorKV:
    """Numbers that no other version of torch draws differently."""
    numbers = torch.arange(2 * math.prod(shape)).reshape(2, *shape)
    numbers = (numbers * 7919 % 1009 - 500) / 128
    return AnchorKV(
        keys=numbers[0].to(dtype),
        values=numbers[1].to(dtype),
        positions=torch.arange(shape[2], dtype=torch.int32) * 5,
        num_tokens=shape[2] * 5,
    )


KV = make_kv()
KINDS: dict[str, AnchorKV] = {
    "float32": make_kv(torch.float32),
    "float16": make_kv(torch.float16),
    "bfloat16": KV,
    "int8": quantize(KV),
}


def sealed(payload: bytes, **changes: Any) -> bytes:
    """An entry as the format describes it, with a right checksum over whatever it says."""
    fields = {
        "magic": "sac_rag.AnchorKV",
        "format": 2,
        "key": KEY,
        "fingerprint": FINGERPRINT,
        "num_tokens": 20,
        "dtype": "bfloat16",
        "shape": [2, 3, 4, 8],
        "payload_bytes": len(payload),
        **changes,
    }
    return with_checksum(fields, payload)


def with_checksum(fields: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(fields, separators=(",", ":"))
    digest = xxhash.xxh3_128_hexdigest(text.encode() + payload)
    line = f'{text[:-1]},"xxh3_128":"{digest}"}}'
    return line.ljust(-(len(line) + 1) % 64 + len(line)).encode() + b"\n" + payload


def tensors_of(kv: AnchorKV, **changes: torch.Tensor) -> bytes:
    return safetensors.torch.save({**kv.tensors(), **changes})


def header_of(data: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(data.partition(b"\n")[0])
    return fields


def reads(data: bytes | bytearray, key: str = KEY, cipher: Cipher | None = None) -> bool:
    """Whether bytes are taken for an entry; anything but a CorruptEntry passes through."""
    try:
        decode(key, data, cipher)
    except CorruptEntry:
        return False
    return True


def why_refused(data: bytes, key: str = KEY, cipher: Cipher | None = None) -> str:
    with pytest.raises(CorruptEntry) as error:
        decode(key, data, cipher)
    return error.value.reason


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
    assert AnchorKV(**loaded, num_tokens=20).bit_equal(KV)
    assert data == sealed(tensors_of(KV))  # the format is what this file says it is
    quantized = quantize(KV)
    expected = sealed(tensors_of(quantized), dtype="int8")
    assert encode(KEY, quantized, fingerprint=FINGERPRINT) == expected


def test_a_fingerprint_that_is_not_known_is_an_empty_word() -> None:
    data = encode(KEY, KV)
    assert header_of(data)["fingerprint"] == ""
    assert reads(data)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_the_format_is_that_of_the_golden_file(kind: str) -> None:
    """If this fails, the format has changed: raise FORMAT, and make files of the new one."""
    golden = (DATA / f"entry-2-{kind}.kv").read_bytes()
    assert decode(KEY, golden).bit_equal(KINDS[kind])
    assert encode(KEY, KINDS[kind], fingerprint=FINGERPRINT) == golden


def test_the_encrypted_format_is_that_of_the_golden_file() -> None:
    golden = (DATA / "entry-2-encrypted.kv").read_bytes()
    assert decode(KEY, golden, CIPHER).bit_equal(KV)
    assert reencrypt(golden, CIPHER, None) == (DATA / "entry-2-bfloat16.kv").read_bytes()


def test_int8_takes_about_half_the_bytes_of_bfloat16() -> None:
    # SmolLM2-135M, 510 tokens at 5x.
    kv = make_kv(shape=(30, 3, 102, 64))
    full, half = len(encode(KEY, kv)), len(encode(KEY, quantize(kv)))
    assert half < 0.53 * full
    assert quantize(kv).nbytes < half < quantize(kv).nbytes + 2048


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
    assert reads(with_checksum(fields, payload), cipher=CIPHER)
    changed = payload[:-20] + bytes([payload[-20] ^ 1]) + payload[-19:]
    assert why_refused(with_checksum(fields, changed), cipher=CIPHER) == "corrupt"
    renamed = with_checksum({**fields, "key": OTHER}, payload)
    assert why_refused(renamed, OTHER, CIPHER) == "corrupt"
    short = with_checksum({**fields, "payload_bytes": 20}, payload[:20])
    assert why_refused(short, cipher=CIPHER) == "corrupt"


def test_what_was_encrypted_must_be_the_entry_itself() -> None:
    for inner in (encode(OTHER, KV), encode(KEY, KV, CIPHER), b"no entry"):
        fields = {
            "magic": "sac_rag.AnchorKV",
            "format": 2,
            "key": KEY,
            "cipher": CIPHER.id,
            "payload_bytes": len(inner) + CIPHER.overhead,
        }
        about = json.dumps(fields, separators=(",", ":")).encode()
        assert why_refused(with_checksum(fields, CIPHER.encrypt(inner, about)), cipher=CIPHER)


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
        with pytest.raises(CorruptEntry, match="checksum"):
            reencrypt(data, old, OTHER_CIPHER)
    with pytest.raises(CorruptEntry) as error:
        reencrypt(encode(KEY, KV, CIPHER), OTHER_CIPHER, None)
    assert error.value.reason == "key"


# Accidents.


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "encrypted"])
def test_no_bit_of_an_entry_can_flip_unseen(kind: str) -> None:
    cipher = CIPHER if kind == "encrypted" else None
    kv = make_kv(torch.float16, (1, 1, 2, 4))
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


@pytest.mark.parametrize("version", [1, 3, 0, 10**30])
def test_an_entry_of_another_format_is_refused_by_both_versions(version: int) -> None:
    data = sealed(b"no idea", format=version, some_new_field=True)
    expected = f"of format {str(version)[:20]}, this sac_rag reads format 2"
    with pytest.raises(CorruptEntry, match=expected) as error:
        decode(KEY, data)
    assert error.value.reason == "format"


def test_an_entry_as_format_1_had_it_is_refused_as_that() -> None:
    fields = header_of(encode(KEY, KV))
    del fields["fingerprint"], fields["xxh3_128"]
    assert why_refused(with_checksum({**fields, "format": 1}, tensors_of(KV))) == "format"


def test_no_more_than_the_first_4096_bytes_are_searched_for_a_header() -> None:
    header = b'{"magic":"sac_rag.AnchorKV","format":3'
    for spaces, reason in ((4000, "format"), (5000, "corrupt")):
        assert why_refused(header + b" " * spaces + b"}\n") == reason


# Forgeries: whoever can write the folder can make a checksum, too.


QUANTIZED = quantize(KV)
FORGED = {
    "an extra tensor": sealed(tensors_of(KV, more=torch.zeros(1))),
    "a missing tensor": sealed(safetensors.torch.save({"keys": KV.keys, "values": KV.values})),
    "float positions": sealed(tensors_of(KV, positions=KV.positions.float())),
    "int64 positions": sealed(tensors_of(KV, positions=KV.positions.long())),
    "too few positions": sealed(tensors_of(KV, positions=KV.positions[:2].clone())),
    "values of another shape": sealed(tensors_of(KV, values=KV.values[:1].clone())),
    "values of another dtype": sealed(tensors_of(KV, values=KV.values.float())),
    "a header of another shape": sealed(tensors_of(KV), shape=[3, 2, 4, 8]),
    "a header of another dtype": sealed(tensors_of(KV), dtype="float16"),
    "an unknown dtype": sealed(tensors_of(KV.to(dtype=torch.float64)), dtype="float64"),
    "int8 that is none": sealed(tensors_of(KV), dtype="int8"),
    "int8 unannounced": sealed(tensors_of(QUANTIZED)),
    "int8 of another shape": sealed(tensors_of(QUANTIZED), dtype="int8", shape=[3, 2, 4, 8]),
    "more anchors than tokens": sealed(tensors_of(KV), num_tokens=3),
    "tokens that are no number": sealed(tensors_of(KV), num_tokens="20"),
    "a shape that is no list": sealed(tensors_of(KV), shape="2384"),
    "a shape of lists": sealed(tensors_of(KV), shape=[[2], [3], [4], [8]]),
    "another field": sealed(tensors_of(KV), more=1),
    "a cipher too many": sealed(tensors_of(KV), cipher=CIPHER.id),
    "a fingerprint that is no word": sealed(tensors_of(KV), fingerprint=None),
    "another magic": sealed(tensors_of(KV), magic="sac_rag.Other"),
    "a format that is no number": sealed(tensors_of(KV), format="2"),
    "a format that is a truth": sealed(tensors_of(KV), format=True),
    "another key": sealed(tensors_of(KV), key=OTHER),
    "no tensors": sealed(b""),
    "tensors that are none": sealed(b"nonsense" * 100),
    "a huge tensor header": sealed((2**63).to_bytes(8, "little") + bytes(100)),
    "a deep tensor header": sealed((4000).to_bytes(8, "little") + b"[" * 4000),
    "a tensor header that is a list": sealed((2).to_bytes(8, "little") + b"[]"),
    "a deep header": b"[" * 4000 + b"\n",
    "a header without end": b" " * 10**6,
    "a header of many digits": b'{"magic":"sac_rag.AnchorKV","format":2' + b"0" * 4000 + b"}\n",
    "a header that is a number": b"1\n",
    "a header with room for more": sealed(tensors_of(KV)).replace(b"\n", b" " * 64 + b"\n", 1),
    "nothing": b"",
}
for _name, _offsets in {
    "past the end": [0, 10**6],
    "before the beginning": [-384, 0],
    "in the tensor header": [-64, 320],
    "backwards": [384, 0],
    "of other length": [0, 382],
    "of huge length": [0, 2**70],
    "in the middle of a number": [1, 385],
    "that are strings": ["0", "384"],
    "of fractions": [0.0, 384.0],
    "of three": [0, 384, 768],
}.items():
    _layout = {
        "keys": {"dtype": "BF16", "shape": [2, 3, 4, 8], "data_offsets": _offsets},
        "values": {"dtype": "BF16", "shape": [2, 3, 4, 8], "data_offsets": [384, 768]},
        "positions": {"dtype": "I32", "shape": [4], "data_offsets": [768, 784]},
    }
    _text = json.dumps(_layout).encode().ljust(320)
    FORGED[f"offsets {_name}"] = sealed(len(_text).to_bytes(8, "little") + _text + bytes(784))
for _name, _changed in {
    "codes of another dtype": QUANTIZED.tensors()["key_codes"].to(torch.uint8),
    "codes of another shape": QUANTIZED.tensors()["key_codes"][:1].clone(),
    "codes of three dimensions": QUANTIZED.tensors()["key_codes"][0].clone(),
}.items():
    FORGED[_name] = sealed(tensors_of(QUANTIZED, key_codes=_changed), dtype="int8")
for _part in ("key_scales", "key_offsets", "value_scales"):
    _tensor = QUANTIZED.tensors()[_part]
    for _name, _changed in {
        "float32": _tensor.float(),
        "one layer of": _tensor[:1].clone(),
    }.items():
        _payload = tensors_of(QUANTIZED, **{_part: _changed})
        FORGED[f"{_name} {_part}"] = sealed(_payload, dtype="int8")


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_entry_is_refused(name: str) -> None:
    assert reads(sealed(tensors_of(KV)))  # what is forged here is otherwise right
    assert reads(sealed(tensors_of(QUANTIZED), dtype="int8"))
    assert not reads(FORGED[name])


# Inputs by the thousand.


SMALL = encode(KEY, make_kv(torch.float16, (1, 1, 2, 4)), fingerprint=FINGERPRINT)
SMALL_INT8 = encode(KEY, quantize(make_kv(shape=(1, 1, 2, 4))))
SMALL_ENCRYPTED = encode(KEY, make_kv(torch.float16, (1, 1, 2, 4)), CIPHER)


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
            except CorruptEntry:
                continue
            read += 1
            # It says what was forged, and is whole.
            fields = header_of(forged)
            assert (fields["key"], fields["num_tokens"]) == (KEY, kv.num_tokens)
            assert fields["shape"] == list(kv.keys.shape) == list(kv.values.shape)
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
        # No other number of tokens is wrong, if the anchors fit.
        assert data == original or kv.num_tokens == changes["num_tokens"]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789abcdef", min_size=1, max_size=64), st.text(max_size=80))
def test_an_entry_is_read_under_its_own_key_alone(key: str, other: str) -> None:
    data = encode(key, KV)
    assert decode(key, data).bit_equal(KV)
    assert reads(data, other) == (key == other)
