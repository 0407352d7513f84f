"""A server over a tiny model and a small index, as most tests here need it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.models import PROSE, make_compressor
from support.serving import Running, WordEmbedder, running

from sac_rag import Chunk, Decoding, SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.lm.generator import Generator
from sac_rag.retrieval.index import ChunkIndex
from sac_rag.server.service import Service


@pytest.fixture
def rag(llama: Generator, home: Any) -> SacRAG:
    cached = CachedCompressor(make_compressor(llama, "sac"), {})
    return SacRAG(cached, decoding=Decoding(max_new_tokens=8))


@pytest.fixture
def index() -> ChunkIndex:
    chunks = [Chunk(text, id=f"d{number // 2}", title="T") for number, text in enumerate(PROSE)]
    return ChunkIndex.build(chunks, WordEmbedder())


@pytest.fixture
def service(rag: SacRAG, index: ChunkIndex) -> Service:
    return Service(rag, "tiny", index=index)


@pytest.fixture
def served(service: Service) -> Iterator[Running]:
    with running(service) as server:
        yield server
