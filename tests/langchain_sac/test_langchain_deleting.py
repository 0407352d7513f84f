"""What is deleted from an index can be deleted from the store, whoever stored it and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_sac import ChatSAC, SACCompressor, sync
from langchain_scenes import DOCUMENTS, QUESTION, Words, home_of_module, make_rag  # noqa: F401
from support.models import PROSE

from sac_rag import SacRAG
from sac_rag.lm.generator import Generator
from sac_rag.precompress.sync import stored_documents
from sac_rag.stores import DiskStore


@pytest.fixture
def rag(llama: Generator, disk: DiskStore) -> SacRAG:
    return make_rag(llama, store=disk)


def page(number: int, source: Any = "page", **metadata: Any) -> Document:
    return Document(PROSE[number], metadata={"source": source, **metadata})


SOURCES = [Path("docs") / "tower.md", 7, 1.5, "a b/ü?&\"'<>.md", "x" * 500, True]


@pytest.mark.parametrize("source", SOURCES, ids=repr)
@pytest.mark.parametrize("stored_by", ["transform_documents", "a question"])
def test_a_document_is_forgotten_by_its_source_of_any_type(
    rag: SacRAG, disk: DiskStore, source: Any, stored_by: str
) -> None:
    compressor, documents = SACCompressor(rag), [page(0, source), page(1, source), page(2, "b")]
    if stored_by == "transform_documents":
        compressor.transform_documents(documents)
    else:
        context = "\n".join(document.page_content for document in compressor.invoke(documents))
        ChatSAC(rag, max_tokens=1).invoke(f"{context}\n{QUESTION}")
    assert len(disk) == 3
    assert rag.forget(str(source)) == 2
    assert list(disk) == [rag.compressor.key(PROSE[2])]


def test_a_document_without_a_source_is_forgotten_by_its_id(rag: SacRAG) -> None:
    for source in (None, float("nan")):
        SACCompressor(rag).transform_documents(
            [Document(PROSE[0], id="seven", metadata={"source": source})]
        )
        assert rag.forget("seven") == 1


def test_sync_deletes_documents_and_splits_that_are_gone(rag: SacRAG, disk: DiskStore) -> None:
    SACCompressor(rag).transform_documents([page(0, "a"), page(1, "a"), page(2, "b")])
    report = sync(rag, [page(1, "a"), page(3, "c")])
    assert (report.computed, report.hits, report.deleted) == (1, 1, 2)
    assert sorted(disk) == sorted(rag.compressor.key(PROSE[i]) for i in (1, 3))


def test_sync_keeps_a_text_that_another_document_has(rag: SacRAG, disk: DiskStore) -> None:
    SACCompressor(rag).transform_documents([page(0, "a"), page(0, "b")])
    assert sync(rag, [page(0, "b")]).deleted == 0
    assert rag.forget("b") == 1


def test_sync_leaves_other_namespaces_and_texts_without_a_document_alone(
    llama: Generator, disk: DiskStore
) -> None:
    tenants = [make_rag(llama, store=disk, namespace=name) for name in ("", "one", "two")]
    for tenant in tenants:
        SACCompressor(tenant).transform_documents([page(0), page(1, "other")])
        tenant.precompress([PROSE[2]])
    for number, tenant in enumerate(tenants, 1):
        assert sync(tenant, [page(0)]).deleted == 1
        assert len(disk) == 9 - number
        assert stored_documents(tenant.compressor) == {tenant.compressor.document_id("page")}
    assert sync(tenants[0], [page(3, "new")]).deleted == 1


def test_sync_stores_at_the_ratio_of_the_compressor(llama: Generator, disk: DiskStore) -> None:
    rag = make_rag(llama, "shared", store=disk)
    compressor = SACCompressor(rag, ratio=1)
    compressor.transform_documents(DOCUMENTS[:2])
    assert sync(rag, DOCUMENTS[:2], ratio=1).hits == 2
    assert sync(rag, DOCUMENTS[2:3], ratio=1).deleted == 2
    assert rag.compressor.is_stored(PROSE[2], 1)


def test_sync_leaves_out_what_is_too_long(
    rag: SacRAG, disk: DiskStore, caplog: pytest.LogCaptureFixture
) -> None:
    report = sync(rag, [Document("word " * 9000, metadata={"source": "book"}), page(0)])
    assert (report.computed, len(report.bad), len(disk)) == (1, 1, 1)
    assert "book was not compressed" in caplog.text


def test_no_documents_are_no_reason_to_delete_everything(rag: SacRAG, disk: DiskStore) -> None:
    documents = iter([page(0), page(1)])
    sync(rag, documents)
    with pytest.raises(ValueError, match=r"an iterator can be read only once, .* use rag\.forget"):
        sync(rag, documents)
    assert len(disk) == 2


def test_sync_needs_a_store_that_remembers_documents(llama: Generator) -> None:
    with pytest.raises(TypeError, match="must remember documents, as a DiskStore does, was: dict"):
        sync(make_rag(llama), DOCUMENTS)


@pytest.mark.parametrize("cleanup", ["incremental", "full"])
def test_the_store_follows_an_index_through_changes(
    rag: SacRAG, disk: DiskStore, cleanup: Any
) -> None:
    records, vectors = InMemoryRecordManager(namespace="pages"), InMemoryVectorStore(Words())
    records.create_schema()
    compressor = SACCompressor(rag)

    def ingest(*documents: Document) -> None:
        how: Any = {"cleanup": cleanup, "source_id_key": "source", "key_encoder": "sha256"}
        index(documents, records, vectors, **how)
        if cleanup == "full":
            sync(rag, documents)
        else:
            compressor.transform_documents(documents, whole_documents=True)

    def indexed() -> list[str]:
        return sorted(rag.compressor.key(entry["text"]) for entry in vectors.store.values())

    ingest(page(0, "a"), page(1, "a"), page(2, "b"))
    assert sorted(disk) == indexed()
    ingest(page(1, "a"), page(3, "a"))
    assert sorted(disk) == indexed()
    assert len(disk) == (2 if cleanup == "full" else 3)
