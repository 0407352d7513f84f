"""MemoryStore: AnchorKVs in this process's memory, up to a cap."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sac_rag import forks
from sac_rag.kv import AnchorKV
from sac_rag.stores.base import NO_DEFAULT, DocumentStore

logger = logging.getLogger(__name__)


# Bytes of an entry read from disk beside its tensors: two headers and their padding.
_SLACK_BYTES = 16 * 1024


class MemoryStore(DocumentStore):
    """The most recently used AnchorKVs, as many as fit.

    Reading an entry makes it the most recent; `in` and iteration do not. Safe to share between
    threads.

    Args:
        max_bytes: Most bytes of tensors to hold. An entry larger than this is not kept.

    Attributes:
        evictions: Entries evicted, or not kept because they are larger than the cap.

    Raises:
        ValueError: if max_bytes is less than 1.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, was: {max_bytes}")
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, AnchorKV] = OrderedDict()
        self._nbytes = 0
        self.evictions = 0
        self._lock = forks.lock(self, "_lock")

    @property
    def nbytes(self) -> int:
        """Bytes of tensors held."""
        return self._nbytes

    def __getitem__(self, key: str) -> AnchorKV:
        with self._lock:
            kv = self._entries[key]
            self._entries.move_to_end(key)
            return kv

    def extent(self, key: str) -> tuple[int, int]:
        """Source tokens and KV entries of a chunk; does not make it the most recent."""
        with self._lock:
            kv = self._entries[key]
        return kv.num_tokens, kv.num_entries

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        if not isinstance(kv, AnchorKV):
            raise TypeError(f"a store holds AnchorKVs, got: {type(kv).__name__}")
        kv = _own_copy(kv)
        with self._lock, self._counted():
            self._drop(key)
            if kv.nbytes > self.max_bytes:
                self.evictions += 1
                logger.warning(
                    "%s not kept: %d bytes, the store's cap is %d", key, kv.nbytes, self.max_bytes
                )
                return
            self._entries[key] = kv
            self._nbytes += kv.nbytes
            while self._nbytes > self.max_bytes:
                oldest = next(iter(self._entries))
                self._drop(oldest)
                self.evictions += 1
                logger.debug("%s evicted", oldest)

    def __delitem__(self, key: str) -> None:
        with self._lock, self._counted():
            if key not in self._entries:
                raise KeyError(key)
            self._drop(key)

    def pop(self, key: str, default: Any = NO_DEFAULT) -> Any:
        """Removes an entry and returns it, or the default; one step to other threads."""
        with self._lock, self._counted():
            kv = self._entries.get(key)
            if kv is not None:
                self._drop(key)
                return kv
        if default is NO_DEFAULT:
            raise KeyError(key)
        return default

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._entries

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Drops every entry; none of them counts as evicted."""
        with self._lock, self._counted():
            self._entries.clear()
            self._nbytes = 0

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts again where the block is interrupted between an entry and its count."""
        try:
            yield
        except BaseException:
            self._nbytes = sum(kv.nbytes for kv in self._entries.values())
            raise

    def _drop(self, key: str) -> None:
        kv = self._entries.pop(key, None)
        if kv is not None:
            self._nbytes -= kv.nbytes


def _own_copy(kv: AnchorKV) -> AnchorKV:
    """The same value, copied if its tensors are views that keep a larger buffer alive.

    A chunk sliced out of a batch would otherwise hold the memory of the whole batch, which the cap
    would not count.
    """
    storages = [tensor.untyped_storage() for tensor in kv.tensors().values()]
    nbytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if nbytes <= kv.nbytes + _SLACK_BYTES:
        return kv
    return kv.map(lambda tensor: tensor.detach().clone())
