"""What tests of the LangChain components share: a pipeline of a tiny model, documents, a search."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from support.models import PROSE, make_compressor, make_tokenizer
from transformers import BertConfig, BertModel

from sac_rag import Embedder, SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator
from sac_rag.prompts.generate import Decoding

QUESTION = "Who counted the ships?"
SHORT = Decoding(max_new_tokens=8)
DOCUMENTS = [
    Document(text, id=f"id-{i}", metadata={"source": f"page-{i}", "title": f"Title {i}"})
    for i, text in enumerate(PROSE)
]


def make_rag(
    generator: Generator,
    method: str = "sac",
    *,
    store: Any = None,
    namespace: str = "",
    **options: Any,
) -> SacRAG:
    """A pipeline with short answers over a store of its own."""
    kept = {} if store is None else store
    cached = CachedCompressor(_compressor(generator, method), kept, namespace=namespace)
    return SacRAG(cached, **{"decoding": SHORT, **options})


@cache
def _compressor(generator: Generator, method: str) -> Compressor:
    return make_compressor(generator, method)


@pytest.fixture(scope="module", autouse=True)
def home_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the module's own: a model is proved once, and by no other run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAC_RAG_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def make_embedder() -> Embedder:
    """An embedder of a tiny encoder with random weights."""
    config = BertConfig(
        vocab_size=512,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    return Embedder(BertModel(config), make_tokenizer())


class Words(Embeddings):
    """Texts with words in common are alike."""

    def embed_query(self, text: str) -> list[float]:
        vector = [0.0] * 32
        for word in text.lower().split():
            vector[hashlib.sha256(word.encode()).digest()[0] % 32] += 1.0
        return vector

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]
