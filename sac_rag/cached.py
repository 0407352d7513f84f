"""CachedCompressor: a compressor that reads from a store what the store has."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from sac_rag import forks
from sac_rag.chunk import require_ratio
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig, StoredDtype
from sac_rag.compressors.full import Full
from sac_rag.errors import ChunkMissError
from sac_rag.fetched import Fetched, Lookup
from sac_rag.guard import Guard
from sac_rag.in_flight import InFlight
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.namespace import Namespace
from sac_rag.stores.base import Wanted, as_document_store, strings

log = logging.getLogger(__name__)

OnMiss = Literal["compress", "text", "raise"]


def require_on_miss(on_miss: str) -> None:
    """Raises ValueError if the value is no OnMiss."""
    if on_miss not in get_args(OnMiss):
        raise ValueError(f"on_miss must be one of {', '.join(get_args(OnMiss))}, was: {on_miss!r}")


class CachedCompressor:
    """A compressor whose results are kept in a store, under a digest of what determines them.

    It has the properties of the compressor that it wraps, so that callers need not ask for `inner`.

    Attributes:
        inner: The compressor that computes what the store does not have, its LoRA merged.
        store: The DocumentStore given, or a plain mapping, such as a dict, as one.
        namespace: The secret of every key (see `namespace.Namespace`): the same text under two
            namespaces is two entries.
        guard: Measures whether loading is faster than computing; None loads whatever is stored.
        clock: Seconds since any moment, by which loading and computing are measured.
        fingerprint: Of the inner compressor, taken once: it must not be trained while it is cached.
        store_failures: Writes that failed, on a full disk for example; answers do not depend on
            them.
    """

    def __init__(
        self,
        compressor: Compressor,
        store: MutableMapping[str, AnchorKV],
        *,
        namespace: str = "",
        guard: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.inner = compressor.merged()
        self.store = as_document_store(store)
        self.namespace = namespace
        self.guard = Guard() if guard else None
        self.clock = clock
        self.fingerprint = compressor.fingerprint
        self.store_failures = 0
        self._names = Namespace(namespace)
        self._noted = False
        self._in_flight: InFlight[tuple[str, int], AnchorKV] = InFlight()
        self._counting = forks.lock(self, "_counting")

    @property
    def generator(self) -> Generator:
        """The frozen LM, which also encodes."""
        return self.inner.generator

    @property
    def config(self) -> CompressorConfig:
        """What determines the KV besides weights."""
        return self.inner.config

    @property
    def method(self) -> str:
        """Name of the compression method."""
        return self.inner.method

    @property
    def computes(self) -> bool:
        """Whether chunks that the store does not have can be computed."""
        return self.inner.computes

    @property
    def is_nested(self) -> bool:
        """Whether one compression serves every higher ratio too, by its first entries."""
        return self.inner.is_nested

    @property
    def cue(self) -> Tensor | None:
        """The learned embedding that follows each chunk in a prompt, if there is one."""
        return self.inner.cue

    @property
    def generator_adapter(self) -> str | None:
        """Name of the LoRA that reads and answers prompts; None for the frozen LM."""
        return self.inner.generator_adapter

    @property
    def sink_ids(self) -> list[int]:
        """Token ids read before each segment and dropped."""
        return self.inner.sink_ids

    @property
    def heading_ids(self) -> list[int]:
        """Token ids that stand before each chunk's own and are compressed with them."""
        return self.inner.heading_ids

    @property
    def batch_tokens(self) -> int:
        """Most tokens in one encoder pass, pads included."""
        return self.inner.batch_tokens

    def tokenize(self, text: str) -> list[int]:
        """A chunk's tokens behind the heading's; see `Compressor.tokenize`."""
        return self.inner.tokenize(text)

    def tokens_read(self, counts: Sequence[int]) -> int:
        """Tokens that the encoder reads for chunks of these lengths, sinks and pads included."""
        return self.inner.tokens_read(counts)

    def storing(self, dtype: StoredDtype) -> Compressor:
        """The inner compressor with its KV handed over in another dtype, without the store."""
        return self.inner.storing(dtype)

    def key(self, text: str) -> str:
        """The key of a chunk: a digest of fingerprint and text, keyed by the namespace."""
        return self._names.key(self.fingerprint, text)

    def text_id(self, text: str) -> str:
        """A digest of the text alone, keyed by the namespace: the same for every compressor."""
        return self._names.text_id(text)

    def document_id(self, document: str) -> str:
        """A document's id in the store: in a namespace, one that no other namespace uses."""
        return self._names.document_id(document)

    def owns(self, document_id: str) -> bool:
        """Whether a document's id in the store is of this namespace."""
        return self._names.owns(document_id)

    def ratio_for(self, asked: int | None) -> int:
        """The ratio to use chunks at: the one asked for, or else the config's.

        Raises:
            ValueError: if it is no integer of at least 1, or another ratio than the config's where
                one compression does not serve several.
        """
        require_ratio(asked)
        configured = self.config.ratio
        if asked is None or asked == configured:
            return configured
        if self.is_nested:
            return asked
        if self.method == Full.method:
            raise ValueError(
                f"'full' keeps every token: ratio must be 1, was: {asked}; "
                "load a trained compressor"
            )
        raise ValueError(
            f"ratio must be {configured}, the only one of this compressor, was: {asked}; it keeps "
            "other entries at each ratio (only anchors='learned' ranks them), so load another one: "
            f"SacRAG.from_pretrained(ratio={asked}), or compressor.at_ratio({asked})"
        )

    def kept_ratio(self, asked: int | None) -> int:
        """The ratio to store a chunk at: the one asked for, or the config's if that is lower."""
        return min(self.ratio_for(asked), self.config.ratio)

    def at_ratio(self, ratio: int) -> Compressor:
        """The inner compressor at a ratio that `ratio_for` returned, without the store."""
        return self.inner if ratio == self.config.ratio else self.inner.at_ratio(ratio)

    def cut(self, kv: AnchorKV, ratio: int) -> AnchorKV:
        """A compressed chunk at a ratio, which must not be lower than that of its compression."""
        if not self.is_nested:
            return kv
        return kv.first(self.inner.num_entries(kv.num_tokens, ratio))

    def __contains__(self, text: str) -> bool:
        return self.is_stored(text)

    def is_stored(self, text: str, ratio: int | None = None) -> bool:
        """Whether the store has the entries of a text that a ratio needs. Default: the config's."""
        key, ratio = self.key(text), self.ratio_for(ratio)
        if not self.is_nested:
            return key in self.store
        try:
            num_tokens, num_entries = self.store.extent(key)
        except KeyError:
            return False
        return num_entries >= self.inner.num_entries(num_tokens, ratio)

    def compress(self, texts: Sequence[str]) -> list[AnchorKV]:
        """Compresses chunks as `Compressor.compress` does, but only those not in the store."""
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
            ratios: Source tokens per KV entry of each. Default: the config's. See `kept_ratio` for
                the ratio that a computed chunk is stored at.
            on_miss: Compute the missing and store them, leave them out as None to be read as
                text, or raise. The guard is asked only where the missing are computed.
            documents: The document of each text, recorded in the store when the entry is made;
                `claim` records it in an existing entry.
            accept: Called with the source tokens of each text before anything is computed; may
                raise.

        Raises:
            ChunkMissError: with on_miss="raise", if a chunk is not in the store.
            PromptTooLongError: for a text longer than the model's context.
            ValueError: for an empty text, an unknown on_miss, or a ratio that `ratio_for` refuses.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be several texts, was: one str; put it in a list")
        require_on_miss(on_miss)
        if documents is not None and len(documents) != len(texts):
            raise ValueError(f"expected {len(texts)} documents, one per text, got {len(documents)}")
        started = self.clock()
        lookup = self._look_up(texts, ratios, may_compute=on_miss == "compress")
        load_s = self.clock() - started
        if on_miss == "raise" and lookup.missing:
            raise ChunkMissError(lookup.misses)
        if accept is not None:
            lengths = {key: kv.num_tokens for key, kv in lookup.loaded.items()}
            lengths |= {key: len(self.tokenize(text)) for key, text in lookup.missing.items()}
            accept([lengths[key] for key in lookup.keys])
        started = self.clock()
        computed: dict[str, AnchorKV] = {}
        received: dict[str, AnchorKV] = {}
        failed_writes = 0
        if on_miss == "compress" and lookup.missing:
            computed, received, failed_writes = self._compute(lookup, documents)
        kvs: list[AnchorKV | None] = []
        for key, ratio, miss in zip(lookup.keys, lookup.ratios, lookup.misses, strict=True):
            kv = lookup.loaded[key] if miss is None else (computed | received).get(key)
            kvs.append(None if kv is None else self.cut(kv, ratio))
        hits = {key for key, miss in zip(lookup.keys, lookup.misses, strict=True) if miss is None}
        return Fetched(
            kvs=kvs,
            misses=lookup.misses,
            load_s=load_s,
            compress_s=self.clock() - started,
            loads=len(hits),
            load_bytes=sum(lookup.loaded[key].nbytes for key in hits),
            computed=len(computed),
            computed_tokens=sum(kv.num_tokens for kv in computed.values()),
            failed_writes=failed_writes,
        )

    def keep(self, text: str, kv: AnchorKV, documents: Collection[str] = ()) -> None:
        """Stores a chunk that the compressor has computed.

        Raises:
            OSError: if the store is read-only, or cannot be written.
        """
        if self.store.read_only:
            raise OSError("the store was opened read-only; open it to be written")
        ids = tuple(map(self.document_id, strings(documents, "documents")))
        self._write(self.store.put, self.key(text), text, kv, ids)

    def claim(self, text: str, document: str) -> bool:
        """Records in a DocumentStore that a stored text belongs to this document too.

        Returns:
            False if the entry is not there: evicted meanwhile, or damaged.
        """
        if not self.store.remembers_documents:
            return True
        key = self.key(text)
        try:
            if self.document_id(document) not in self.store.documents(key):
                self._put(self.store.put, key, text, self.store[key], document)
        except KeyError:
            return False
        return True

    def forget(self, document: str) -> int:
        """Deletes the entries that only this document uses; texts of other documents stay.

        Returns:
            How many entries were deleted.

        Raises:
            TypeError: if the store does not record documents.
            OSError: if the store cannot be changed.
        """
        return self.store.forget(self.document_id(document))

    def _look_up(
        self, texts: Sequence[str], ratios: Sequence[int | None] | None, may_compute: bool
    ) -> Lookup:
        """Reads what the store has of chunks; may decide against reading where computing may do."""
        ended = self._in_flight.ended
        asked = [self.ratio_for(ratio) for ratio in ratios or [None] * len(texts)]
        keys = [self.key(text) for text in texts]
        lowest: dict[str, int] = {}
        for key, ratio in zip(keys, asked, strict=True):
            lowest[key] = min(ratio, lowest.get(key, ratio))
        entries = self._load(dict(zip(keys, texts, strict=True)), lowest, may_compute)
        loaded = {key: kv for key, kv in entries.items() if isinstance(kv, AnchorKV)}
        reasons = {key: miss for key, miss in entries.items() if isinstance(miss, str)}
        misses = [
            reasons[key] if key in reasons else self._shortage(loaded[key], ratio)
            for key, ratio in zip(keys, asked, strict=True)
        ]
        missing = {k: t for k, t, miss in zip(keys, texts, misses, strict=True) if miss is not None}
        return Lookup(keys, asked, misses, loaded, missing, lowest, ended)

    def _compute(
        self, lookup: Lookup, documents: Sequence[str | None] | None
    ) -> tuple[dict[str, AnchorKV], dict[str, AnchorKV], int]:
        """Computes and stores what is missing, each chunk in one of the threads that miss it.

        Returns:
            What was computed here, by key, and what other threads have computed, each at the ratio
            that it is stored at; and the number of failed writes.
        """
        ratios = {key: self.kept_ratio(lookup.lowest[key]) for key in lookup.missing}
        computed: dict[str, AnchorKV] = {}
        failed = 0

        def compute(wanted: list[tuple[str, int]]) -> dict[tuple[str, int], AnchorKV]:
            nonlocal failed
            stored = self._stored_since(lookup, wanted)
            texts = {key: lookup.missing[key] for key, _ in wanted if key not in stored}
            if texts:
                computed.update(self._compress(texts, ratios))
                # Before others cease to wait: a thread that comes later finds it in the store.
                failed += self._put_all(lookup, computed, documents)
            return {(key, ratio): (stored | computed)[key] for key, ratio in wanted}

        mine, theirs = self._in_flight.compute(ratios.items(), compute)
        received = {key: kv for (key, _), kv in (mine | theirs).items() if key not in computed}
        if documents is not None:
            failed += self._put_all(lookup, received, documents)
        return computed, received, failed

    def _stored_since(
        self, lookup: Lookup, wanted: Sequence[tuple[str, int]]
    ) -> dict[str, AnchorKV]:
        """What other threads have stored since a lookup, if they have stored anything."""
        if self._in_flight.ended == lookup.ended:
            return {}
        ratios = dict(wanted)
        texts = {key: lookup.missing[key] for key in ratios}
        return {
            key: kv
            for key, kv in self._load(texts, ratios, may_compute=True).items()
            if isinstance(kv, AnchorKV) and self._shortage(kv, ratios[key]) is None
        }

    def _compress(self, texts: Mapping[str, str], ratios: Mapping[str, int]) -> dict[str, AnchorKV]:
        started = self.clock()
        # All of them together at the lowest ratio: the encoder's work is the same at any.
        kvs = self.at_ratio(min(ratios[key] for key in texts)).compress(list(texts.values()))
        if self.guard is not None:
            tokens = sum(kv.num_tokens for kv in kvs)
            self.guard.computed(tokens, self.clock() - started)
        return {key: self.cut(kv, ratios[key]) for key, kv in zip(texts, kvs, strict=True)}

    def _put_all(
        self,
        lookup: Lookup,
        computed: Mapping[str, AnchorKV],
        documents: Sequence[str | None] | None,
    ) -> int:
        """Stores what was computed, except what is there already; returns the failed writes."""
        slow = {key for key, miss in zip(lookup.keys, lookup.misses, strict=True) if miss == "slow"}
        failed = 0
        owners = zip(lookup.keys, documents or [None] * len(lookup.keys), strict=True)
        for key, document in dict.fromkeys(owners):
            if key in computed and key not in slow:
                text = lookup.missing[key]
                # An answer waits a moment for others that write, and does without.
                failed += not self._put(self.store.offer, key, text, computed[key], document)
        return failed

    def _load(
        self, texts: Mapping[str, str], ratios: Mapping[str, int], may_compute: bool
    ) -> dict[str, AnchorKV | str]:
        """Stored chunks, only the entries a ratio needs if possible; or why they were not read."""
        if len(texts) > 1 and not self.store.reads_many:
            return {k: self._load({k: t}, ratios, may_compute)[k] for k, t in texts.items()}
        guard = self.guard if may_compute else None
        loaded: dict[str, AnchorKV | str] = {
            key: "slow" for key, text in texts.items() if guard and self._is_slow(guard, key, text)
        }
        started = self.clock()
        entries = self.store.read_many(
            {key: self._wanted(ratios[key]) for key in texts if key not in loaded}
        )
        seconds = (self.clock() - started) / max(1, len(entries))
        for key, kv in entries.items():
            if not isinstance(kv, AnchorKV):
                loaded[key] = self._reason(kv, key, texts[key])
                continue
            if guard is not None:
                guard.loaded(len(texts[key]), kv.num_tokens, kv.nbytes, seconds)
            # Earlier versions stored infinities.
            loaded[key] = kv if kv.is_finite else "corrupt: its keys or values are not finite"
        return loaded

    def _is_slow(self, guard: Guard, key: str, text: str) -> bool:
        try:
            return guard.prefers_computing(len(text)) and key in self.store
        except OSError:
            return False  # reading it says why

    def _reason(self, miss: KeyError | OSError, key: str, text: str) -> str:
        if isinstance(miss, OSError):
            log.warning("chunk %s could not be read: %s", key[:12], miss)
            return "unreadable"
        # Stores name the reason (CorruptEntryError); a plain KeyError means it is not there.
        reason: str | None = getattr(miss, "reason", None)
        return reason or self._why_absent(key, text)

    def _wanted(self, ratio: int) -> Wanted | None:
        """How many KV entries of a chunk a ratio needs; None for all."""
        if not self.is_nested:
            return None
        return lambda num_tokens: self.inner.num_entries(num_tokens, ratio)

    def _shortage(self, kv: AnchorKV, ratio: int) -> str | None:
        """Why a stored chunk is not enough for a ratio; None if it is."""
        if not self.is_nested:
            return None
        if kv.num_entries >= self.inner.num_entries(kv.num_tokens, ratio):
            return None
        return f"ratio: stored at {kv.ratio:.0f}x, asked for {ratio}x"

    def _why_absent(self, key: str, text: str) -> str:
        text_id = self.text_id(text)
        self._note()
        try:
            return self.store.why_absent(key, text_id=text_id, fingerprint=self.fingerprint)
        except OSError as error:
            log.warning("why chunk %s is not there could not be read: %s", key[:12], error)
            return "absent"

    def _note(self) -> None:
        """Records in the store, once, what the fingerprint covers; reasons are vaguer without."""
        if self._noted:
            return
        try:
            self.store.note(self.fingerprint, self.inner.fingerprint_fields())
            self._noted = True
        except OSError as error:
            log.warning("what made the chunks was not stored: %s", error)

    def _put(
        self, put: Callable[..., None], key: str, text: str, kv: AnchorKV, document: str | None
    ) -> bool:
        """Stores a chunk that was computed for an answer; returns False if that failed."""
        if self.store.read_only:
            return True
        ids = () if document is None else (self.document_id(document),)
        try:
            self._write(put, key, text, kv, ids)
        except OSError as error:
            # The chunk is computed and the question can be answered; only the next one is slower.
            with self._counting:
                self.store_failures += 1
            log.warning("chunk %s was not stored: %s", key[:12], error)
            return False
        return True

    def _write(
        self,
        put: Callable[..., None],
        key: str,
        text: str,
        kv: AnchorKV,
        documents: tuple[str, ...],
    ) -> None:
        self._note()
        put(key, kv, documents, text_id=self.text_id(text), fingerprint=self.fingerprint)
