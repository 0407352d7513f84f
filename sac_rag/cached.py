"""CachedCompressor, a compressor that asks a store first. Knows nothing of prompts or answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sac_rag.chunk import require_ratio
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.full import Full
from sac_rag.errors import ChunkMissError
from sac_rag.guard import Guard
from sac_rag.kv import AnchorKV
from sac_rag.namespace import Namespace
from sac_rag.stores.base import (
    DocumentStore,
    ExplainingStore,
    ForgettingStore,
    PartialStore,
)

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
        kvs: At the ratios asked for; None where a missing chunk was left to be read as text.
        misses: Why a chunk was not read from the store (see `misses.REASONS`); None for a hit.
        load_s: Seconds spent reading the store.
        compress_s: Seconds spent computing and storing what was missing.
        loads: Entries read that were hits.
        load_bytes: Bytes of what was read of them.
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

    def ratio_for(self, asked: int | None) -> int:
        """The ratio to use chunks at: the one asked for, or else the compressor's own.

        Raises:
            ValueError: for what is no integer of at least 1, or not the compressor's own where one
                compression does not serve several ratios.
        """
        require_ratio(asked)
        own = self.compressor.config.ratio
        if asked is None or asked == own:
            return own
        if self.compressor.is_nested:
            return asked
        if self.compressor.config.method == Full.method:
            raise ValueError(
                f"'full' keeps every token: ratio must be 1, was: {asked}; "
                "load a trained compressor"
            )
        raise ValueError(
            f"ratio must be {own}, the only one of this compressor, was: {asked}; it keeps other "
            "entries at each ratio (only anchors='learned' ranks them), so load another one: "
            f"SacRAG.from_pretrained(ratio={asked}), or compressor.at_ratio({asked})"
        )

    def kept_ratio(self, asked: int | None) -> int:
        """The ratio to store a chunk at: the one asked for, or the compressor's own if lower."""
        return min(self.ratio_for(asked), self.compressor.config.ratio)

    def at_ratio(self, ratio: int) -> Compressor:
        """The compressor at a ratio that `ratio_for` gave."""
        compressor = self.compressor
        return compressor if ratio == compressor.config.ratio else compressor.at_ratio(ratio)

    def cut(self, kv: AnchorKV, ratio: int) -> AnchorKV:
        """What a compressed chunk is at a ratio, which must not be lower than its own."""
        if not self.compressor.is_nested:
            return kv
        return kv.first(self.compressor.num_entries(kv.num_tokens, ratio))

    def __contains__(self, text: str) -> bool:
        return self.is_stored(text)

    def is_stored(self, text: str, ratio: int | None = None) -> bool:
        """Whether the store has as much of a text as a ratio needs. Default: the compressor's."""
        key, ratio = self.key(text), self.ratio_for(ratio)
        if not self.compressor.is_nested:
            return key in self.store
        try:
            if isinstance(self.store, PartialStore):
                num_tokens, num_entries = self.store.extent(key)
            else:
                kv = self.store[key]
                num_tokens, num_entries = kv.num_tokens, kv.num_entries
        except KeyError:
            return False
        return num_entries >= self.compressor.num_entries(num_tokens, ratio)

    def compress(self, texts: Sequence[str]) -> list[AnchorKV]:
        """The compressor's own `compress`, computing only what the store does not have."""
        fetched = self.fetch(texts)
        return [kv for kv in fetched.kvs if kv is not None]

    def fetch(
        self,
        texts: Sequence[str],
        *,
        ratios: Sequence[int | None] | None = None,
        on_miss: OnMiss = "compress",
        documents: Sequence[str | None] | None = None,
        accept: Callable[[list[int]], None] | None = None,
    ) -> Fetched:
        """Reads chunks from the store and deals with those that are not there.

        Args:
            texts: Chunks; equal ones are read or computed once.
            ratios: Source tokens per KV entry of each. Default: the compressor's own. What is
                computed is stored at the compressor's own ratio, or at the one asked for if that
                is lower.
            on_miss: Compute the missing and store them, leave them out as None to be read as
                text, or raise. Only where the missing are computed does the guard have a say.
            documents: The document each text belongs to, noted in a DocumentStore when the entry
                is made; `claim` notes one for an entry that is already there.
            accept: Called with the source tokens of each text before anything is computed; may
                raise to refuse texts that together do not fit.

        Raises:
            ChunkMissError: with on_miss="raise".
            PromptTooLongError: for a text longer than the model's context.
            ValueError: for an empty text, an unknown on_miss, or a ratio that `ratio_for` refuses.
        """
        require_on_miss(on_miss)
        asked = [self.ratio_for(ratio) for ratio in ratios or [None] * len(texts)]
        started = time.perf_counter()
        keys = [self.key(text) for text in texts]
        owned = list(zip(keys, documents or [None] * len(keys), strict=True))
        lowest: dict[str, int] = {}
        for key, ratio in zip(keys, asked, strict=True):
            lowest[key] = min(ratio, lowest.get(key, ratio))
        found: dict[str, AnchorKV] = {}
        reasons: dict[str, str] = {}
        for key, text in dict(zip(keys, texts, strict=True)).items():
            loaded = self._load(key, text, lowest[key], may_compute=on_miss == "compress")
            if isinstance(loaded, AnchorKV):
                found[key] = loaded
            else:
                reasons[key] = loaded
        load_s = time.perf_counter() - started
        misses = [
            reasons[key] if key in reasons else self._shortage(found[key], ratio)
            for key, ratio in zip(keys, asked, strict=True)
        ]
        hits = {key for key, miss in zip(keys, misses, strict=True) if miss is None}
        missing = {k: t for k, t, miss in zip(keys, texts, misses, strict=True) if miss is not None}
        if missing and on_miss == "raise":
            raise ChunkMissError(misses)
        started = time.perf_counter()
        computed: dict[str, AnchorKV] = {}
        failed = 0
        if on_miss == "compress" and missing:
            if accept is not None:
                lengths = {key: kv.num_tokens for key, kv in found.items()}
                lengths |= {k: len(self.compressor.tokenize(t)) for k, t in missing.items()}
                accept([lengths[key] for key in keys])
            computed = self._compute(
                missing, {key: self.kept_ratio(lowest[key]) for key in missing}
            )
            for key, document in dict.fromkeys(owned):
                if key in computed and reasons.get(key) != "slow":
                    failed += not self._put(key, missing[key], computed[key], document)
        kvs: list[AnchorKV | None] = []
        for key, ratio, miss in zip(keys, asked, misses, strict=True):
            kv = found[key] if miss is None else computed.get(key)
            kvs.append(None if kv is None else self.cut(kv, ratio))
        return Fetched(
            kvs=kvs,
            misses=misses,
            load_s=load_s,
            compress_s=time.perf_counter() - started,
            loads=len(hits),
            load_bytes=sum(found[key].nbytes for key in hits),
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

    def _load(self, key: str, text: str, ratio: int, may_compute: bool) -> AnchorKV | str:
        """A stored chunk, no more of it than a ratio needs if possible; or why it was not read."""
        guard = self.guard if may_compute else None
        try:
            if guard is not None and guard.prefers_computing(len(text)) and key in self.store:
                return "slow"
            started = time.perf_counter()
            kv = self._read(key, ratio)
            if guard is not None:
                guard.loaded(len(text), kv.num_tokens, kv.nbytes, time.perf_counter() - started)
            return kv
        except KeyError as miss:
            # Stores name the reason (CorruptEntryError); a plain KeyError means it is not there.
            reason: str | None = getattr(miss, "reason", None)
            return reason or self._why_absent(key, text)
        except OSError as error:
            log.warning("chunk %s could not be read: %s", key[:12], error)
            return "unreadable"

    def _read(self, key: str, ratio: int) -> AnchorKV:
        compressor, store = self.compressor, self.store
        if compressor.is_nested and isinstance(store, PartialStore):
            return store.read(key, lambda num_tokens: compressor.num_entries(num_tokens, ratio))
        return store[key]

    def _shortage(self, kv: AnchorKV, ratio: int) -> str | None:
        """Why a stored chunk does not do at a ratio; None if it does."""
        if not self.compressor.is_nested:
            return None
        if kv.num_entries >= self.compressor.num_entries(kv.num_tokens, ratio):
            return None
        return f"ratio: stored at {kv.ratio:.0f}x, asked for {ratio}x"

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

    def _compute(
        self, missing: Mapping[str, str], ratios: Mapping[str, int]
    ) -> dict[str, AnchorKV]:
        started = time.perf_counter()
        # All of them together at the lowest ratio: the encoder's work is the same at any.
        kvs = self.at_ratio(min(ratios.values())).compress(list(missing.values()))
        if self.guard is not None:
            tokens = sum(kv.num_tokens for kv in kvs)
            self.guard.computed(tokens, time.perf_counter() - started)
        return {key: self.cut(kv, ratios[key]) for key, kv in zip(missing, kvs, strict=True)}

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
