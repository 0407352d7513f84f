"""Nodes keep what they are, their texts are compressed, and what cannot be goes on as it is."""

from __future__ import annotations

import errno
import gc
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeWithScore,
    TextNode,
)
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict
from llama_index_sac import SACLLM, SACNode, SACPostprocessor
from support.models import PROSE
from tiny_index import (  # noqa: F401
    QUESTION,
    home_of_module,
    make_nodes,
    make_rag,
    no_loop_is_left,
    query_engine,
    scored,
)

from sac_rag import ChunkMissError, DiskStore
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator

METADATA = {"file": "log {content}.txt", "page": 4, "author": "Ingrid", "secret": None}


@pytest.fixture
def node() -> TextNode:
    (node,) = make_nodes(
        1,
        metadata=METADATA,
        excluded_llm_metadata_keys=["page"],
        excluded_embed_metadata_keys=["file"],
        embedding=[0.1, 0.2],
        start_char_idx=3,
        end_char_idx=9,
    )
    return node


def as_sac(node: BaseNode, rag: Any) -> Any:
    (processed,) = SACPostprocessor(rag).postprocess_nodes([NodeWithScore(node=node)])
    return processed.node


# --- the node


@pytest.mark.parametrize("mode", [mode for mode in MetadataMode if mode != MetadataMode.LLM])
def test_in_every_mode_but_the_llms_a_node_is_what_it_was(
    llama: Generator, node: TextNode, mode: MetadataMode
) -> None:
    assert as_sac(node, make_rag(llama)).get_content(mode) == node.get_content(mode)


@pytest.mark.parametrize("template", ["{metadata_str}\n\n{content}", "{content} ({metadata_str})"])
def test_the_llm_gets_the_metadata_as_it_is_and_a_marker(
    llama: Generator, node: TextNode, template: str
) -> None:
    node.text_template = template
    rag = make_rag(llama)
    sac = as_sac(node, rag)
    shown = sac.get_content(MetadataMode.LLM)
    assert shown == node.get_content(MetadataMode.LLM).replace(node.text, sac.marker)
    assert sac.get_metadata_str(MetadataMode.LLM) == node.get_metadata_str(MetadataMode.LLM)


def test_without_metadata_the_llm_gets_a_marker_alone(llama: Generator) -> None:
    rag = make_rag(llama)
    sac = as_sac(make_nodes(1)[0], rag)
    assert sac.get_content(MetadataMode.LLM) == sac.marker


def test_nothing_of_a_node_is_lost_and_the_one_given_stays(
    llama: Generator, node: TextNode
) -> None:
    before = node.to_dict()
    sac = as_sac(node, make_rag(llama))
    assert {**sac.to_dict(), "class_name": "TextNode"} == before == node.to_dict()
    assert (sac.hash, sac.ref_doc_id) == (node.hash, node.ref_doc_id)
    sac.metadata["file"] = "another"
    assert node.metadata == METADATA


def test_a_stored_node_shows_its_text_again(
    llama: Generator, tmp_path: Path, node: TextNode
) -> None:
    rag = make_rag(llama)
    sac = as_sac(node, rag)
    store = SimpleDocumentStore()
    store.add_documents([sac])
    store.persist(str(tmp_path / "docstore.json"))
    read = SimpleDocumentStore.from_persist_path(str(tmp_path / "docstore.json"))
    from_docstore = read.get_document(node.node_id)
    from_vectors = metadata_dict_to_node(node_to_metadata_dict(sac))
    assert sac.marker not in (tmp_path / "docstore.json").read_text()
    pickled = pickle.loads(pickle.dumps(sac))
    for back in (from_docstore, from_vectors, SACNode.from_dict(sac.to_dict()), pickled):
        assert isinstance(back, TextNode)
        assert back.get_content(MetadataMode.LLM) == node.get_content(MetadataMode.LLM)
        assert (back.node_id, back.hash, back.ref_doc_id) == (
            node.node_id,
            node.hash,
            node.ref_doc_id,
        )


def test_a_copied_node_keeps_its_marker(llama: Generator, node: TextNode) -> None:
    rag = make_rag(llama)
    sac = as_sac(node, rag)
    for copy in (sac.model_copy(), sac.model_copy(deep=True), deepcopy(sac)):
        assert copy.get_content(MetadataMode.LLM).endswith(f"\n\n{sac.marker}")


def test_a_node_does_not_keep_its_pipeline_alive(llama: Generator, node: TextNode) -> None:
    rag = make_rag(llama)
    sac = as_sac(node, rag)
    shown = sac.get_content(MetadataMode.LLM)
    gone = ref(rag)
    del rag
    gc.collect()
    assert gone() is None
    assert sac.get_content(MetadataMode.LLM) == node.get_content(MetadataMode.LLM) != shown


# --- the postprocessor


def test_number_order_ids_and_scores_are_kept(llama: Generator) -> None:
    given = scored(make_nodes(3))
    given[1].score = None
    processed = SACPostprocessor(make_rag(llama)).postprocess_nodes(given)
    assert [(n.node_id, n.score) for n in processed] == [(n.node_id, n.score) for n in given]
    assert all(isinstance(n.node, SACNode) for n in processed)
    assert not any(isinstance(n.node, SACNode) for n in given)


def test_marked_nodes_may_be_marked_again(llama: Generator) -> None:
    postprocessor = SACPostprocessor(make_rag(llama))
    once = postprocessor.postprocess_nodes(scored(make_nodes(2)))
    assert postprocessor.postprocess_nodes(once) == once


def test_whole_documents_are_compressed_too(llama: Generator) -> None:
    rag = make_rag(llama)
    document = Document(text=PROSE[0], id_="log", metadata=METADATA)
    sac = as_sac(document, rag)
    assert (sac.node_id, sac.text, sac.metadata) == ("log", PROSE[0], METADATA)
    assert sac.get_content(MetadataMode.LLM).endswith(sac.marker)
    assert PROSE[0] in rag.compressor


def test_nodes_that_are_more_than_a_text_go_on_as_they_are(llama: Generator) -> None:
    nodes: list[BaseNode] = [
        ImageNode(text="A tower.", image="cGljdHVyZQ=="),
        IndexNode(text="Of ships.", index_id="ships"),
    ]
    given = [NodeWithScore(node=node) for node in nodes]
    assert SACPostprocessor(make_rag(llama)).postprocess_nodes(given) == given


def test_a_node_without_text_is_left_out_of_the_prompt(llama: Generator) -> None:
    rag = make_rag(llama)
    nodes = make_nodes(2)
    nodes[0].text = " \n"
    marked = SACPostprocessor(rag).postprocess_nodes(scored(nodes))
    prompt = "\n\n".join(node.get_content("llm") for node in marked)
    chunks = SACLLM(rag).complete(prompt).additional_kwargs["sac"]["chunks"]
    assert [chunk["status"] for chunk in chunks] == ["empty", "absent"]


def statuses(rag: Any, nodes: list[TextNode]) -> list[tuple[str, str]]:
    """What became of each node's text when a question was answered from them."""
    marked = SACPostprocessor(rag).postprocess_nodes(scored(nodes), query_str=QUESTION)
    prompt = "\n\n".join(node.get_content("llm") for node in marked)
    chunks = SACLLM(rag).complete(f"{prompt}\n{QUESTION}").additional_kwargs["sac"]["chunks"]
    return [(chunk["status"], chunk["read_as"]) for chunk in chunks]


def test_what_is_missing_is_compressed_when_it_is_retrieved(llama: Generator) -> None:
    rag, nodes = make_rag(llama), make_nodes(3)
    rag.precompress([nodes[1].text])
    SACPostprocessor(rag).postprocess_nodes(scored(nodes[:1]))
    assert nodes[0].text in rag.compressor
    missed = [("hit", "anchors"), ("hit", "anchors"), ("absent", "anchors")]
    assert statuses(rag, nodes) == missed
    assert statuses(rag, nodes) == [("hit", "anchors")] * 3


def test_what_is_missing_is_read_or_refused_if_so_chosen(llama: Generator) -> None:
    reading = make_rag(llama, on_miss="text")
    assert statuses(reading, make_nodes(1)) == [("absent", "text")]
    refusing = make_rag(llama, on_miss="raise")
    with pytest.raises(ChunkMissError, match="2 of 2 chunks are not in the store"):
        query_engine(refusing, make_nodes(2)).query(QUESTION)


def test_a_document_can_be_forgotten(llama: Generator, disk: DiskStore) -> None:
    rag, nodes = make_rag(llama, store=disk), make_nodes(2)
    SACPostprocessor(rag).postprocess_nodes(scored(nodes))
    assert rag.forget("document 0") == 1
    assert statuses(rag, nodes) == [("forgotten", "anchors"), ("hit", "anchors")]


class FullStore(dict[str, AnchorKV]):
    def __setitem__(self, key: str, value: AnchorKV) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


class LostStore(FullStore):
    def __contains__(self, key: object) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    def __getitem__(self, key: str) -> AnchorKV:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("store", "reason"), [(FullStore(), "absent"), (LostStore(), "unreadable")]
)
def test_a_store_that_fails_costs_time_and_no_answer(
    llama: Generator, store: FullStore, reason: str
) -> None:
    assert statuses(make_rag(llama, store=store), make_nodes(1)) == [(reason, "anchors")]


@pytest.mark.parametrize("on_miss", ["compress", "text", "raise"])
async def test_a_text_beyond_the_context_is_left_to_llama_index_which_splits_it(
    make_generator: Callable[..., Generator], on_miss: Any, caplog: pytest.LogCaptureFixture
) -> None:
    generator = make_generator()
    generator.model.config.max_position_embeddings = 1024
    rag, nodes = make_rag(generator, on_miss=on_miss), make_nodes(2)
    rag.precompress([nodes[0].text])
    nodes[1].text = f"{nodes[1].text} " * 200
    engine = query_engine(rag, nodes)
    for response in (engine.query(QUESTION), await engine.aquery(QUESTION)):
        assert response.response != "Empty Response"
        reports = [source.node.sac for source in response.source_nodes]
        assert [report["read_as"] for report in reports] == ["anchors", "text"]
        assert reports[1] == {"node_id": "node 1", "status": "too long", "read_as": "text"}
    assert rag.metrics().questions > 4
    assert "1 retrieved texts do not fit into the model's context of 1024 tokens" in caplog.text


# --- stores of LlamaIndex


class Letters(BaseEmbedding):
    """Texts to how often they have each letter."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return [text.count(letter) + 0.01 for letter in "abcdefghijklmnopqrstuvwxyz"]

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


# LlamaIndex imports langchain-community where it is installed.
@pytest.mark.filterwarnings("ignore:.*langchain-community:DeprecationWarning")
def test_a_persisted_index_is_asked_and_its_answers_indexed_again(
    llama: Generator, tmp_path: Path
) -> None:
    rag = make_rag(llama)
    VectorStoreIndex(make_nodes(6), embed_model=Letters()).storage_context.persist(str(tmp_path))
    stored = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    context = StorageContext.from_defaults(persist_dir=str(tmp_path))
    index: Any = load_index_from_storage(context, embed_model=Letters())

    def ask(index: Any) -> Any:
        engine = index.as_query_engine(
            llm=SACLLM(rag), node_postprocessors=[SACPostprocessor(rag)], similarity_top_k=2
        )
        return engine.query(PROSE[4])

    first = ask(index)
    assert first.source_nodes[0].text == PROSE[4]
    assert first.source_nodes[0].score == pytest.approx(1.0)

    index.storage_context.persist(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == stored

    again = ask(VectorStoreIndex([s.node for s in first.source_nodes], embed_model=Letters()))
    assert again.response == first.response
    assert [s.node_id for s in again.source_nodes] == [s.node_id for s in first.source_nodes]
