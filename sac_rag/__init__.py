"""Retrieved chunks, compressed once into the KV of a few anchor tokens and cached.

The names below are the public face; each is loaded when it is first used, so that importing the
package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sac_rag.answering import AnswerStream
    from sac_rag.archive import Archive
    from sac_rag.cached import CachedCompressor
    from sac_rag.chunk import Chunk
    from sac_rag.compressors.anchor_selection import top_anchors
    from sac_rag.compressors.base import Compressor
    from sac_rag.compressors.config import CompressorConfig
    from sac_rag.compressors.full import Full
    from sac_rag.compressors.layout import Layout, causal
    from sac_rag.compressors.sac import SAC
    from sac_rag.demo import wikipedia_leads
    from sac_rag.errors import (
        ChunkMissError,
        CorruptEntryError,
        ModelUnavailableError,
        PromptTooLongError,
        UnsupportedModelError,
    )
    from sac_rag.evaluation.quality import evaluate
    from sac_rag.evaluation.questions import Question, read_questions
    from sac_rag.evaluation.sample import Sample, Trial
    from sac_rag.kv import AnchorKV
    from sac_rag.lm.generator import Generator
    from sac_rag.origin import Origin
    from sac_rag.pipeline import SacRAG
    from sac_rag.precompress.job import PrecompressJob
    from sac_rag.prompts.assemble import assemble
    from sac_rag.prompts.chat import Message
    from sac_rag.prompts.format import SPANS, PromptFormat
    from sac_rag.prompts.generate import Decoding
    from sac_rag.ranks import by_rank
    from sac_rag.reports import Answer
    from sac_rag.retrieval.embedder import Embedder
    from sac_rag.retrieval.index import ChunkIndex
    from sac_rag.retrieval.readers import read_documents
    from sac_rag.retrieval.splitter import split
    from sac_rag.stores.disk import DiskStore, StoreStats
    from sac_rag.stores.memory import MemoryStore
    from sac_rag.stores.objects import ObjectStore
    from sac_rag.stores.redis import RedisStore
    from sac_rag.stores.tiered import TieredStore
    from sac_rag.training.fit import fit

__version__ = "0.1.0"

_HOME = {
    "AnchorKV": "kv",
    "Answer": "reports",
    "AnswerStream": "answering",
    "Archive": "archive",
    "CachedCompressor": "cached",
    "Chunk": "chunk",
    "ChunkIndex": "retrieval.index",
    "ChunkMissError": "errors",
    "Compressor": "compressors.base",
    "CompressorConfig": "compressors.config",
    "CorruptEntryError": "errors",
    "Decoding": "prompts.generate",
    "DiskStore": "stores.disk",
    "Embedder": "retrieval.embedder",
    "Full": "compressors.full",
    "Generator": "lm.generator",
    "Layout": "compressors.layout",
    "MemoryStore": "stores.memory",
    "Message": "prompts.chat",
    "ModelUnavailableError": "errors",
    "ObjectStore": "stores.objects",
    "Origin": "origin",
    "PrecompressJob": "precompress.job",
    "PromptFormat": "prompts.format",
    "PromptTooLongError": "errors",
    "Question": "evaluation.questions",
    "RedisStore": "stores.redis",
    "SAC": "compressors.sac",
    "SPANS": "prompts.format",
    "SacRAG": "pipeline",
    "Sample": "evaluation.sample",
    "StoreStats": "stores.disk",
    "TieredStore": "stores.tiered",
    "Trial": "evaluation.sample",
    "UnsupportedModelError": "errors",
    "assemble": "prompts.assemble",
    "by_rank": "ranks",
    "causal": "compressors.layout",
    "evaluate": "evaluation.quality",
    "fit": "training.fit",
    "read_documents": "retrieval.readers",
    "read_questions": "evaluation.questions",
    "split": "retrieval.splitter",
    "top_anchors": "compressors.anchor_selection",
    "wikipedia_leads": "demo",
}

__all__ = [
    "AnchorKV",
    "Answer",
    "AnswerStream",
    "Archive",
    "CachedCompressor",
    "Chunk",
    "ChunkIndex",
    "ChunkMissError",
    "Compressor",
    "CompressorConfig",
    "CorruptEntryError",
    "Decoding",
    "DiskStore",
    "Embedder",
    "Full",
    "Generator",
    "Layout",
    "MemoryStore",
    "Message",
    "ModelUnavailableError",
    "ObjectStore",
    "Origin",
    "PrecompressJob",
    "PromptFormat",
    "PromptTooLongError",
    "Question",
    "RedisStore",
    "SAC",
    "SPANS",
    "SacRAG",
    "Sample",
    "StoreStats",
    "TieredStore",
    "Trial",
    "UnsupportedModelError",
    "assemble",
    "by_rank",
    "causal",
    "evaluate",
    "fit",
    "read_documents",
    "read_questions",
    "split",
    "top_anchors",
    "wikipedia_leads",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sac_rag' has no attribute {name!r}")
    return getattr(import_module(f"sac_rag.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
