"""Retrieved chunks, compressed once into the KV of a few anchor tokens and cached.

The names below are the public face; each is loaded when it is first used, so that importing the
package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sac_rag.cached import CachedCompressor
    from sac_rag.chunk import Chunk
    from sac_rag.compressors.config import CompressorConfig
    from sac_rag.errors import (
        ChunkMissError,
        CorruptEntryError,
        ModelUnavailableError,
        PromptTooLongError,
        UnsupportedModelError,
    )
    from sac_rag.kv import AnchorKV
    from sac_rag.lm.generator import Generator
    from sac_rag.pipeline import SacRAG
    from sac_rag.prompts.chat import Message
    from sac_rag.prompts.format import PromptFormat
    from sac_rag.prompts.generate import Decoding
    from sac_rag.reports import Answer
    from sac_rag.retrieval.embedder import Embedder
    from sac_rag.retrieval.index import ChunkIndex
    from sac_rag.stores.disk import DiskStore
    from sac_rag.stores.memory import MemoryStore
    from sac_rag.training.fit import fit

__version__ = "0.1.0"

_HOME = {
    "AnchorKV": "kv",
    "Answer": "reports",
    "CachedCompressor": "cached",
    "Chunk": "chunk",
    "ChunkIndex": "retrieval.index",
    "ChunkMissError": "errors",
    "CompressorConfig": "compressors.config",
    "CorruptEntryError": "errors",
    "Decoding": "prompts.generate",
    "DiskStore": "stores.disk",
    "Embedder": "retrieval.embedder",
    "Generator": "lm.generator",
    "MemoryStore": "stores.memory",
    "Message": "prompts.chat",
    "ModelUnavailableError": "errors",
    "PromptFormat": "prompts.format",
    "PromptTooLongError": "errors",
    "SacRAG": "pipeline",
    "UnsupportedModelError": "errors",
    "fit": "training.fit",
}

__all__ = [
    "AnchorKV",
    "Answer",
    "CachedCompressor",
    "Chunk",
    "ChunkIndex",
    "ChunkMissError",
    "CompressorConfig",
    "CorruptEntryError",
    "Decoding",
    "DiskStore",
    "Embedder",
    "Generator",
    "MemoryStore",
    "Message",
    "ModelUnavailableError",
    "PromptFormat",
    "PromptTooLongError",
    "SacRAG",
    "UnsupportedModelError",
    "fit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sac_rag' has no attribute {name!r}")
    return getattr(import_module(f"sac_rag.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
