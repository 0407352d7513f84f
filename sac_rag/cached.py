"""CachedCompressor, a compressor that asks a store first. Knows nothing of prompts or answers."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

from sac_rag.compressors.base import Compressor
from sac_rag.errors import ChunkMiss
from sac_rag.kv import AnchorKV

log = logging.getLogger(__name__)

OnMiss = Literal["compress", "text", "raise"]


def require_on_miss(on_miss: str) -> None:
    """Raises ValueError for what is no OnMiss."""
    if on_miss not in get_args(OnMiss):
        raise ValueError(f"on_miss must be one of {', '.join(get_args(OnMiss))}, was: {on_miss!r}")


@runtime_checkable
class DocumentStore(Protocol):
    """A store that also remembers which documents an entry belongs to."""

    def put(self, key: str, kv: AnchorKV, documents: Iterable[str] = ()) -> None:
        """Stores an entry, or adds documents to the one that is there."""

    def documents(self, key: str) -> tuple[str, ...]:
        """The documents of an entry, without reading it."""


@dataclass(frozen=True)
class Fetched:
    """What came of asking for chunks, one to one with them.

    Attributes:
        kvs: None where a missing chunk was left to be read as text.
        misses: Why a chunk was not in the store; None for a hit.
        load_s: Seconds spent reading the store.
        compress_s: Seconds spent computing what was missing.
    """

    kvs: list[AnchorKV | None]
    misses: list[str | None]
    load_s: float
    compress_s: float


class CachedCompressor:
    """A compressor whose results are kept in a store, under the digest of what determines them.

    Attributes:
        compressor: Computes what the store does not have.
        store: Any mutable mapping of str to AnchorKV, a dict too.
        namespace: Part of every key: the same text under two namespaces is two entries.
        fingerprint: The compressor's, taken once: do not train it while it is cached.
        store_failures: Writes that failed (a full disk, say); the answer went on without.
    """

    def __init__(
        self,
        compressor: Compressor,
        store: MutableMapping[str, AnchorKV],
        *,
        namespace: str = "",
    ) -> None:
        self.compressor = compressor
        self.store = store
        self.namespace = namespace
        self.fingerprint = compressor.fingerprint
        self.store_failures = 0

    def key(self, text: str) -> str:
        """The key of a chunk: a digest of fingerprint, namespace and text."""
        digest = hashlib.blake2b(digest_size=32)
        for part in (self.fingerprint, self.namespace, text):
            # surrogatepass: half a surrogate pair is no valid text, but no reason to crash either.
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return digest.hexdigest()

    def __contains__(self, text: str) -> bool:
        return self.key(text) in self.store

    def compress(self, texts: Sequence[str]) -> list[AnchorKV]:
        """The compressor's own `compress`, computing only what the store does not have."""
        fetched = self.fetch(texts)
        return [kv for kv in fetched.kvs if kv is not None]

    def fetch(
        self,
        texts: Sequence[str],
        *,
        on_miss: OnMiss = "compress",
        documents: Sequence[str | None] | None = None,
        accept: Callable[[list[int]], None] | None = None,
    ) -> Fetched:
        """Reads chunks from the store and deals with those that are not there.

        Args:
            texts: Chunks; equal ones are read or computed once.
            on_miss: Compute the missing and store them, leave them out as None to be read as
                text, or raise.
            documents: The document each text belongs to, noted in a DocumentStore when the entry
                is made; `claim` notes one for an entry that is already there.
            accept: Called with the source tokens of each text before anything is computed; may
                raise to refuse texts that together do not fit.

        Raises:
            ChunkMiss: with on_miss="raise".
            PromptTooLong: for a text longer than the model's context.
            ValueError: for an empty text or an unknown on_miss.
        """
        require_on_miss(on_miss)
        started = time.perf_counter()
        keys = [self.key(text) for text in texts]
        found: dict[str, AnchorKV] = {}
        reasons: dict[str, str] = {}
        for key in dict.fromkeys(keys):
            try:
                found[key] = self.store[key]
            except KeyError as miss:
                # Stores name the reason (CorruptEntry); a plain KeyError means never put there.
                reasons[key] = getattr(miss, "reason", "absent")
            except OSError as error:
                log.warning("chunk %s could not be read: %s", key[:12], error)
                reasons[key] = "unreadable"
        load_s = time.perf_counter() - started
        misses = [reasons.get(key) for key in keys]
        if reasons and on_miss == "raise":
            raise ChunkMiss(misses)
        started = time.perf_counter()
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key in reasons}
        if on_miss == "compress":
            if missing and accept is not None:
                lengths = {key: kv.num_tokens for key, kv in found.items()}
                lengths |= {k: len(self.compressor.tokenize(t)) for k, t in missing.items()}
                accept([lengths[key] for key in keys])
            computed = self.compressor.compress(list(missing.values())) if missing else []
            found |= zip(missing, computed, strict=True)
            owners = documents or [None] * len(keys)
            for key, document in dict.fromkeys(zip(keys, owners, strict=True)):
                if key in missing:
                    self._put(key, found[key], document)
        return Fetched(
            kvs=[found.get(key) for key in keys],
            misses=misses,
            load_s=load_s,
            compress_s=time.perf_counter() - started,
        )

    def claim(self, text: str, document: str) -> bool:
        """Notes in a DocumentStore that a text that is there already is this document's too.

        Returns:
            False if it is not there after all: evicted by now, or damaged.
        """
        if not isinstance(self.store, DocumentStore):
            return True
        key = self.key(text)
        try:
            if document not in self.store.documents(key):
                self._put(key, self.store[key], document)
        except KeyError:
            return False
        return True

    def _put(self, key: str, kv: AnchorKV, document: str | None) -> None:
        try:
            if document is not None and isinstance(self.store, DocumentStore):
                self.store.put(key, kv, documents=(document,))
            else:
                self.store[key] = kv
        except OSError as error:
            # The chunk is computed and the question can be answered; only the next one is slower.
            self.store_failures += 1
            log.warning("chunk %s was not stored: %s", key[:12], error)
