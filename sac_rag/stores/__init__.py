"""Stores of AnchorKVs, interchangeable.

A store is any mutable mapping of keys (lower-case hex digests) to AnchorKVs: a `dict` for a test,
`MemoryStore` for one process, `DiskStore` for a folder that outlives it, `RedisStore` for several
machines. A store that can do more, such as remember documents, is a `DocumentStore`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from sac_rag.kv import AnchorKV
    from sac_rag.stores.base import DocumentStore
    from sac_rag.stores.disk import DiskStore
    from sac_rag.stores.memory import MemoryStore
    from sac_rag.stores.objects import ObjectStore
    from sac_rag.stores.redis import RedisStore
    from sac_rag.stores.tiered import TieredStore

AnchorStore: TypeAlias = MutableMapping[str, "AnchorKV"]

__all__ = [
    "AnchorStore",
    "DiskStore",
    "DocumentStore",
    "MemoryStore",
    "ObjectStore",
    "RedisStore",
    "TieredStore",
]

_MODULES = {
    "DiskStore": "sac_rag.stores.disk",
    "DocumentStore": "sac_rag.stores.base",
    "MemoryStore": "sac_rag.stores.memory",
    "ObjectStore": "sac_rag.stores.objects",
    "RedisStore": "sac_rag.stores.redis",
    "TieredStore": "sac_rag.stores.tiered",
}


def __getattr__(name: str) -> Any:
    # On first use: importing the package must load neither torch nor diskcache.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
