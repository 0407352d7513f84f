"""What was written before the code was moved and renamed is read, and found, by the code of today.

The files are in data/pinned, what they were made from in pinned.py. If a test here fails, stores on
users' disks have become misses: mend the code. Only where that is meant are the pins written again,
see pinned.py.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support.pins as pinned
import torch
from safetensors.torch import load_file
from support.pins import (
    CHECKPOINT,
    CHUNKS,
    CIPHER,
    CONFIGS,
    FOLDER,
    FORMAT,
    GONE,
    NAMESPACE,
    PINNED_ENTRY,
    QUESTION,
    STORED,
    TEXTS,
)
from support.stores import bytes_in, make_kv
from torch import Tensor

from sac_rag import SacRAG
from sac_rag.archive import Archive, export
from sac_rag.cached import CachedCompressor
from sac_rag.collection import Collection, CollectionSettings
from sac_rag.compressors import checkpoint
from sac_rag.compressors.config import CompressorConfig
from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.namespace import Namespace
from sac_rag.origin import Origin
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import AnchorStore, DiskStore, MemoryStore
from sac_rag.stores.cipher import Cipher

SHORT = Decoding(max_new_tokens=4)

# What another machine may compute differently, by what it is kept in: sums in another order; from
# there, one step of rounding, which in eight bits is a 127th of the largest number of a head (4).
TOLERANCES: dict[str, dict[str, Any]] = {
    "float32": {"rtol": 1e-4, "atol": 1e-4},
    "bfloat16": {"rtol": 2**-7, "atol": 1e-3},
    "int8": {"rtol": 0, "atol": 4 / 127},
}

IDENTITY = {
    "weights": "07fff41a873270e8a72c8aa4f3fb61ef3f313957c00dce2ccb83bc3e49e88f84",
    "tokenizer": "66dfea6b8e5a0404f9f323141fcb3eefdc3f33d840536212df50f2652fa61d0c",
    "model": "fe75df3869b238dcdabb261f353e3b41cb12edd9ae05252929f90596da8b834b",
    "frequencies": "83ae60058f650d96a2fed76941722393e88c724d8095402506d3278899627e42",
}
FINGERPRINTS = {
    "full": "3389216027f6bcd28ed291d09622ce9c0cc62fe202f6a573b219e1316d1cb899",
    "full, no sink": "5d8c5e924a18b91d215b2ba1c4209f52c3c030fee700222a2aa13916601206d6",
    "full, float32": "8a8c098e1584f8375726ba6f01a32181503f60c1cbc1964b4b13afc987ea70ca",
    "uniform": "738ae599d3da0d06630eb80b11f033f75e6fd2292558329adecc440f42c74d1b",
    "uniform, int8": "f5a4c7ef44643423bcbce49f898522b959db1a2454a8b3e21cb73e01bc783498",
    "uniform, another ratio": "b903b1de086201d47bcd46f1900125c26ce3bc1ca41fb0dd518ff76e8c1d8684",
    "uniform, another sink": "4de1f3155f015a72628c27f8739caee2e4254074af933380c9985d5140b88280",
    "uniform, heading": "6ab429d03b1aae374c2954e291a0b371209d63d7b8b6bb3445280f617c924b8a",
    "uniform, slots": "072df3727c0564a83e6892fe93fd7a4762d07fbf69b2eb80e846c20e7537e7ab",
    "uniform, no cue": "af43031ee83c1dbd90995f0b782e5f0c06967a42e1d927764fc8e4256b5de84d",
    "uniform, no LoRA": "bffddf6ee639dfb1922991aa3ddb86c15b8e1422f082febe4b9ae2f796dfa1aa",
    "generator adapter": "039ec170c5a96b492ed5757609f2a0e441059f4bf099c17d75a35103ce8ba947",
    "anchors see all": "9a8c07703fb0c378b4aa06dab9737b6c0f6deffc63d097884e3248b72c8093ab",
    "surprisal": "3d522b182e61a9ba16422f81c3bb042dafadf0da24a7142d3d1b86ef39e3c543",
    "attention": "3f6c3de9f778be893dade588bc4e4f5a0934ab3660c9c8b1351db1b4d7c7895d",
    "learned": "1ecf073d26f9d7807e0e5cdd6def460ceaa42e39ab960d946c13ae0a2e6a8e75",
    "learned, another ratio": "1ecf073d26f9d7807e0e5cdd6def460ceaa42e39ab960d946c13ae0a2e6a8e75",
    "learned, network": "41be8ed6cff679910113733116c59e712c007a92b16fd9304b78591def66ab5c",
    "learned, layers": "2a6e1ef8651e34dbe200a08faaaa53016c80462c323f58e2732c0a6c29815912",
    "learned, shared": "f754cdeeeaffa0768c108a65ffde71c408e53af2b1311160dc80b886f8ef215c",
}
# Fields at their default are not in a fingerprint: a default that changed would change what the
# same fingerprint means.
DEFAULTS = {
    "method": "sac",
    "ratio": 5,
    "anchors": "uniform",
    "budget": "uniform",
    "scorer_width": 0,
    "segment_tokens": 510,
    "sink": "",
    "heading": "",
    "attention": "full",
    "anchor_embedding": "shared",
    "first_position": 0,
    "cue": True,
    "lora_rank": 128,
    "lora_alpha": 256,
    "lora_targets": ["q_proj", "v_proj"],
    "generator_adapter_rank": 0,
    "stored_dtype": "bfloat16",
}
FIELDS = {
    "kv_format": "1",
    "compressor_weights": "95e2c14261c893bab0bc30a442a0a6c136b01e3510c247a507f4c9ee0a4a849c",
    **{f"generator.{name}": digest for name, digest in IDENTITY.items()},
    "generator.dtype": "float32",
    "config.anchors": "'learned'",
    "config.budget": "'shared'",
    "config.segment_tokens": "16",
    "config.sink": "'<|im_start|>system\\n'",
    "config.attention": "'causal'",
    "config.anchor_embedding": "'none'",
    "config.lora_rank": "2",
    "config.lora_alpha": "4",
    "config.stored_dtype": "'float32'",
}
# Of the fingerprint "ef" * 32, by namespace and text: key, text id.
HALF = "\ud83d"  # of a surrogate pair
NAMES = {
    ("", "Zoë counted seven ships."): (
        "461437ae293ddc757c03553c85cf64346ed596aad41d1fff423a664e62afb672",
        "f8d256a7862a12ae9a8147b20d69ee01d75f255183e31cf673d66131c2dff048",
    ),
    ("tenant", "Zoë counted seven ships."): (
        "b9328ec000339de2fc51596549f5fc2cdf063c8e96b2889eb4c6bf8c7b3a5212",
        "0e21e96743dd939e102f5dd9ea3aa04162b48121012846b9e9f3a3ae394424c8",
    ),
    ("", HALF): (
        "361dd749f6bcf8bb03c2c87d4f9407bc178d33c4dd9a819321d1370acc83fee3",
        "73c676df89f8670323da9956380bc2a962518370a85ea1b2df2a7d471e9de4ae",
    ),
    ("tenant", HALF): (
        "62edeee32bb9b2c6829b51a7040e8d09a0e37426fd70980ad3889fe44e323a16",
        "5b9deb29b278a004a6df99ab226930385fff05f67a4272424a64f77ae2060ec7",
    ),
}
TENANT = "33c7d8d3589fab7f:"  # before a document's id
# Of the entries in the stores, in the order of STORED.
KEYS = (
    "36c9d8f623f42803942e3ca1e0e4191cdff45a3802724c89147bb1813dc71cbb",
    "362762813f8e1ba9b06904a898167ad09726528315158591ed5b65e20adab348",
    "bb19051cc20a391f0110a4b6f9b3a813eae86dad857fc7a0b35eab996b859c3e",
    "ca3e618aa5e01d1e7adc3f0f6f6b2a8af3fc7624f4371047114786345355da1a",
)
# Of those in the store of format 2, which other fingerprints made.
KEYS_OF_FORMAT_2 = (
    "bae4a4fe8531b032bc069a1d2a6c9b6e721c017faec1bf1f8fd89b723baa7a70",
    "fc7d9794c747c79722006a21b99db98c217b83431cb620c2106b0dac85047a4a",
    "e62aff83d29959596aa16a496ada953f23a99922a39bc9909502959a30374bb7",
    "ffe9a044a269aa55e9d7f281c5f7a758ff2274af006f7b4d780ffafcb1bcb3bf",
)
FORGOTTEN_OF_FORMAT_2 = "515cbf424504826c88bde5206ce9a94cd7efbadcbb84ba27a004e25b13ba4184"
FINGERPRINT_OF_FORMAT_2 = "ae29aaddb830c6a2795d8a2e8af9eac4bf7feac1abaf276c81aa4e5eae8f5643"


@pytest.fixture(scope="module", autouse=True)
def _as_they_were() -> Iterator[None]:
    """No test changes a pinned file."""
    before = bytes_in(FOLDER)
    yield
    assert bytes_in(FOLDER) == before


@pytest.fixture(autouse=True)
def _home(home: Path) -> None:
    """No record of another run is believed."""


@pytest.fixture(scope="module")
def generator() -> Generator:
    return pinned.make_generator()


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return load_file(FOLDER / "values.safetensors")


@pytest.fixture(params=["plain", "encrypted"])
def cipher(request: pytest.FixtureRequest) -> Cipher | None:
    return CIPHER if request.param == "encrypted" else None


@pytest.fixture
def folder(tmp_path: Path, cipher: Cipher | None) -> Path:
    """A copy of a pinned store."""
    return pinned.unpack("store" if cipher is None else "store-encrypted", tmp_path)


@pytest.fixture(params=["read-only", "writable"])
def opened(
    request: pytest.FixtureRequest, folder: Path, cipher: Cipher | None
) -> Iterator[DiskStore]:
    """A copy of a pinned store, which is in order before and after."""
    before = bytes_in(folder)
    with DiskStore(folder, read_only=request.param == "read-only", cipher=cipher) as store:
        assert store.check() == []
        yield store
        assert store.check() == []
    if store.read_only:
        assert bytes_in(folder) == before


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A working folder with the model, the checkpoint and the collection that was made of them."""
    pinned.make_model_folder(tmp_path / "model")
    shutil.copytree(FOLDER / "checkpoint", tmp_path / "checkpoint")
    pinned.unpack("collection", tmp_path)
    with pinned.beside_the_model(tmp_path):
        yield tmp_path


def require_value(kv: AnchorKV, values: dict[str, Tensor], compressor: str, text: str) -> None:
    """Every number of a stored KV is as it was computed when it was written."""
    for part, tensor in pinned.parts_of(kv).items():
        expected = values[f"{compressor}/{text}/{part}"]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def require_close(kv: AnchorKV, values: dict[str, Tensor], compressor: str, text: str) -> None:
    """A KV computed now is the one that was computed when the pins were written."""
    tolerance = TOLERANCES[CONFIGS[compressor].get("stored_dtype", "bfloat16")]
    for part, tensor in pinned.parts_of(kv).items():
        torch.testing.assert_close(tensor, values[f"{compressor}/{text}/{part}"], **tolerance)


def cached(generator: Generator, name: str, store: Any, namespace: str = "") -> CachedCompressor:
    compressor = pinned.make_compressor(generator, name)
    return CachedCompressor(compressor, store, namespace=namespace, guard=False)


# --- names: what an entry is found by


def test_the_identity_of_a_model_is_the_pinned_one(generator: Generator) -> None:
    """If "model" or "tokenizer" differ after an upgrade of transformers or tokenizers, these have
    made every store a miss."""
    assert generator.identity == IDENTITY


@pytest.mark.parametrize("name", CONFIGS)
def test_the_fingerprint_of_a_compressor_is_the_pinned_one(generator: Generator, name: str) -> None:
    assert pinned.make_compressor(generator, name).fingerprint == FINGERPRINTS[name]


def test_the_fields_of_a_fingerprint_are_the_pinned_ones(generator: Generator) -> None:
    assert pinned.make_compressor(generator, CHECKPOINT).fingerprint_fields() == FIELDS


def test_the_defaults_of_a_config_are_the_pinned_ones_and_are_in_no_fingerprint() -> None:
    config = CompressorConfig()
    assert config.fingerprint_fields() == {}
    values = config.to_dict()
    assert {name: values[name] for name in DEFAULTS} == DEFAULTS


def test_fingerprints_are_equal_only_where_one_compression_serves_several_ratios() -> None:
    same = {"learned", "learned, another ratio"}
    assert FINGERPRINTS.keys() == CONFIGS.keys()
    assert len({FINGERPRINTS[name] for name in same}) == 1
    assert len(set(FINGERPRINTS.values())) == len(CONFIGS) - 1


@pytest.mark.parametrize(("namespace", "text"), NAMES)
def test_keys_and_text_ids_are_the_pinned_ones(namespace: str, text: str) -> None:
    names = Namespace(namespace)
    assert (names.key("ef" * 32, text), names.text_id(text)) == NAMES[namespace, text]


def test_ids_of_documents_are_the_pinned_ones() -> None:
    assert Namespace("").document_id("Zoë.txt") == "Zoë.txt"
    assert Namespace(NAMESPACE).document_id("Zoë.txt") == f"{TENANT}Zoë.txt"


def test_the_id_of_a_cipher_is_the_pinned_one() -> None:
    assert CIPHER.id == "d4c63b02e1fb31fa"


@pytest.mark.parametrize(("name", "text"), [stored[:2] for stored in STORED])
def test_a_compressor_computes_what_it_computed_when_the_pins_were_written(
    generator: Generator, values: dict[str, Tensor], name: str, text: str
) -> None:
    (kv,) = pinned.make_compressor(generator, name).compress([TEXTS[text]])
    require_close(kv, values, name, text)


# --- checkpoint


def test_a_checkpoint_is_loaded_and_compresses_as_it_did(
    generator: Generator, values: dict[str, Tensor], tmp_path: Path
) -> None:
    loaded = checkpoint.load(FOLDER / "checkpoint", generator)
    assert loaded.fingerprint == FINGERPRINTS[CHECKPOINT]
    assert loaded.config == pinned.make_compressor(generator, CHECKPOINT).config
    assert checkpoint.load_prompt_format(FOLDER / "checkpoint") == FORMAT
    for text, kv in zip(TEXTS, loaded.compress(list(TEXTS.values())), strict=True):
        require_close(kv, values, CHECKPOINT, text)
    checkpoint.save(loaded, tmp_path / "again", prompt_format=FORMAT)
    for path in (FOLDER / "checkpoint").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


# --- store


def test_every_entry_of_a_pinned_store_is_a_hit(
    opened: DiskStore, generator: Generator, values: dict[str, Tensor]
) -> None:
    assert set(opened) == set(KEYS)
    for (name, text, _, namespace), key in zip(STORED, KEYS, strict=True):
        compressor = cached(generator, name, opened, namespace)
        assert compressor.key(TEXTS[text]) == key
        fetched = compressor.fetch([TEXTS[text]], on_miss="raise")
        (kv,) = fetched.kvs
        assert fetched.misses == [None]
        assert kv is not None
        require_value(kv, values, name, text)
        require_value(opened[key], values, name, text)
        assert opened.extent(key) == (kv.num_tokens, kv.num_entries)


def test_the_first_kv_entries_of_a_pinned_entry_serve_a_higher_ratio(
    opened: DiskStore, generator: Generator
) -> None:
    compressor = cached(generator, CHECKPOINT, opened)
    text, whole = TEXTS["owls"], opened[KEYS[0]]
    for ratio, entries in ((3, 34), (6, 18), (13, 8)):
        (kv,) = compressor.fetch([text], ratios=[ratio], on_miss="raise").kvs
        assert kv is not None and kv.bit_equal(whole.first(entries))
    assert compressor.fetch([text], ratios=[2], on_miss="text").misses == [
        "ratio: stored at 3x, asked for 2x"
    ]


def test_documents_and_origins_of_pinned_entries_are_those_they_were_put_with(
    opened: DiskStore, generator: Generator
) -> None:
    for (name, text, documents, namespace), key in zip(STORED, KEYS, strict=True):
        names = Namespace(namespace)
        assert opened.documents(key) == tuple(sorted(map(names.document_id, documents)))
        assert opened.origin(key) == (names.text_id(TEXTS[text]), FINGERPRINTS[name])
        fields = pinned.make_compressor(generator, name).fingerprint_fields()
        assert opened.fields(FINGERPRINTS[name]) == fields
    assert opened.keys_of("birds.txt") == [KEYS[0], KEYS[2]]
    assert opened.keys_of("all.txt") == [KEYS[0]]
    assert opened.keys_of(f"{TENANT}farm.txt") == [KEYS[1]]
    assert opened.keys_of("farm.txt") == []


@pytest.mark.parametrize("reason", GONE)
def test_why_an_entry_is_gone_is_still_known(
    opened: DiskStore, generator: Generator, reason: str
) -> None:
    name = "uniform, another ratio" if reason == "evicted" else "full"
    compressor = cached(generator, name, opened)
    assert compressor.fetch([GONE[reason]], on_miss="text").misses == [reason]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("uniform", "zoë", "fingerprint: config.stored_dtype was 'int8', is 'float32'"),
        ("full, no sink", "owls", f"fingerprint: config.sink was {pinned.SINK!r}, is its default"),
        ("full", "barley", "absent"),  # it is another namespace's
    ],
)
def test_what_differs_in_the_fingerprint_is_named(
    opened: DiskStore, generator: Generator, name: str, text: str, reason: str
) -> None:
    compressor = cached(generator, name, opened)
    assert compressor.fetch([TEXTS[text]], on_miss="text").misses == [reason]


def test_counters_and_sizes_of_a_pinned_store_are_those_it_was_closed_with(
    opened: DiskStore, cipher: Cipher | None
) -> None:
    stats = opened.stats()
    assert (stats.entries, stats.pinned, stats.documents, stats.quarantined) == (4, 1, 4, 1)
    assert (stats.hits, stats.misses, stats.total_quarantined, stats.evicted) == (4, 2, 1, 0)
    assert stats.reasons == {"absent": 1, "corrupt": 1}
    assert stats.cipher == (None if cipher is None else cipher.id)
    assert stats.nbytes == opened.nbytes == (11968 if cipher is None else 13104)
    assert {made.fingerprint for made in stats.fingerprints} == {
        FINGERPRINTS[name] for name, *_ in STORED
    }


def test_a_pinned_entry_stays_when_all_others_are_evicted(
    folder: Path, cipher: Cipher | None
) -> None:
    with DiskStore(folder, max_bytes=4000, cipher=cipher) as store:
        store["ab" * 32] = make_kv()
        assert set(store) == {KEYS[PINNED_ENTRY], "ab" * 32}
        assert store.check() == []


def test_forgetting_a_document_of_a_pinned_store_deletes_what_only_it_uses(
    folder: Path, cipher: Cipher | None
) -> None:
    with DiskStore(folder, cipher=cipher) as store:
        assert store.forget("birds.txt") == 1
        assert set(store) == {KEYS[0], KEYS[1], KEYS[3]}
        assert store.documents(KEYS[0]) == ("all.txt",)
        assert store.why_absent(KEYS[2]) == "forgotten"
        assert store.stats().quarantined == 1
        store.forget("tower.txt")  # whose entry is in quarantine
        assert store.stats().quarantined == 0
        assert store.check() == []


def test_pinned_entries_expire_by_when_they_were_stored(
    folder: Path, cipher: Cipher | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DiskStore(folder, read_only=True, cipher=cipher) as store:
        written = time.time() - (store.stats().oldest_s or 0.0)
    for age, remaining in ((3600.0, set(KEYS)), (3 * 3600.0, set())):
        monkeypatch.setattr(time, "time", partial(float, written + age))
        with DiskStore(folder, read_only=True, max_age_s=2 * 3600.0, cipher=cipher) as store:
            assert set(store) == remaining
            assert store.why_absent(KEYS[0]) == ("absent" if remaining else "expired")


def test_an_encrypted_store_is_opened_with_its_key_alone(tmp_path: Path) -> None:
    folder = pinned.unpack("store-encrypted", tmp_path)
    before = bytes_in(folder)
    for other in (None, Cipher(bytes(32))):
        with pytest.raises(ValueError, match=f"is encrypted with key {CIPHER.id}, and was opened"):
            DiskStore(folder, read_only=True, cipher=other)
    assert bytes_in(folder) == before


# --- store of format 2


def test_a_store_of_format_2_is_not_opened_to_be_read_only(tmp_path: Path) -> None:
    folder = pinned.unpack("store-format-2", tmp_path)
    before = bytes_in(folder)
    expected = "is a store of format 2, .* reads format 3; open it once with write permission"
    with pytest.raises(ValueError, match=expected):
        DiskStore(folder, read_only=True)
    assert bytes_in(folder) == before


def test_entries_of_format_2_are_misses_that_say_so(tmp_path: Path) -> None:
    folder = pinned.unpack("store-format-2", tmp_path)
    with DiskStore(folder) as store:
        assert set(store) == set(KEYS_OF_FORMAT_2)
        for key in KEYS_OF_FORMAT_2:
            with pytest.raises(
                CorruptEntryError, match="is of format 2, this sac_rag reads"
            ) as error:
                store[key]
            assert error.value.reason == "format"
            assert store.why_absent(key) == "format"
        assert len(store) == 0
        assert store.check() == []
        stats = store.stats()
        assert (stats.quarantined, stats.hits, stats.reasons["format"]) == (4, 4, 8)
    with DiskStore(folder, read_only=True) as store:  # which it was not before
        assert store.why_absent(KEYS_OF_FORMAT_2[0]) == "format"


def test_a_store_of_format_2_keeps_documents_pins_origins_and_reasons(tmp_path: Path) -> None:
    with DiskStore(pinned.unpack("store-format-2", tmp_path)) as store:
        owls, barley, full, zoe = KEYS_OF_FORMAT_2
        assert store.documents(owls) == ("all.txt", "birds.txt")
        assert store.documents(barley) == (f"{TENANT}farm.txt",)
        assert store.keys_of("birds.txt") == [owls, full]
        text_id = Namespace("").text_id(TEXTS["owls"])
        assert store.origin(owls) == (text_id, FINGERPRINT_OF_FORMAT_2)
        assert store.why_absent(FORGOTTEN_OF_FORMAT_2) == "forgotten"
        stats = store.stats()
        assert (stats.entries, stats.pinned, stats.documents) == (4, 1, 3)
        assert (stats.hits, stats.misses) == (4, 1)
        with pytest.raises(KeyError):
            store.extent(zoe)


def test_texts_of_a_store_of_format_2_are_there_under_another_fingerprint(
    tmp_path: Path, generator: Generator
) -> None:
    """Its fingerprints covered the defaults of a config too."""
    with DiskStore(pinned.unpack("store-format-2", tmp_path)) as store:
        compressor = cached(generator, "learned", store)
        fetched = compressor.fetch([TEXTS["owls"]])
        (miss,) = fetched.misses
        assert miss is not None
        assert miss.startswith("fingerprint: config.cue was True, is its default; config.first_")
        assert compressor.fetch([TEXTS["owls"]], on_miss="raise").misses == [None]
        problems = store.check()  # of the others, which nobody has asked for
        assert len(problems) == 4
        assert all("the entry is of format 2" in problem for problem in problems)


# --- archive


def test_a_pinned_archive_holds_what_was_exported(values: dict[str, Tensor]) -> None:
    archive = Archive(FOLDER / "archive.sacrag")
    assert archive.verify() == []
    assert set(archive) == set(KEYS[:2])
    assert archive.origin.fingerprint == FINGERPRINTS[CHECKPOINT]
    assert archive.origin.fields == FIELDS
    assert archive.origin.prompt_format == FORMAT
    assert archive.origin.config == checkpoint.read(FOLDER / "checkpoint")[0]
    cue = checkpoint.read(FOLDER / "checkpoint")[1]["cue"]
    assert archive.origin.cue is not None and archive.origin.cue.equal(cue)
    for (name, text, documents, namespace), key in zip(STORED[:2], KEYS[:2], strict=True):
        names = Namespace(namespace)
        require_value(archive[key], values, name, text)
        record = archive.records[key]
        assert record.documents == tuple(sorted(map(names.document_id, documents)))
        assert record.text_id == names.text_id(TEXTS[text])
        assert archive.read(key, lambda _: 5).bit_equal(archive[key].first(5))


def test_exporting_a_pinned_store_writes_the_pinned_archive(
    generator: Generator, tmp_path: Path
) -> None:
    origin = Origin.of(pinned.make_compressor(generator, CHECKPOINT), FORMAT)
    with DiskStore(pinned.unpack("store", tmp_path), read_only=True) as store:
        exported = export(store, tmp_path / "archive.sacrag", origin)
    assert (exported.written, exported.others, exported.bad) == (2, 2, ())
    assert (tmp_path / "archive.sacrag").read_bytes() == (FOLDER / "archive.sacrag").read_bytes()


@pytest.mark.parametrize(("namespace", "text"), [("", "owls"), (NAMESPACE, "barley")])
def test_a_pinned_archive_serves(
    generator: Generator, place: Path, namespace: str, text: str
) -> None:
    served = SacRAG.from_archive(FOLDER / "archive.sacrag", "./model", namespace=namespace)
    assert served.prompt_format == FORMAT
    answer = served.answer(QUESTION, [TEXTS[text]], SHORT)
    assert [chunk.status for chunk in answer.chunks] == ["hit"]
    # As the compressor itself answers.
    plain = cached(generator, CHECKPOINT, MemoryStore(), namespace)
    assert (
        answer.text
        == SacRAG(plain, prompt_format=FORMAT).answer(QUESTION, [TEXTS[text]], SHORT).text
    )


@pytest.mark.parametrize("kind", ["memory", "disk", "encrypted"])
def test_a_pinned_archive_is_imported(
    generator: Generator, tmp_path: Path, values: dict[str, Tensor], kind: str
) -> None:
    secret = CIPHER if kind == "encrypted" else None
    store: AnchorStore = (
        MemoryStore() if kind == "memory" else DiskStore(tmp_path / "new", cipher=secret)
    )
    assert Archive(FOLDER / "archive.sacrag").copy_to(store) == 2
    (kv,) = cached(generator, CHECKPOINT, store).fetch([TEXTS["owls"]], on_miss="raise").kvs
    assert kv is not None
    require_value(kv, values, CHECKPOINT, "owls")
    if isinstance(store, DiskStore):
        assert store.documents(KEYS[0]) == ("all.txt", "birds.txt")
        assert store.check() == []
        store.close()


# --- collection


def test_a_pinned_collection_is_opened_with_its_settings(place: Path) -> None:
    assert Collection.exists(place / "collection")
    with closing(Collection("collection")) as collection:
        assert asdict(collection.settings) == {
            "model": "./model",
            "compressor": "./checkpoint",
            "ratio": None,
            "stored_dtype": None,
            "embedder": "./model",
            "chunk_tokens": 64,
        }
        assert collection.index.chunks == CHUNKS
        assert collection.rag.prompt_format == FORMAT
    settings = CollectionSettings(
        model="./model", compressor="./checkpoint", embedder="./model", chunk_tokens=64
    )
    with closing(Collection("collection", settings)) as collection:
        assert len(collection.index) == 3


def test_a_search_of_a_pinned_collection_finds_what_it_found(place: Path) -> None:
    with closing(Collection("collection")) as collection:
        hits = collection.search(QUESTION, k=3)
        assert [hit.chunk for hit in hits] == [CHUNKS[i] for i in (2, 1, 0)]
        assert [hit.score for hit in hits] == pytest.approx([0.67146, 0.21461, 0.12684], abs=1e-4)


def test_every_chunk_of_a_pinned_collection_is_a_hit(
    place: Path, values: dict[str, Tensor]
) -> None:
    with closing(Collection("collection")) as collection:
        answer = collection.rag.answer(QUESTION, CHUNKS, SHORT)
        assert [chunk.status for chunk in answer.chunks] == ["hit", "hit", "hit"]
        reports = [report for report in collection.precompress(CHUNKS) if report.chunks]
        assert [(report.hits, report.computed) for report in reports] == [(3, 0)]
    with DiskStore(place / "collection" / "anchors", read_only=True) as store:
        assert store.check() == []
        for text in ("owls", "barley"):
            key = Namespace("").key(FINGERPRINTS[CHECKPOINT], TEXTS[text])
            require_close(store[key], values, CHECKPOINT, text)  # read together, LoRA merged
        # Its chunk asked for a lower ratio than the compressor's own.
        zoe = store[Namespace("").key(FINGERPRINTS[CHECKPOINT], TEXTS["zoë"])]
        require_close(zoe.first(33), values, CHECKPOINT, "zoë")
        assert (zoe.num_tokens, zoe.num_entries) == (25, 50)
        assert store.keys_of("farm.txt") == sorted(store.keys_of("farm.txt"))
        assert len(store.keys_of("farm.txt")) == 2


def test_adding_the_same_chunks_to_a_pinned_collection_changes_nothing(place: Path) -> None:
    index = place / "collection" / "index"
    before = bytes_in(index)
    with closing(Collection("collection")) as collection:
        assert collection.add(CHUNKS, whole_documents=True) == 0
    assert bytes_in(index) == before
