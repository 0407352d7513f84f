"""A cached compressor computes a text once, gives the same bits again, and names its misses."""

from __future__ import annotations

import errno
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.clock import Clock
from support.models import PROSE, make_compressor, passes_of

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors.base import Compressor
from sac_rag.errors import REASONS, ChunkMissError, CorruptEntryError, PromptTooLongError, name_of
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.namespace import Namespace
from sac_rag.stores import DiskStore, MemoryStore
from sac_rag.stores.base import DocumentStore, MappingStore, Wanted, as_document_store


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    return make_compressor(llama, "sac")


@pytest.fixture(scope="module")
def nested(llama: Generator) -> Compressor:
    """At 2x, with chunks of several segments."""
    return make_compressor(llama, "shared", ratio=2, segment_tokens=13).merged()


class ReadOnly(dict[str, AnchorKV]):
    """A store on a full disk."""

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")


class Unreadable(dict[str, AnchorKV]):
    """A store behind a broken network, say."""

    def __getitem__(self, key: str) -> AnchorKV:
        raise OSError(errno.EIO, "input/output error")


class Rotten(dict[str, AnchorKV]):
    """A store whose bytes are not those that were written."""

    reason = "corrupt"

    def __getitem__(self, key: str) -> AnchorKV:
        raise CorruptEntryError("checksum differs", self.reason)


class Recording(dict[str, AnchorKV]):
    """A store that notes every read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __getitem__(self, key: str) -> AnchorKV:
        self.calls.append(("get", key))
        return super().__getitem__(key)

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        self.calls.append(("set", key))
        super().__setitem__(key, kv)


# --- once, and the same


def test_the_second_time_the_model_does_not_run_and_the_bits_are_the_same(
    sac: Compressor, store: MutableMapping[str, AnchorKV]
) -> None:
    first = CachedCompressor(sac, store).fetch(PROSE)
    assert first.misses == ["absent"] * 8
    with passes_of(sac.generator) as passes:
        second = CachedCompressor(sac, store).fetch(PROSE)
    assert passes == []
    assert second.misses == [None] * 8
    for one, other in zip(first.kvs, second.kvs, strict=True):
        assert one is not None and other is not None and one.bit_equal(other)


@pytest.mark.parametrize("stored_dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_hit_has_the_bits_of_compressing_without_a_store(
    llama: Generator, disk: DiskStore, stored_dtype: Any
) -> None:
    compressor = make_compressor(llama, "sac", stored_dtype=stored_dtype)
    cached = CachedCompressor(compressor, disk)
    cached.compress([PROSE[0]])
    (plain,), (hit,) = cached.inner.compress([PROSE[0]]), cached.compress([PROSE[0]])
    assert hit.bit_equal(plain)


def test_only_what_is_missing_is_computed(sac: Compressor) -> None:
    cached = CachedCompressor(sac, {})
    cached.compress([PROSE[1], PROSE[3]])
    with passes_of(sac.generator) as passes:
        fetched = cached.fetch(PROSE[:4])
    assert fetched.misses == ["absent", None, "absent", None]
    assert passes == [2]


def test_equal_texts_in_one_call_are_computed_and_read_once(sac: Compressor) -> None:
    store = Recording()
    cached = CachedCompressor(sac, store)
    with passes_of(sac.generator) as passes:
        fetched = cached.fetch([PROSE[0], PROSE[1], PROSE[0], PROSE[0]])
    assert passes == [2]
    assert fetched.misses == ["absent"] * 4
    assert fetched.kvs[0] is fetched.kvs[2] is fetched.kvs[3]
    reads = [key for call, key in store.calls if call == "get"]
    assert len(reads) == len(set(reads)) == 2


def test_a_value_just_computed_is_not_read_back(sac: Compressor) -> None:
    store = Recording()
    CachedCompressor(sac, store).fetch([PROSE[0]])
    assert [call for call, _ in store.calls] == ["get", "set"]


def test_no_texts_are_no_work(sac: Compressor) -> None:
    with passes_of(sac.generator) as passes:
        fetched = CachedCompressor(sac, {}).fetch([])
    assert (fetched.kvs, fetched.misses, passes) == ([], [], [])


def test_in_asks_the_store(sac: Compressor, store: MutableMapping[str, AnchorKV]) -> None:
    cached = CachedCompressor(sac, store)
    assert PROSE[0] not in cached
    cached.compress([PROSE[0]])
    assert PROSE[0] in cached


def test_times_are_those_of_loading_and_of_computing(sac: Compressor) -> None:
    cached = CachedCompressor(sac, {}, clock=Clock())
    missed, hit = cached.fetch(PROSE), cached.fetch(PROSE)
    assert 0 < hit.compress_s < missed.compress_s
    assert 0 < missed.load_s < hit.load_s


# --- one compression, every higher ratio


def entries_at(compressor: Compressor, ratio: int, *texts: str) -> list[int]:
    return [compressor.num_entries(len(compressor.tokenize(text)), ratio) for text in texts]


@pytest.mark.parametrize("ratio", [2, 5, 15])
@pytest.mark.parametrize("stored_dtype", ["float32", "bfloat16", "int8"])
def test_a_store_filled_at_2x_has_the_bits_of_compressing_at_any_higher_ratio(
    nested: Compressor, store: MutableMapping[str, AnchorKV], stored_dtype: Any, ratio: int
) -> None:
    compressor = nested.storing(stored_dtype)
    CachedCompressor(compressor, store).fetch(PROSE)
    expected = compressor.at_ratio(ratio).compress(PROSE)
    with passes_of(nested.generator) as passes:
        asked = CachedCompressor(compressor, store).fetch(PROSE, ratios=[ratio] * 8)
        at_ratio = CachedCompressor(compressor.at_ratio(ratio), store).fetch(PROSE)
    assert passes == []
    for fetched in (asked, at_ratio):
        assert fetched.misses == [None] * 8
        for kv, one in zip(fetched.kvs, expected, strict=True):
            assert kv is not None and kv.bit_equal(one)


def test_more_than_is_stored_is_a_named_miss_and_what_is_computed_replaces_it(
    nested: Compressor, store: MutableMapping[str, AnchorKV]
) -> None:
    CachedCompressor(nested.at_ratio(5), store).compress(PROSE[:2])
    cached = CachedCompressor(nested, store)
    fetched = cached.fetch(PROSE[:2], ratios=[1, 5])
    assert fetched.misses == ["ratio: stored at 5x, asked for 1x", None]
    assert name_of(fetched.misses[0]) in REASONS
    assert (fetched.loads, fetched.computed) == (1, 1)
    (expected,) = nested.at_ratio(1).compress(PROSE[:1])
    again = cached.fetch(PROSE[:2], ratios=[1, 5])
    assert again.misses == [None, None]
    for got in (fetched.kvs[0], again.kvs[0], store[cached.key(PROSE[0])]):
        assert got is not None and got.bit_equal(expected)
    stored = [store[cached.key(text)].num_entries for text in PROSE[:2]]
    assert stored == [*entries_at(nested, 1, PROSE[0]), *entries_at(nested, 5, PROSE[1])]


def test_more_than_is_stored_is_not_computed_unless_it_may_be(nested: Compressor) -> None:
    cached = CachedCompressor(nested, {})
    cached.compress(PROSE[:2])
    with passes_of(nested.generator) as passes:
        as_text = cached.fetch([PROSE[0], *PROSE[:2]], ratios=[1, 2, 15], on_miss="text")
        with pytest.raises(ChunkMissError) as caught:
            cached.fetch(PROSE[:2], ratios=[2, 1], on_miss="raise")
    assert passes == []
    assert [kv is None for kv in as_text.kvs] == [True, False, False]
    assert as_text.misses == ["ratio: stored at 2x, asked for 1x", None, None]
    assert caught.value.reasons == [None, "ratio: stored at 2x, asked for 1x"]


def test_equal_texts_at_several_ratios_are_one_reading_or_one_computation(
    nested: Compressor,
) -> None:
    store = Recording()
    cached = CachedCompressor(nested, store)
    for misses in (["absent"] * 3, [None] * 3):
        store.calls.clear()
        with passes_of(nested.generator) as passes:
            fetched = cached.fetch([PROSE[0]] * 3, ratios=[5, 1, None])
        assert fetched.misses == misses
        assert [call for call, _ in store.calls] == (["get", "set"] if passes else ["get"])
        assert [kv and kv.num_entries for kv in fetched.kvs] == [
            entries_at(nested, ratio, PROSE[0])[0] for ratio in (5, 1, 2)
        ]


def test_one_chunks_ratio_changes_nothing_of_the_others(nested: Compressor) -> None:
    for cached in (CachedCompressor(nested, {}), CachedCompressor(nested, MemoryStore())):
        apart = nested.compress(PROSE[:3])
        for _ in range(2):  # computed, and read
            first, second, third = cached.fetch(PROSE[:3], ratios=[None, 1, None]).kvs
            assert first is not None and first.bit_equal(apart[0])
            assert third is not None and third.bit_equal(apart[2])
            assert second is not None
            assert second.num_entries == entries_at(nested, 1, PROSE[1])[0]
        stored = [cached.store[cached.key(text)].num_entries for text in PROSE[:3]]
        assert stored == [kv.num_entries for kv in (first, second, third)]


def test_what_a_higher_ratio_computes_is_stored_at_the_compressors_own(nested: Compressor) -> None:
    cached = CachedCompressor(nested, {})
    (kv,) = cached.fetch(PROSE[:1], ratios=[15]).kvs
    assert kv is not None and kv.num_entries == entries_at(nested, 15, PROSE[0])[0]
    assert cached.fetch(PROSE[:1]).misses == [None]


class Partial(MappingStore):
    """A store that records how many entries are wanted of it."""

    def __init__(self) -> None:
        super().__init__({})
        self.read_entries: list[int] = []

    def read(self, key: str, wanted: Wanted) -> AnchorKV:
        kv = super().__getitem__(key)
        self.read_entries.append(wanted(kv.num_tokens))
        return kv.first(min(wanted(kv.num_tokens), kv.num_entries))

    def extent(self, key: str) -> tuple[int, int]:
        kv = super().__getitem__(key)
        return kv.num_tokens, kv.num_entries

    def __getitem__(self, key: str) -> AnchorKV:
        raise AssertionError("it can be read in part")


def test_no_more_is_read_than_the_lowest_ratio_needs(nested: Compressor) -> None:
    store = Partial()
    assert as_document_store(store) is store
    cached = CachedCompressor(nested, store)
    for text, kv in zip(PROSE, nested.compress(PROSE), strict=True):
        cached.keep(text, kv)
    fetched = cached.fetch([*PROSE[:2], PROSE[0]], ratios=[15, None, 5])
    assert fetched.misses == [None] * 3
    assert store.read_entries == [
        *entries_at(nested, 5, PROSE[0]),
        *entries_at(nested, 2, PROSE[1]),
    ]
    read = [kv.nbytes for kv in fetched.kvs if kv is not None]
    assert fetched.load_bytes == read[1] + read[2]
    assert PROSE[0] in cached


def test_too_few_entries_are_not_there(
    nested: Compressor, store: MutableMapping[str, AnchorKV]
) -> None:
    CachedCompressor(nested.at_ratio(5), store).compress(PROSE[:1])
    assert [PROSE[0] in CachedCompressor(nested.at_ratio(r), store) for r in (2, 5, 15)] == [
        *(False, True, True),
    ]
    cached = CachedCompressor(nested, store)
    assert [cached.is_stored(PROSE[0], ratio) for ratio in (None, 4, 6)] == [False, False, True]
    assert not cached.is_stored(PROSE[1], 15)


@pytest.mark.parametrize("method", ["sac", "full"])
def test_a_compressor_that_ranks_nothing_has_one_ratio_and_says_what_to_do(
    llama: Generator, sac: Compressor, method: str
) -> None:
    compressor = sac if method == "sac" else make_compressor(llama, "full")
    cached, configured = CachedCompressor(compressor, {}), compressor.config.ratio
    assert cached.fetch(PROSE[:1], ratios=[configured]).misses == ["absent"]
    assert cached.fetch(PROSE[:1], ratios=[None]).misses == [None]
    remedy = r"SacRAG.from_pretrained\(ratio=7\)" if method == "sac" else "trained compressor"
    with pytest.raises(ValueError, match=f"ratio must be {configured}, .*was: 7; .*{remedy}"):
        cached.fetch(PROSE[:1], ratios=[7])
    assert len(cached.store) == 1


@pytest.mark.parametrize("ratio", [0, -1, True, "5", 2.0])
def test_what_is_no_ratio_is_refused(nested: Compressor, ratio: Any) -> None:
    for ask in (CachedCompressor(nested, {}).ratio_for, lambda ratio: Chunk("text", ratio=ratio)):
        with pytest.raises(ValueError, match=f"an integer of at least 1, was: {ratio!r}"):
            ask(ratio)


# --- keys


def test_parts_of_a_key_do_not_run_into_each_other(sac: Compressor) -> None:
    one = CachedCompressor(sac, {}, namespace="a").key("bc")
    assert one != CachedCompressor(sac, {}, namespace="ab").key("c")


@given(
    one=st.tuples(st.text(), st.text()),
    other=st.tuples(st.text(), st.text()),
)
def test_keys_are_equal_for_equal_parts_only(one: tuple[str, str], other: tuple[str, str]) -> None:
    keys = [Namespace(space).key("fingerprint", text) for space, text in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


def test_namespaces_do_not_hit_each_other(
    sac: Compressor, store: MutableMapping[str, AnchorKV]
) -> None:
    CachedCompressor(sac, store, namespace="tenant 1").compress([PROSE[0]])
    other = CachedCompressor(sac, store, namespace="tenant 2")
    assert PROSE[0] not in other
    assert other.fetch([PROSE[0]]).misses == ["absent"]
    assert len(store) == 2


def test_another_fingerprint_is_a_miss(llama: Generator, sac: Compressor) -> None:
    store: dict[str, AnchorKV] = {}
    CachedCompressor(sac, store).compress([PROSE[0]])
    other = CachedCompressor(make_compressor(llama, "sac", ratio=4), store)
    assert other.fetch([PROSE[0]]).misses == ["absent"]


@pytest.mark.parametrize("text", ["\ud83d", "a\udc80b", "\ud83d\ude00"])
def test_half_a_surrogate_pair_has_a_key(sac: Compressor, text: str) -> None:
    cached = CachedCompressor(sac, {})
    assert cached.key(text) != cached.key("a")


@pytest.mark.parametrize("text", ["half \ud83d a pair", "a\udc80b"])
def test_half_a_surrogate_pair_is_compressed(sac: Compressor, text: str) -> None:
    (kv,) = CachedCompressor(sac, {}).compress([text])
    assert kv.num_anchors


@pytest.mark.parametrize("text", ["e\u0301", "\u00e9", "\u212b", "a ", "a", "A"])
def test_texts_that_only_look_alike_have_keys_of_their_own(sac: Compressor, text: str) -> None:
    cached = CachedCompressor(sac, {})
    texts = ["e\u0301", "\u00e9", "\u212b", "a ", "a", "A"]
    assert sum(cached.key(text) == cached.key(other) for other in texts) == 1


def test_keys_can_name_files(sac: Compressor) -> None:
    key = CachedCompressor(sac, {}, namespace="../..").key("/etc/passwd")
    assert len(key) == 64
    assert set(key) <= set("0123456789abcdef")


# --- misses


def test_on_miss_text_leaves_the_missing_out_and_runs_nothing(sac: Compressor) -> None:
    cached = CachedCompressor(sac, {})
    cached.compress([PROSE[1]])
    with passes_of(sac.generator) as passes:
        fetched = cached.fetch(PROSE[:3], on_miss="text")
    assert [kv is None for kv in fetched.kvs] == [True, False, True]
    assert fetched.misses == ["absent", None, "absent"]
    assert passes == []
    assert len(cached.store) == 1


def test_on_miss_raise_names_every_missing_chunk_and_runs_nothing(sac: Compressor) -> None:
    cached = CachedCompressor(sac, {})
    cached.compress([PROSE[1]])
    with passes_of(sac.generator) as passes, pytest.raises(ChunkMissError) as caught:
        cached.fetch(PROSE[:3], on_miss="raise")
    assert caught.value.reasons == ["absent", None, "absent"]
    assert "2 of 3 chunks" in str(caught.value)
    assert "{0: 'absent', 2: 'absent'}" in str(caught.value)
    assert isinstance(caught.value, KeyError)
    assert passes == []


def test_on_miss_raise_gives_hits(sac: Compressor) -> None:
    cached = CachedCompressor(sac, {})
    cached.compress(PROSE)
    assert None not in cached.fetch(PROSE, on_miss="raise").kvs


@pytest.mark.parametrize("on_miss", ["", "TEXT", "ignore", None])
def test_an_unknown_on_miss_is_refused_with_the_known_ones(sac: Compressor, on_miss: Any) -> None:
    with pytest.raises(ValueError, match=f"one of compress, text, raise, was: {on_miss!r}"):
        CachedCompressor(sac, {}).fetch([], on_miss=on_miss)


@pytest.mark.parametrize("reason", ["corrupt", "format"])
def test_the_store_names_the_reason(sac: Compressor, reason: str) -> None:
    store = Rotten()
    store.reason = reason
    fetched = CachedCompressor(sac, store).fetch([PROSE[0]])
    assert fetched.misses == [reason]
    assert fetched.kvs[0] is not None


def test_a_store_that_cannot_be_read_is_a_miss(sac: Compressor) -> None:
    fetched = CachedCompressor(sac, Unreadable()).fetch(PROSE[:2])
    assert fetched.misses == ["unreadable"] * 2
    assert None not in fetched.kvs


def test_a_store_that_cannot_be_written_is_counted_and_the_chunk_is_used(
    sac: Compressor, caplog: pytest.LogCaptureFixture
) -> None:
    cached = CachedCompressor(sac, ReadOnly())
    fetched = cached.fetch(PROSE[:2])
    assert None not in fetched.kvs
    assert cached.store_failures == 2
    assert "was not stored: [Errno 28] no space left on device" in caplog.text


def test_a_damaged_entry_on_disk_is_computed_anew_and_stored_again(
    sac: Compressor, disk: DiskStore
) -> None:
    cached = CachedCompressor(sac, disk)
    (kv,) = cached.compress([PROSE[0]])
    (file,) = disk.folder.glob("entries/*/*.kv")
    file.write_bytes(file.read_bytes()[:-1])
    fetched = cached.fetch([PROSE[0]])
    assert fetched.misses == ["corrupt"]
    assert fetched.kvs[0] is not None and fetched.kvs[0].bit_equal(kv)
    assert cached.fetch([PROSE[0]]).misses == [None]


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_text_without_text_is_refused(sac: Compressor, text: str) -> None:
    with pytest.raises(ValueError, match="a chunk must have text"):
        CachedCompressor(sac, {}).compress([PROSE[0], text])


def test_a_text_longer_than_the_model_is_refused_and_nothing_is_stored(sac: Compressor) -> None:
    cached = CachedCompressor(sac, {})
    with pytest.raises(PromptTooLongError):
        cached.compress([PROSE[0], "lighthouse " * 4200])
    assert len(cached.store) == 0


# --- the face of the compressor


@pytest.mark.parametrize("method", ["sac", "full", "shared", "icae", "x500"])
def test_the_wrapper_has_the_face_of_what_it_wraps(llama: Generator, method: str) -> None:
    compressor = make_compressor(llama, method)
    cached = CachedCompressor(compressor, {})
    for name in (
        *("generator", "config", "method", "computes", "is_nested", "cue", "generator_adapter"),
        *("sink_ids", "heading_ids", "batch_tokens"),
    ):
        expected = getattr(compressor, name)
        got = getattr(cached, name)
        assert got is expected or got == expected, name
    assert cached.tokenize(PROSE[0]) == compressor.tokenize(PROSE[0])
    assert cached.tokens_read([3, 700]) == compressor.tokens_read([3, 700])
    assert cached.storing("bfloat16").config == compressor.storing("bfloat16").config
    assert cached.at_ratio(compressor.config.ratio) is cached.inner


# --- accept


@pytest.mark.parametrize("on_miss", ["compress", "text"])
def test_accept_hears_of_hits_and_of_what_is_read_as_text(sac: Compressor, on_miss: Any) -> None:
    cached = CachedCompressor(sac, {})
    cached.compress(PROSE if on_miss == "compress" else PROSE[:1])
    heard: list[list[int]] = []
    with passes_of(sac.generator) as passes:
        cached.fetch(PROSE, on_miss=on_miss, accept=heard.append)
    assert heard == [[len(sac.tokenize(text)) for text in PROSE]]
    assert passes == []


def test_accept_hears_all_lengths_before_anything_is_computed(sac: Compressor) -> None:
    cached = CachedCompressor(sac, {})
    cached.compress([PROSE[1]])
    heard: list[list[int]] = []
    with passes_of(sac.generator) as passes:

        def accept(lengths: list[int]) -> None:
            assert passes == []
            heard.append(lengths)

        texts = [PROSE[0], PROSE[1], PROSE[0]]
        cached.fetch(texts, accept=accept)
        assert passes == [1]
    assert heard == [[len(sac.tokenize(text)) for text in texts]]


def test_what_accept_raises_ends_it_before_anything_is_computed(sac: Compressor) -> None:
    def refuse(lengths: list[int]) -> None:
        raise PromptTooLongError("too many")

    cached = CachedCompressor(sac, {})
    with passes_of(sac.generator) as passes, pytest.raises(PromptTooLongError, match="too many"):
        cached.fetch(PROSE, accept=refuse)
    assert passes == []
    assert len(cached.store) == 0


# --- documents


def test_a_disk_store_remembers_documents_and_a_dict_remembers_none(disk: DiskStore) -> None:
    assert as_document_store(disk) is disk
    assert disk.remembers_documents
    for store in (as_document_store({}), MemoryStore()):
        assert isinstance(store, DocumentStore)
        assert not store.remembers_documents


def test_a_dict_that_is_given_as_store_is_the_one_that_is_filled(sac: Compressor) -> None:
    mapping: dict[str, AnchorKV] = {}
    cached = CachedCompressor(sac, mapping)
    cached.fetch(PROSE[:2])
    assert dict(cached.store) == mapping
    assert list(mapping) == [cached.key(text) for text in PROSE[:2]]
    del cached.store[cached.key(PROSE[0])]
    assert list(mapping) == [cached.key(PROSE[1])]


def test_one_text_of_two_documents_is_stored_once_and_both_are_noted(
    sac: Compressor, disk: DiskStore
) -> None:
    cached = CachedCompressor(sac, disk)
    with passes_of(sac.generator) as passes:
        cached.fetch([PROSE[0], PROSE[0], PROSE[1]], documents=["b", "a", None])
    assert passes == [2]
    assert len(disk) == 2
    assert disk.documents(cached.key(PROSE[0])) == ("a", "b")
    assert disk.documents(cached.key(PROSE[1])) == ()


def test_a_document_can_claim_a_text_that_is_there(sac: Compressor, disk: DiskStore) -> None:
    cached = CachedCompressor(sac, disk)
    (kv,) = cached.fetch([PROSE[0]], documents=["a"]).kvs
    with passes_of(sac.generator) as passes:
        for document in ("b", "b", "a"):
            cached.claim(PROSE[0], document)
    assert passes == []
    key = cached.key(PROSE[0])
    assert disk.documents(key) == ("a", "b")
    assert kv is not None and disk[key].bit_equal(kv)


def test_claiming_in_a_store_without_documents_does_nothing(sac: Compressor) -> None:
    store = Recording()
    CachedCompressor(sac, store).claim(PROSE[0], "a")
    assert store.calls == []


def test_documents_of_another_number_than_the_texts_are_refused(sac: Compressor) -> None:
    with pytest.raises(ValueError):
        CachedCompressor(sac, {}).fetch(PROSE[:2], documents=["a"])


def test_a_compressor_in_training_must_be_wrapped_anew(
    make_generator: Callable[..., Generator],
) -> None:
    """The fingerprint is taken once, as documented: a new wrapper sees the new weights."""
    compressor = make_compressor(make_generator("llama"), "sac")
    cached = CachedCompressor(compressor, {})
    compressor.weights["anchor_embedding"].data += 1
    assert cached.fingerprint != CachedCompressor(compressor, {}).fingerprint
