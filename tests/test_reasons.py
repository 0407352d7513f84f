"""A chunk that is not used from the store is never a wrong answer, and has a reason with a name."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import PROSE, make_compressor, make_model, make_tokenizer, passes_of

from sac_rag import SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.errors import REASONS, CorruptEntryError, name_of
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.namespace import Namespace
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import DiskStore, MemoryStore
from sac_rag.stores.base import DocumentStore, MappingStore
from sac_rag.stores.cipher import Cipher

QUESTION = "Who counted the ships?"
SHORT = Decoding(max_new_tokens=4)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _home(home: Path) -> None:
    """No record of another run is believed."""


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    return make_compressor(llama, "sac")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path, sac: Compressor) -> Path:
    checkpoint.save(sac, tmp_path / "adapter")
    return tmp_path / "adapter"


def status(rag: SacRAG, text: str = PROSE[0]) -> str:
    return rag.answer(QUESTION, [text], SHORT).chunks[0].status


# --- the list


def test_the_guide_to_stores_explains_every_reason() -> None:
    page = (ROOT / "docs/stores.md").read_text(encoding="utf-8")
    assert [name for name in REASONS if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize("detail", ["", ": config.ratio was 5, is 4"])
def test_a_reason_is_counted_by_its_name(detail: str) -> None:
    assert name_of(f"fingerprint{detail}") == "fingerprint"


def test_a_store_on_disk_does_all_of_a_document_store_itself() -> None:
    for name, method in vars(DocumentStore).items():
        if name in {"pop", "read_many"}:
            continue  # made of the others, and a disk has no round trips to save
        if callable(method) and not name.startswith("_"):
            assert getattr(DiskStore, name) is not method, name


# --- what the store is told


class Telling(MappingStore):
    """A store that explains misses, and records what it is called with."""

    def __init__(self, reason: str = "evicted") -> None:
        super().__init__({})
        self.reason = reason
        self.notes: list[tuple[str, Mapping[str, str]]] = []
        self.told: list[tuple[str, str | None, str | None]] = []

    def put(
        self,
        key: str,
        kv: AnchorKV,
        documents: Any = (),
        *,
        text_id: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self[key] = kv
        self.told.append((key, text_id, fingerprint))

    def note(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        self.notes.append((fingerprint, fields))

    def why_absent(
        self, key: str, *, text_id: str | None = None, fingerprint: str | None = None
    ) -> str:
        self.told.append((key, text_id, fingerprint))
        if not self.reason:
            raise OSError(errno.EIO, "input/output error")
        return self.reason


def test_the_store_is_told_what_it_needs_to_explain_a_miss(sac: Compressor) -> None:
    store = Telling()
    cached = CachedCompressor(sac, store, namespace="tenant")
    assert cached.fetch(PROSE[:2]).misses == ["evicted"] * 2
    assert store.notes == [(sac.fingerprint, sac.fingerprint_fields())]
    expected = [(cached.key(t), cached.text_id(t), sac.fingerprint) for t in PROSE[:2]]
    assert store.told == expected * 2  # asked why, then given


def test_a_hit_asks_for_no_reason(sac: Compressor) -> None:
    store = Telling()
    cached = CachedCompressor(sac, store)
    cached.fetch(PROSE)
    store.told.clear()
    assert cached.fetch(PROSE).misses == [None] * 8
    assert store.told == []


def test_a_store_that_cannot_say_why_does_not_end_the_answer(sac: Compressor) -> None:
    assert CachedCompressor(sac, Telling("")).fetch(PROSE[:1]).misses == ["absent"]


def test_nothing_is_put_into_a_store_that_can_only_be_read(sac: Compressor) -> None:
    class ReadOnly(Telling):
        read_only = True

    store = ReadOnly()
    cached = CachedCompressor(sac, store)
    fetched = cached.fetch(PROSE)
    assert None not in fetched.kvs
    assert (len(store), cached.store_failures, fetched.failed_writes) == (0, 0, 0)


# --- reasons of a store on disk, as answers report them


def test_every_way_of_going_missing_is_named(sac: Compressor, tmp_path: Path) -> None:
    with DiskStore(tmp_path / "a") as store:
        rag = SacRAG(CachedCompressor(sac, store))
        assert status(rag) == "absent"
        assert status(rag) == "hit"
        rag.precompress([("document", PROSE[1])])
        rag.forget("document")
        assert status(rag, PROSE[1]) == "forgotten"
        (file, *_) = store.folder.glob("entries/*/*.kv")
        for file in store.folder.glob("entries/*/*.kv"):
            file.write_bytes(file.read_bytes()[:-1])
        assert status(rag) == "corrupt"
        assert status(rag) == "hit"
        assert rag.metrics().misses == {"absent": 1, "corrupt": 1, "forgotten": 1}


def test_an_evicted_chunk_is_said_to_be_evicted(sac: Compressor, tmp_path: Path) -> None:
    (kv,) = sac.compress([PROSE[0]])
    with DiskStore(tmp_path / "small", max_bytes=4 * kv.nbytes) as store:
        rag = SacRAG(CachedCompressor(sac, store))
        for text in PROSE:
            status(rag, text)
        assert status(rag, PROSE[0]) == "evicted"
        assert rag.metrics().evictions > 0


def test_an_old_chunk_is_said_to_be_expired(sac: Compressor, tmp_path: Path) -> None:
    with DiskStore(tmp_path / "aging", max_age_s=1e-6) as store:
        rag = SacRAG(CachedCompressor(sac, store))
        assert [status(rag), status(rag)] == ["absent", "expired"]


def test_an_encrypted_store_answers_as_any_other(sac: Compressor, tmp_path: Path) -> None:
    expected = SacRAG(CachedCompressor(sac, {})).answer(QUESTION, PROSE[:2], SHORT).text
    for _ in range(2):
        with DiskStore(tmp_path / "store", cipher=Cipher(b"k" * 32)) as store:
            answer = SacRAG(CachedCompressor(sac, store)).answer(QUESTION, PROSE[:2], SHORT)
        assert answer.text == expected
    assert [chunk.status for chunk in answer.chunks] == ["hit", "hit"]


def test_a_chunk_under_another_key_is_computed_and_said_to_be(sac: Compressor) -> None:
    class Sealed(dict[str, AnchorKV]):
        def __getitem__(self, key: str) -> AnchorKV:
            raise CorruptEntryError("it is encrypted with key 1, the store's is 2", "secret")

    rag = SacRAG(CachedCompressor(sac, Sealed()))
    assert [status(rag), status(rag)] == ["secret", "secret"]


# --- swapped, edited, changed: a miss with its reason, and the answer of the new


def fresh(model: Path, store: DiskStore, **options: Any) -> SacRAG:
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "decoding": SHORT, **options}
    return SacRAG.from_pretrained(model, store=store, **settings)


def require_miss(model: Path, store: DiskStore, reason: str, **options: Any) -> None:
    """A miss for this reason, answered as without a store; and from then on a hit."""
    rag = fresh(model, store, **options)
    got = rag.answer(QUESTION, PROSE[:2])
    for chunk in got.chunks:
        assert chunk.status.startswith(f"fingerprint: {reason} was "), chunk.status
    assert got.text == fresh(model, {}, **options).answer(QUESTION, PROSE[:2]).text  # type: ignore[arg-type]
    again = fresh(model, store, **options).answer(QUESTION, PROSE[:2])
    assert [chunk.status for chunk in again.chunks] == ["hit", "hit"]


def test_other_weights_under_the_same_name_are_a_miss(model: Path, disk: DiskStore) -> None:
    fresh(model, disk).precompress(PROSE[:2])
    make_model("llama", seed=1).save_pretrained(model)
    require_miss(model, disk, "generator.weights")


def test_weights_edited_keeping_size_and_time_are_a_miss(model: Path, disk: DiskStore) -> None:
    fresh(model, disk).precompress(PROSE[:2])
    file = model / "model.safetensors"
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-2] ^= 0x40  # one bit of the last weight's exponent
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    require_miss(model, disk, "generator.weights")


def test_another_tokenizer_is_a_miss(model: Path, disk: DiskStore) -> None:
    fresh(model, disk).precompress(PROSE[:2])
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["never seen"])
    tokenizer.save_pretrained(model)
    require_miss(model, disk, "generator.tokenizer")


def test_another_adapter_is_a_miss(
    model: Path, adapter: Path, disk: DiskStore, make_generator: Callable[..., Generator]
) -> None:
    fresh(model, disk, compressor=adapter).precompress(PROSE[:2])
    other = make_compressor(make_generator("llama"), "sac")
    next(iter(other.weights.values())).data.mul_(1.01)
    checkpoint.save(other, adapter)
    require_miss(model, disk, "compressor_weights", compressor=adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ratio": 4}, "config.ratio"),
        ({"stored_dtype": "bfloat16"}, "config.stored_dtype"),
        ({"stored_dtype": "int8"}, "config.stored_dtype"),
        ({"dtype": "bfloat16"}, "generator.dtype"),
    ],
    ids=["ratio", "stored dtype", "int8", "dtype"],
)
def test_another_ratio_or_dtype_is_a_miss(
    model: Path, adapter: Path, disk: DiskStore, change: dict[str, Any], reason: str
) -> None:
    fresh(model, disk, compressor=adapter).precompress(PROSE[:2])
    require_miss(model, disk, reason, compressor=adapter, **change)


# --- tenants


def test_two_tenants_with_one_text_do_not_hit_each_other_or_learn_of_it(
    sac: Compressor, disk: DiskStore
) -> None:
    one, other = (SacRAG(CachedCompressor(sac, disk, namespace=n)) for n in ("one", "other"))
    assert status(one) == "absent"
    assert status(other) == "absent"  # not "fingerprint": that would say that somebody has it
    assert [status(one), status(other)] == ["hit", "hit"]
    assert len(disk) == 2


def test_forgetting_a_tenants_document_leaves_anothers_of_the_same_name(
    sac: Compressor, disk: DiskStore
) -> None:
    one, other = (SacRAG(CachedCompressor(sac, disk, namespace=n)) for n in ("one", "other"))
    for rag in (one, other):
        rag.precompress([("report.txt", PROSE[0]), ("report.txt", PROSE[1])])
    assert one.forget("report.txt") == 2
    assert [status(other), status(other, PROSE[1])] == ["hit", "hit"]
    assert status(one) != "hit"


def test_forgetting_keeps_what_another_document_has_too(sac: Compressor, disk: DiskStore) -> None:
    rag = SacRAG(CachedCompressor(sac, disk))
    rag.precompress([("a", PROSE[0]), ("b", PROSE[0]), ("a", PROSE[1])])
    assert rag.forget("a") == 1
    assert rag.forget("a") == 0
    assert [status(rag), status(rag, PROSE[1])] == ["hit", "forgotten"]


@pytest.mark.parametrize("store", [{}, MemoryStore()], ids=["dict", "memory"])
def test_a_store_without_documents_forgets_none_and_says_so(sac: Compressor, store: Any) -> None:
    rag = SacRAG(CachedCompressor(sac, store))
    with pytest.raises(TypeError, match=f"DiskStore does, was: {type(store).__name__}"):
        rag.forget("a")


@given(names=st.tuples(st.text(), st.text()), text=st.text())
def test_names_of_two_namespaces_have_nothing_in_common(names: tuple[str, str], text: str) -> None:
    one, other = map(Namespace, names)
    same = names[0] == names[1]
    assert (one.key("f", text) == other.key("f", text)) is same
    assert (one.text_id(text) == other.text_id(text)) is same
    assert one.key("f", text) != one.text_id(text)
    assert one.text_id(text) not in (one.key("", text), one.key("f", text), one.key(text, ""))


def test_names_are_pinned_or_every_store_is_lost() -> None:
    tenant = Namespace("tenant")
    assert Namespace("").key("f", "text")[:16] == "1faf2241385f4968"
    assert tenant.key("f", "text")[:16] == "418ddd2423a73c4d"
    assert tenant.text_id("text")[:16] == "7725c0ce69589d3d"
    assert tenant.document_id("report.txt") == "33c7d8d3589fab7f:report.txt"
    assert Namespace("").document_id("report.txt") == "report.txt"


# --- other processes, other hash seeds


def test_a_process_with_another_hash_seed_fills_the_store_for_this_one(
    model: Path, tmp_path: Path
) -> None:
    script = (
        "import sys; from sac_rag import DiskStore, SacRAG; store = DiskStore(sys.argv[2]); "
        "rag = SacRAG.from_pretrained(sys.argv[1], store=store, namespace='n', device='cpu', "
        "dtype='float32'); print(rag.precompress(sys.argv[3:]).computed, hash('sac'))"
    )
    hashes = set()
    for seed, texts in (("1", PROSE[:4]), ("2", PROSE[4:])):
        process = subprocess.run(
            [sys.executable, "-c", script, str(model), str(tmp_path / "store"), *texts],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        computed, hashed = process.stdout.split()
        assert computed == "4"
        hashes.add(hashed)
    assert len(hashes) == 2
    with DiskStore(tmp_path / "store") as store:
        rag = fresh(model, store, namespace="n")
        with passes_of(rag.generator) as passes:
            answer = rag.answer(QUESTION, PROSE)
        assert {chunk.status for chunk in answer.chunks} == {"hit"}
        assert len(passes) == 1 + 4  # prefix and answer


# --- writes that fail


class Torn(dict[str, AnchorKV]):
    """A store that keeps rubbish of an entry it could not write."""

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        super().__setitem__(key, replace(kv, keys=kv.keys * 0, values=kv.values * 0))
        raise OSError(errno.ENOSPC, "no space left on device")


def test_a_failed_write_is_not_visible_to_the_answer(sac: Compressor) -> None:
    expected = SacRAG(CachedCompressor(sac, {})).answer(QUESTION, PROSE, SHORT)
    got = SacRAG(CachedCompressor(sac, Torn())).answer(QUESTION, PROSE, SHORT)
    assert got.text == expected.text
    assert got.usage == expected.usage


def test_a_full_disk_is_not_visible_to_answers_now_or_later(
    sac: Compressor, disk: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = SacRAG(CachedCompressor(sac, {})).answer(QUESTION, PROSE, SHORT).text
    rag = SacRAG(CachedCompressor(sac, disk))

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as during:
        during.setattr(os, "fsync", full)
        during.setattr(os, "replace", full)
        during.setattr(os, "rename", full)
        during.setattr(os, "write", full)
        during.setattr(os, "link", full)
        assert rag.answer(QUESTION, PROSE, SHORT).text == expected
    assert rag.metrics().store_failures == 8
    assert len(disk) == 0
    later = rag.answer(QUESTION, PROSE, SHORT)
    assert later.text == expected
    assert {chunk.status for chunk in later.chunks} == {"absent"}
    assert {chunk.status for chunk in rag.answer(QUESTION, PROSE, SHORT).chunks} == {"hit"}


def test_a_store_that_is_read_only_serves_and_stays_as_it_is(
    sac: Compressor, tmp_path: Path
) -> None:
    with DiskStore(tmp_path / "store") as store:
        SacRAG(CachedCompressor(sac, store)).precompress([Chunk(PROSE[0], id="a")])
    before = {f: f.read_bytes() for f in (tmp_path / "store").rglob("*.kv")}
    expected = SacRAG(CachedCompressor(sac, {})).answer(QUESTION, PROSE[:3], SHORT).text
    with DiskStore(tmp_path / "store", read_only=True) as store:
        rag = SacRAG(CachedCompressor(sac, store))
        answers = [rag.answer(QUESTION, PROSE[:3], SHORT) for _ in range(2)]
        assert [answer.text for answer in answers] == [expected] * 2
        for answer in answers:
            assert [c.status for c in answer.chunks] == ["hit", "absent", "absent"]
        assert rag.metrics().store_failures == 0
        assert len(store) == 1
    assert {f: f.read_bytes() for f in (tmp_path / "store").rglob("*.kv")} == before
