"""Ingestion fills the store and leaves the nodes as they are; its cache skips both."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document, ImageNode
from llama_index_sac import SACPostprocessor, SACPrecompress
from support.models import PROSE, make_model, make_tokenizer
from tiny_index import compressor_of, home_of_module, make_nodes, make_rag, no_loop_is_left, scored  # noqa: F401

from sac_rag import CachedCompressor, DiskStore, PromptTooLongError, SacRAG
from sac_rag.compressors import checkpoint
from sac_rag.lm.generator import Generator

DOCUMENTS = [Document(text=" ".join(PROSE[i : i + 3]), id_=f"document {i}") for i in range(2)]
SPLITTER = SentenceSplitter(chunk_size=24, chunk_overlap=0)


def test_nodes_are_compressed_and_stay_as_they_are(llama: Generator, disk: DiskStore) -> None:
    rag = make_rag(llama, store=disk)
    expected = IngestionPipeline(transformations=[SPLITTER]).run(documents=DOCUMENTS)
    pipeline = IngestionPipeline(transformations=[SPLITTER, SACPrecompress(rag)])
    nodes = pipeline.run(documents=DOCUMENTS)
    assert [(n.get_content(), n.hash) for n in nodes] == [
        (n.get_content(), n.hash) for n in expected
    ]
    assert all(node.get_content() in rag.compressor for node in nodes)
    assert rag.forget("document 0") > 0


def test_what_is_ingested_is_a_hit_when_it_is_retrieved(llama: Generator) -> None:
    rag, nodes = make_rag(llama), make_nodes(2)
    assert SACPrecompress(rag)(nodes) == nodes
    rag.on_miss = "raise"
    assert len(SACPostprocessor(rag).postprocess_nodes(scored(nodes))) == 2


def test_nodes_that_are_more_than_a_text_are_left_alone(llama: Generator) -> None:
    rag = make_rag(llama)
    SACPrecompress(rag)([ImageNode(text="A tower.", image="cGljdHVyZQ==")])
    assert "A tower." not in rag.compressor


def test_a_pipeline_that_has_seen_the_nodes_skips_precompression(llama: Generator) -> None:
    store: dict[str, Any] = {}
    rag = make_rag(llama, store=store)
    pipeline = IngestionPipeline(transformations=[SPLITTER, SACPrecompress(rag)])
    first = pipeline.run(documents=DOCUMENTS)
    store.clear()
    again = pipeline.run(documents=DOCUMENTS)
    assert [node.hash for node in again] == [node.hash for node in first]
    assert store == {}
    SACPostprocessor(rag).postprocess_nodes(scored(list(again)))  # type: ignore[arg-type]
    assert len(store) == len({node.get_content() for node in again})


def test_another_compressor_is_another_transformation(llama: Generator) -> None:
    rag, nodes = make_rag(llama), make_nodes(1)
    other = SacRAG(CachedCompressor(compressor_of(llama, "sac").at_ratio(7), {}))
    nested = compressor_of(llama, "shared")
    named = [{}, {"ratio": 3}, {"model": "other"}, {"namespace": "n"}, {"compressor": "full"}]
    transforms = [
        SACPrecompress(rag),
        SACPrecompress(other),
        *(SACPrecompress(SacRAG(CachedCompressor(nested.at_ratio(r), {}))) for r in (3, 7)),
        *(SACPrecompress(store="anchors/", **settings) for settings in named),
    ]
    hashes = [get_transformation_hash(nodes, transform) for transform in transforms]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == get_transformation_hash(nodes, SACPrecompress(rag))


async def test_the_event_loop_goes_on_while_nodes_are_compressed(llama: Generator) -> None:
    rag, nodes = make_rag(llama), make_nodes(2)
    with llama.running():
        compressing = asyncio.create_task(SACPrecompress(rag).acall(nodes))
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not compressing.done()
    assert await compressing == nodes
    assert all(node.text in rag.compressor for node in nodes)


def test_either_a_pipeline_or_a_store_must_be_given(llama: Generator) -> None:
    for rag, settings in ((None, {}), (make_rag(llama), {"store": "anchors/"})):
        with pytest.raises(TypeError, match="needs either a SacRAG or the folder of a store"):
            SACPrecompress(rag, **settings)


def test_names_go_to_another_process_and_a_loaded_model_does_not(llama: Generator) -> None:
    named = SACPrecompress(store="anchors/", ratio=3, namespace="hers")
    assert pickle.loads(pickle.dumps(named)) == named
    assert "hers" not in repr(named)
    with pytest.raises(TypeError, match=r"cannot be pickled for another process; give a model"):
        pickle.dumps(SACPrecompress(make_rag(llama)))


def test_a_text_beyond_the_context_is_skipped_and_logged(
    make_generator: Callable[..., Generator], caplog: pytest.LogCaptureFixture
) -> None:
    generator = make_generator()
    generator.model.config.max_position_embeddings = 256
    rag, nodes = make_rag(generator), make_nodes(3)
    nodes[1].text *= 40
    assert SACPrecompress(rag)(nodes) == nodes
    assert [node.text in rag.compressor for node in nodes] == [True, False, True]
    assert "not compressed: document 1" in caplog.text
    assert nodes[1].text[:40] not in caplog.text
    with pytest.raises(PromptTooLongError):
        SACPrecompress(rag, skip_bad=False)(nodes)


@pytest.mark.slow
def test_two_processes_fill_one_store(llama: Generator, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    checkpoint.save(compressor_of(llama, "sac"), tmp_path / "compressor")
    names = {"model": str(tmp_path / "model"), "compressor": str(tmp_path / "compressor")}
    anchors, nodes = tmp_path / "anchors", make_nodes(4)
    pipeline = IngestionPipeline(transformations=[SACPrecompress(store=str(anchors), **names)])
    done = pipeline.run(nodes=nodes, num_workers=2)
    assert sorted(node.hash for node in done) == sorted(node.hash for node in nodes)
    with DiskStore(anchors) as store:
        rag = SacRAG.from_pretrained(**names, store=store)
        assert all(node.text in rag.compressor for node in nodes)
        assert store.check() == []
