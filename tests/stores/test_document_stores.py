"""Every store that remembers documents: what is forgotten, replaced, refused and explained."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from support.s3_server import S3
from support.stores import key_of, make_kv

from sac_rag.namespace import Namespace
from sac_rag.stores import TieredStore
from sac_rag.stores.base import DocumentStore

TEXT = "5e" * 32
ONE, TWO = "f1" * 32, "f2" * 32


@pytest.fixture(params=["disk", "redis", "tiered", "objects", *S3])
def documents(request: pytest.FixtureRequest) -> DocumentStore:
    """Every kind of store that remembers documents, empty."""
    name = {"redis": "redis_store", "s3": "s3_objects"}.get(request.param, request.param)
    store: DocumentStore = request.getfixturevalue(name)
    return store


def test_forgetting_a_document_deletes_what_only_it_uses(documents: DocumentStore) -> None:
    documents.put(key_of(0), make_kv(0), ["a"])
    documents.put(key_of(1), make_kv(1), ["a", "b"])
    documents.put(key_of(2), make_kv(2), ["b"])
    documents[key_of(3)] = make_kv(3)
    assert documents.forget("a") == 1
    assert sorted(documents) == sorted(key_of(i) for i in (1, 2, 3))
    assert documents.documents(key_of(1)) == ("b",)
    assert documents[key_of(1)].bit_equal(make_kv(1))
    assert (documents.forget("a"), documents.forget("nobody knows it")) == (0, 0)
    assert documents.why_absent(key_of(0)) == "forgotten"
    assert documents.forget("b", "c") == 2
    assert list(documents) == [key_of(3)]
    assert documents.keys_of("b") == []


def test_a_document_that_changed_keeps_the_entries_it_still_has(documents: DocumentStore) -> None:
    for i in range(3):
        documents.put(key_of(i), make_kv(i), ["report"])
    documents.put(key_of(1), make_kv(1), ["summary"])
    assert documents.replace_documents({"report": [key_of(0)]}) == 1
    assert sorted(documents) == sorted([key_of(0), key_of(1)])
    assert documents.documents(key_of(1)) == ("summary",)
    assert documents.keys_of("report") == [key_of(0)]


def test_what_another_compressor_made_of_a_text_that_stayed_is_kept(
    documents: DocumentStore,
) -> None:
    for number, text in enumerate(["aa", "bb"]):
        documents.put(key_of(number), make_kv(), ["report"], text_id=text, fingerprint="01")
        documents.put(key_of(10 + number), make_kv(), ["report"], text_id=text, fingerprint="02")
    assert documents.replace_documents({"report": [key_of(10)]}) == 2  # without the second text
    assert sorted(documents) == sorted([key_of(0), key_of(10)])


def test_one_str_for_several_is_refused(documents: DocumentStore) -> None:
    with pytest.raises(TypeError, match="documents must be several str"):
        documents.put(key_of(0), make_kv(), "abc")
    with pytest.raises(TypeError, match="document ids must be str"):
        documents.forget(["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="holds AnchorKVs, got: Tensor"):
        documents[key_of(0)] = torch.zeros(3)  # type: ignore[assignment]
    assert len(documents) == 0


def test_more_entries_replace_fewer_and_fewer_only_add_documents(documents: DocumentStore) -> None:
    few, many = make_kv(1, anchors=2), make_kv(1, anchors=8)
    documents.put(key_of(0), few, ["a"])
    documents.put(key_of(0), many, ["b"])
    assert documents[key_of(0)].bit_equal(many)
    documents.put(key_of(0), few, ["c"])
    assert documents[key_of(0)].bit_equal(many)
    assert documents.documents(key_of(0)) == ("a", "b", "c")
    assert documents.extent(key_of(0)) == (many.num_tokens, many.num_entries)
    documents[key_of(0)] = few
    assert documents[key_of(0)].bit_equal(few)
    assert documents.documents(key_of(0)) == ("a", "b", "c")


@pytest.mark.parametrize("anchors", [4, 2000])
def test_the_first_entries_are_those_of_the_whole(documents: DocumentStore, anchors: int) -> None:
    whole = make_kv(3, anchors=anchors)
    documents[key_of(0)] = whole
    read = documents.read(key_of(0), lambda tokens: tokens // 5)
    assert read.bit_equal(whole.first(anchors))
    assert documents.read(key_of(0), lambda _: 10**9).bit_equal(whole)
    with pytest.raises(ValueError, match=r"at least 1|from 1 to"):
        documents.read(key_of(0), lambda _: 0)


def test_several_are_read_at_once_and_each_has_its_own_error(documents: DocumentStore) -> None:
    for i in range(3):
        documents[key_of(i)] = make_kv(i, anchors=1000)
    wanted: dict[str, Any] = {key_of(i): None for i in range(4)}
    wanted[key_of(1)] = lambda _: 5
    wanted["no digest"] = None
    entries = documents.read_many(wanted)
    assert list(entries) == list(wanted)
    assert isinstance(entries[key_of(3)], KeyError)
    assert isinstance(entries["no digest"], KeyError)
    for i, count in ((0, None), (1, 5), (2, None)):
        kv, whole = entries[key_of(i)], make_kv(i, anchors=1000)
        assert not isinstance(kv, Exception)
        assert kv.bit_equal(whole if count is None else whole.first(count))


def test_the_fields_that_differ_are_named(documents: DocumentStore) -> None:
    documents.note(ONE, {"config.ratio": "5", "model": "aa"})
    documents.note(TWO, {"config.ratio": "4", "model": "aa"})
    documents.put(key_of(0), make_kv(), text_id=TEXT, fingerprint=ONE)
    reason = documents.why_absent(key_of(1), text_id=TEXT, fingerprint=TWO)
    assert reason == "fingerprint: config.ratio was 5, is 4"
    assert documents.why_absent(key_of(1), text_id="00", fingerprint=TWO) == "absent"
    with pytest.raises(ValueError, match="must be a lower-case hex digest"):
        documents.note("../x", {})


def test_no_document_has_the_id_of_one_in_another_namespace(documents: DocumentStore) -> None:
    open_, tenant = Namespace(""), Namespace("tenant")
    documents.put(key_of(0), make_kv(0), [tenant.document_id("memo")])
    documents.put(key_of(1), make_kv(1), [open_.document_id("memo")])
    assert documents.forget(open_.document_id(tenant.document_id("memo"))) == 0
    assert documents.forget(open_.document_id("memo")) == 1
    assert list(documents) == [key_of(0)]


def test_half_a_surrogate_pair_can_name_a_document(documents: DocumentStore) -> None:
    documents.put(key_of(0), make_kv(), ["\ud83d"])
    assert documents.documents(key_of(0)) == ("\ud83d",)
    assert documents.forget("\ud83d") == 1


def test_a_store_can_be_sent_to_another_process(documents: DocumentStore) -> None:
    if isinstance(documents, TieredStore):
        pytest.skip("its tiers may be of one process")
    documents[key_of(0)] = make_kv()
    with pickle.loads(pickle.dumps(documents)) as other:
        assert other[key_of(0)].bit_equal(make_kv())
