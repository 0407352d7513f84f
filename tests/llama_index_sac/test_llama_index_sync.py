"""What is deleted or replaced in LlamaIndex leaves the store, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import SummaryIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import (
    HierarchicalNodeParser,
    SentenceSplitter,
    SentenceWindowNodeParser,
)
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.schema import Document
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index_sac import SACPostprocessor, SACPrecompress, sync
from support.models import PROSE
from test_llama_index_nodes import Letters
from tiny_index import home_of_module, make_nodes, make_rag, no_loop_is_left, scored  # noqa: F401

from sac_rag import DiskStore, SacRAG
from sac_rag.lm.generator import Generator

SPLITTER = SentenceSplitter(chunk_size=24, chunk_overlap=0)
OLD, NEW, OTHER = " ".join(PROSE[:2]), " ".join(PROSE[1:3]), " ".join(PROSE[4:6])


@pytest.fixture
def rag(llama: Generator, disk: DiskStore) -> SacRAG:
    return make_rag(llama, store=disk)


def documents(**texts: str) -> list[Document]:
    return [Document(text=text, id_=name) for name, text in texts.items()]


def stored(rag: SacRAG) -> set[str]:
    """Sentences that are in the store."""
    return {text for text in PROSE if text in rag.compressor}


def index_of(**texts: str) -> Any:
    return SummaryIndex.from_documents(documents(**texts), transformations=[SPLITTER])


def test_after_a_deletion_the_rest_is_stored(rag: SacRAG) -> None:
    index = index_of(a=OLD, b=OTHER)
    assert sync(rag, index.docstore).computed == 4
    index.delete_ref_doc("a", delete_from_docstore=True)
    report = sync(rag, index.docstore)
    assert (report.computed, report.hits, report.deleted) == (0, 2, 2)
    assert stored(rag) == set(PROSE[4:6])


def test_after_a_refresh_the_new_text_is_stored_and_the_old_one_is_not(rag: SacRAG) -> None:
    index = index_of(a=OLD, b=OTHER)
    sync(rag, index.docstore)
    assert index.refresh_ref_docs(documents(a=NEW, b=OTHER)) == [True, False]
    report = sync(rag, index.docstore)
    assert (report.computed, report.hits, report.deleted) == (1, 3, 1)
    assert stored(rag) == {*PROSE[1:3], *PROSE[4:6]}
    assert rag.forget("a") == 2
    assert stored(rag) == set(PROSE[4:6])


@pytest.mark.parametrize("namespace", ["", "hers"])
def test_other_namespaces_and_texts_without_a_document_stay(
    llama: Generator, disk: DiskStore, namespace: str
) -> None:
    mine = make_rag(llama, store=disk, namespace=namespace)
    foreign = make_rag(llama, store=disk, namespace="his")
    foreign.precompress([("a", PROSE[6])])
    mine.precompress([("gone", PROSE[5]), PROSE[7]])
    assert sync(mine, make_nodes(2)).deleted == 1
    assert stored(mine) == {*PROSE[:2], PROSE[7]}
    assert stored(foreign) == {PROSE[6]}


def ingested(rag: SacRAG) -> tuple[IngestionPipeline, SimpleDocumentStore]:
    docstore = SimpleDocumentStore()
    pipeline = IngestionPipeline(
        transformations=[SPLITTER, SACPrecompress(rag, whole_documents=True), Letters()],
        docstore=docstore,
        vector_store=SimpleVectorStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )
    pipeline.run(documents=documents(a=OLD, b=OTHER))
    return pipeline, docstore


def test_whole_documents_in_a_pipeline_replace_their_former_versions(rag: SacRAG) -> None:
    pipeline, _ = ingested(rag)
    pipeline.run(documents=documents(a=NEW, b=OTHER))
    assert stored(rag) == {*PROSE[1:3], *PROSE[4:6]}


def test_what_a_pipeline_deletes_leaves_the_store_with_a_sync(rag: SacRAG) -> None:
    pipeline, docstore = ingested(rag)
    pipeline.run(documents=documents(b=OTHER))
    report = sync(rag, docstore)
    # The docstore has uncut documents, which are not retrieved.
    assert (report.computed, report.deleted) == (0, 2)
    assert stored(rag) == set(PROSE[4:6])


def test_an_empty_docstore_is_no_reason_to_delete_everything(rag: SacRAG) -> None:
    sync(rag, make_nodes(2))
    with pytest.raises(ValueError, match=r"has no nodes.*vector_store.get_nodes\(\)"):
        sync(rag, SimpleDocumentStore())
    assert stored(rag) == set(PROSE[:2])


def test_a_store_without_documents_cannot_be_synced(llama: Generator) -> None:
    with pytest.raises(TypeError, match="must remember documents"):
        sync(make_rag(llama, store={}), make_nodes(1))


# --- texts that are put in the place of a node's own


def test_sentence_windows_are_compressed_and_kept(rag: SacRAG) -> None:
    parser = SentenceWindowNodeParser.from_defaults(window_size=1)
    pipeline = IngestionPipeline(
        transformations=[parser, SACPrecompress(rag, text_key="window", whole_documents=True)]
    )
    nodes = pipeline.run(documents=documents(a=" ".join(PROSE[:4])))
    assert sync(rag, nodes, text_key="window").deleted == 0
    rag.on_miss = "raise"
    replaced = MetadataReplacementPostProcessor("window").postprocess_nodes(scored(list(nodes)))  # type: ignore[arg-type]
    assert len(SACPostprocessor(rag).postprocess_nodes(replaced)) == len(nodes) > 2


def test_parents_of_a_hierarchy_are_compressed_too(rag: SacRAG) -> None:
    parser = HierarchicalNodeParser.from_defaults(
        node_parser_ids=["large", "small"],
        node_parser_map={
            "large": SentenceSplitter(chunk_size=60, chunk_overlap=0),
            "small": SPLITTER,
        },
    )
    nodes = IngestionPipeline(transformations=[parser, SACPrecompress(rag)]).run(
        documents=documents(a=" ".join(PROSE[:4]))
    )
    assert all(node.get_content() in rag.compressor for node in nodes)
    assert len({len(node.get_content()) > 100 for node in nodes}) == 2
    assert rag.forget("a") == len({node.get_content() for node in nodes})
