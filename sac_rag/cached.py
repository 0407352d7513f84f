"""CachedCompressor, a compressor that asks a store first. Knows nothing of prompts or answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sac_rag.compressors.base import Compressor
from sac_rag.errors import ChunkMiss
from sac_rag.guard import Guard
from sac_rag.keys import Namespace
from sac_rag.kv import AnchorKV
from sac_rag.stores.abilities import DocumentStore, ExplainingStore, ForgettingStore

log = logging.getLogger(__name__)

OnMiss = Literal["compress", "text", "raise"]


def require_on_miss(on_miss: str) -> None:
    """Raises ValueError for what is no OnMiss."""
    if on_miss not in get_args(OnMiss):
        raise ValueError(f"on_miss must be one of {', '.join(get_args(OnMiss))}, was: {on_miss!r}")


@dataclass(frozen=True)
class Fetched:
    """What came of asking for chunks, one to one with them.

    Attributes:
        kvs: None where a missing chunk was left to be read as text.
        misses: Why a chunk was not read from the store (see `misses.REASONS`); None for a hit.
        load_s: Seconds spent reading the store.
        compress_s: Seconds spent computing and storing what was missing.
        loads: Entries read.
        load_bytes: Bytes of their keys and values.
        computed: Chunks computed.
        computed_tokens: Their source tokens.
        failed_writes: Those of them that could not be stored.
    """

    kvs: list[AnchorKV | None]
    misses: list[str | None]
    load_s: float
    compress_s: float
    loads: int
    load_bytes: int
    computed: int
    computed_tokens: int
    failed_writes: int


class CachedCompressor:
    """A compressor whose results are kept in a store, under the digest of what determines them.

    Attributes:
        compressor: Computes what the store does not have, its LoRA merged.
        store: Any mutable mapping of str to AnchorKV, a dict too.
        namespace: The secret of every key (see `keys.Namespace`): the same text under two
            namespaces is two entries.
        guard: Measures whether loading is worth it; None loads whatever is stored.
        fingerprint: The compressor's, taken once: do not train it while it is cached.
        store_failures: Writes that failed (a full disk, say); the answer went on without.
    """

    def __init__(
        self,
        compressor: Compressor,
        store: MutableMapping[str, AnchorKV],
        *,
        namespace: str = "",
        guard: bool = True,
    ) -> None:
        self.compressor = compressor.merged()
        self.store = store
        self.namespace = namespace
        self.guard = Guard() if guard else None
        self.fingerprint = compressor.fingerprint
        self.store_failures = 0
        self._names = Namespace(namespace)
        self._noted = False
        self._counting = threading.Lock()

    def key(self, text: str) -> str:
        """The key of a chunk: a digest of fingerprint and text, keyed by the namespace."""
        return self._names.key(self.fingerprint, text)

    def text_id(self, text: str) -> str:
        """A digest of the text alone, keyed by the namespace: the same for every compressor."""
        return self._names.text_id(text)

    def document_id(self, document: str) -> str:
        """A document's id in the store: in a namespace, one that no other namespace uses."""
        return self._names.document_id(document)

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
                text, or raise. Only where the missing are computed does the guard have a say.
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
        owned = list(zip(keys, documents or [None] * len(keys), strict=True))
        found: dict[str, AnchorKV] = {}
        reasons: dict[str, str] = {}
        for key, text in dict(zip(keys, texts, strict=True)).items():
            loaded = self._load(key, text, may_compute=on_miss == "compress")
            if isinstance(loaded, AnchorKV):
                found[key] = loaded
            else:
                reasons[key] = loaded
        load_s = time.perf_counter() - started
        loads, load_bytes = len(found), sum(kv.nbytes for kv in found.values())
        misses = [reasons.get(key) for key in keys]
        if reasons and on_miss == "raise":
            raise ChunkMiss(misses)
        started = time.perf_counter()
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key in reasons}
        computed: dict[str, AnchorKV] = {}
        failed = 0
        if on_miss == "compress" and missing:
            if accept is not None:
                lengths = {key: kv.num_tokens for key, kv in found.items()}
                lengths |= {k: len(self.compressor.tokenize(t)) for k, t in missing.items()}
                accept([lengths[key] for key in keys])
            computed = self._compute(missing)
            found |= computed
            for key, document in dict.fromkeys(owned):
                if key in computed and reasons[key] != "slow":
                    failed += not self._put(key, missing[key], computed[key], document)
        return Fetched(
            kvs=[found.get(key) for key in keys],
            misses=misses,
            load_s=load_s,
            compress_s=time.perf_counter() - started,
            loads=loads,
            load_bytes=load_bytes,
            computed=len(computed),
            computed_tokens=sum(kv.num_tokens for kv in computed.values()),
            failed_writes=failed,
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
            if self.document_id(document) not in self.store.documents(key):
                self._put(key, text, self.store[key], document)
        except KeyError:
            return False
        return True

    def forget(self, document: str) -> int:
        """Deletes what only this document uses of what is stored; shared texts stay.

        Returns:
            How many entries were deleted.

        Raises:
            TypeError: if the store does not remember documents.
            OSError: if the store cannot be changed.
        """
        if not isinstance(self.store, ForgettingStore):
            raise TypeError(
                "to forget a document, the store must remember documents, as a DiskStore does, "
                f"was: {type(self.store).__name__}"
            )
        return self.store.forget(self.document_id(document))

    def _load(self, key: str, text: str, may_compute: bool) -> AnchorKV | str:
        """A stored chunk, or why it was not read."""
        guard = self.guard if may_compute else None
        try:
            if guard is not None and guard.prefers_computing(len(text)) and key in self.store:
                return "slow"
            started = time.perf_counter()
            kv = self.store[key]
            if guard is not None:
                guard.loaded(len(text), kv.num_tokens, kv.nbytes, time.perf_counter() - started)
            return kv
        except KeyError as miss:
            # Stores name the reason (CorruptEntry); a plain KeyError means that it is not there.
            reason: str | None = getattr(miss, "reason", None)
            return reason or self._why_absent(key, text)
        except OSError as error:
            log.warning("chunk %s could not be read: %s", key[:12], error)
            return "unreadable"

    def _why_absent(self, key: str, text: str) -> str:
        if not isinstance(self.store, ExplainingStore):
            return "absent"
        text_id = self.text_id(text)
        self._note(self.store)
        try:
            return self.store.why_absent(key, text_id=text_id, fingerprint=self.fingerprint)
        except OSError as error:
            log.warning("why chunk %s is not there could not be read: %s", key[:12], error)
            return "absent"

    def _note(self, store: ExplainingStore) -> None:
        """Tells the store, once, what the fingerprint is made of; a reason is vaguer without."""
        if self._noted:
            return
        try:
            store.note(self.fingerprint, self.compressor.fingerprint_fields())
            self._noted = True
        except OSError as error:
            log.warning("what made the chunks was not stored: %s", error)

    def _compute(self, missing: Mapping[str, str]) -> dict[str, AnchorKV]:
        started = time.perf_counter()
        kvs = self.compressor.compress(list(missing.values()))
        if self.guard is not None:
            tokens = sum(kv.num_tokens for kv in kvs)
            self.guard.computed(tokens, time.perf_counter() - started)
        return dict(zip(missing, kvs, strict=True))

    def keep(self, text: str, kv: AnchorKV, documents: Collection[str] = ()) -> None:
        """Stores a chunk that its compressor has computed.

        Raises:
            OSError: if the store is only read, or could not write it.
        """
        if getattr(self.store, "read_only", False):
            raise OSError("the store was opened to be read only; open it to be written")
        self._write(self.key(text), text, kv, tuple(map(self.document_id, documents)))

    def _put(self, key: str, text: str, kv: AnchorKV, document: str | None) -> bool:
        """Stores a chunk that an answer needed; False if that failed."""
        if getattr(self.store, "read_only", False):
            return True
        try:
            self._write(key, text, kv, () if document is None else (self.document_id(document),))
        except OSError as error:
            # The chunk is computed and the question can be answered; only the next one is slower.
            with self._counting:
                self.store_failures += 1
            log.warning("chunk %s was not stored: %s", key[:12], error)
            return False
        return True

    def _write(self, key: str, text: str, kv: AnchorKV, documents: tuple[str, ...]) -> None:
        if isinstance(self.store, ExplainingStore):
            self._note(self.store)
            self.store.put(
                key, kv, documents, text_id=self.text_id(text), fingerprint=self.fingerprint
            )
        elif documents and isinstance(self.store, DocumentStore):
            self.store.put(key, kv, documents)
        else:
            self.store[key] = kv
