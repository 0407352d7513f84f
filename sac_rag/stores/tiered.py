"""TieredStore: several stores as one, the fastest first, such as memory, disk and a server."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import TypeVar

from sac_rag import forks
from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.stores.background import Background
from sac_rag.stores.base import DocumentStore, Wanted, as_document_store, strings
from sac_rag.stores.encoded import Read, kept_keys

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class TieredStore(DocumentStore):
    """Stores read one after the other, the fastest first; what a later one has fills the earlier.

    A tier that fails is skipped and counted. Whatever deletes raises an OSError if a tier could not
    be reached, after the others have deleted it, and must be repeated when the tier is back: until
    then it still has the entry. May be shared by threads.

    Args:
        tiers: Stores, the fastest first. The last one should hold all entries.
        write_back: Whether writes return when the first tier has the entry, and reach the others
            in the background; what is not written when the process ends is lost. Otherwise each
            write reaches every tier.
        most_pending: Most entries waiting to be written or prefetched; a write that finds as many
            waiting is done at once, a prefetch is left out.

    Attributes:
        failures: Calls of each tier that raised an OSError.
        hits: Entries read from each tier.

    Raises:
        ValueError: without a tier.
    """

    reads_many = True

    def __init__(
        self,
        tiers: Sequence[MutableMapping[str, AnchorKV]],
        *,
        write_back: bool = False,
        most_pending: int = 256,
    ) -> None:
        if not tiers:
            raise ValueError("a TieredStore must have at least one tier, had none")
        self.tiers = [as_document_store(tier) for tier in tiers]
        self.write_back = write_back
        self._background = Background("sac_rag tiers", most_pending)
        self.failures = [0] * len(self.tiers)
        self.hits = [0] * len(self.tiers)
        self.remembers_documents = any(tier.remembers_documents for tier in self.tiers)
        self.read_only = all(tier.read_only for tier in self.tiers)
        self._renew()
        forks.in_child(self, TieredStore._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        # Changes of one key reach the tiers in one order, and a fill is a change.
        self._changing = threading.RLock()
        self._copying: set[str] = set()
        self._prefetching: dict[str, Future[None]] = {}
        self._generation = 0  # of deletions: what was read before one fills nothing after it

    # A mapping.

    def __getitem__(self, key: str) -> AnchorKV:
        """Reads an entry from the first tier that has it, and stores it in those before.

        Raises:
            KeyError: if no tier has it; a `CorruptEntryError` if one had it and it was bad.
            OSError: if a tier could not be read and no other one has it.
        """
        return self._one(key, None)

    def read(self, key: str, wanted: Wanted) -> AnchorKV:
        """Reads an entry's first KV entries; the tiers before get all, in the background."""
        return self._one(key, wanted)

    def read_many(self, wanted: Mapping[str, Wanted | None]) -> dict[str, Read]:
        """Reads several entries, from each tier those that the earlier ones do not have.

        Waits for prefetches of them that have begun, and cancels those that have not.
        """
        with self._lock:
            ahead = {self._prefetching[key] for key in wanted if key in self._prefetching}
        futures.wait([future for future in ahead if not future.cancel()])
        return self._read_many(wanted)

    def _read_many(self, wanted: Mapping[str, Wanted | None]) -> dict[str, Read]:
        results: dict[str, Read] = {}
        missing = dict(wanted)
        generation = self._generation
        for number, tier in enumerate(self.tiers):
            if not missing:
                break
            for key, entry in tier.read_many(missing).items():
                if isinstance(entry, OSError):
                    self._failed(number, entry)
                before = results.get(key)
                results[key] = _better(before, entry)
                if results[key] is entry and isinstance(entry, AnchorKV):
                    self.hits[number] += 1
                    if missing[key] is None:
                        self._fill(number, key, entry, generation)
                    elif number:  # only some KV entries were read, and a copy has all
                        self._copy(number, key)
            missing = {
                key: count for key, count in missing.items() if not _is_enough(results[key], count)
            }
        return {key: results[key] for key in wanted}

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        self._write(lambda tier: tier.__setitem__(key, kv))

    def __delitem__(self, key: str) -> None:
        deleted: list[bool] = []

        def delete(tier: DocumentStore) -> None:
            with contextlib.suppress(KeyError):
                del tier[key]
                deleted.append(True)

        self._delete_everywhere(delete)
        if not deleted:
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return any(self._ask(lambda tier: key in tier))

    def __iter__(self) -> Iterator[str]:
        seen: set[str] = set()
        for keys in self._ask(list):
            yield from (key for key in keys if key not in seen)
            seen.update(keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Deletes every entry of every tier."""
        self._delete_everywhere(lambda tier: tier.clear())

    def extent(self, key: str) -> tuple[int, int]:
        """Source tokens and KV entries of a chunk, in the tier that has the most."""
        extents = []
        for number, tier in enumerate(self.tiers):
            with contextlib.suppress(KeyError), self._skipped(number):
                extents.append(tier.extent(key))
        if not extents:
            raise KeyError(key)
        return max(extents, key=lambda extent: extent[1])

    # Documents.

    def put(
        self,
        key: str,
        kv: AnchorKV,
        documents: Iterable[str] = (),
        *,
        text_id: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Stores an entry in every tier, as each tier's `put` does.

        Raises:
            OSError: if no tier could be written.
        """
        ids = strings(documents, "documents")
        self._write(lambda tier: _put(tier, tier.put, key, kv, ids, text_id, fingerprint))

    def offer(
        self,
        key: str,
        kv: AnchorKV,
        documents: Iterable[str] = (),
        *,
        text_id: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Stores an entry in every tier, as each tier's `offer` does."""
        ids = strings(documents, "documents")
        self._write(lambda tier: _put(tier, tier.offer, key, kv, ids, text_id, fingerprint))

    def documents(self, key: str) -> tuple[str, ...]:
        """Documents of an entry in all tiers, sorted, without reading it."""
        self.flush()
        documents = self._documents(key)
        if documents is None:
            raise KeyError(key)
        return tuple(sorted(documents))

    def keys_of(self, document: str) -> list[str]:
        """Keys of a document's entries in all tiers."""
        self.flush()
        return sorted({k for keys in self._ask(lambda tier: tier.keys_of(document)) for k in keys})

    def replace_documents(self, documents: Mapping[str, Iterable[str]]) -> int:
        """Deletes what only these documents use, except some keys of each, in every tier."""
        keep = kept_keys(documents)
        counts: list[int] = [0]
        before: set[str] = set()

        def forget(tier: DocumentStore) -> None:
            for name in keep:
                before.update(tier.keys_of(name))
            counts.append(tier.replace_documents(keep))

        def drop_copy(tier: DocumentStore) -> None:
            for key in orphans:
                with contextlib.suppress(KeyError):
                    del tier[key]

        try:
            self._delete_everywhere(forget)
        finally:
            # Copies have no documents, and some stores remember none.
            orphans = [key for key in before if not self._documents(key)]
            self._delete_everywhere(drop_copy)
        return max(counts)

    def origin_of(self, key: str) -> tuple[str | None, str | None]:
        """The text id and the fingerprint that an entry was put with; None where not known."""
        origins = self._ask(lambda tier: tier.origin_of(key))
        return next((origin for origin in reversed(origins) if any(origin)), (None, None))

    # Reasons of misses.

    def note(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        """Records in every tier what a fingerprint is made of."""
        self._ask(lambda tier: tier.note(fingerprint, fields))

    def why_absent(
        self, key: str, *, text_id: str | None = None, fingerprint: str | None = None
    ) -> str:
        """The reason of the last tier that has one."""
        reasons = self._ask(
            lambda tier: tier.why_absent(key, text_id=text_id, fingerprint=fingerprint)
        )
        return next((reason for reason in reversed(reasons) if reason != "absent"), "absent")

    @property
    def evictions(self) -> int:  # type: ignore[override]
        """Entries that the last tier evicted: what the others evict is still there."""
        return self.tiers[-1].evictions

    # In the background.

    def prefetch(self, keys: Iterable[str]) -> None:
        """Reads entries into the first tier in the background; who asks meanwhile waits for it."""
        wanted = strings(keys, "keys")
        future = self._background.submit(lambda: self._read_ahead(wanted))
        if future is None:
            return
        with self._lock:
            self._prefetching.update(dict.fromkeys(wanted, future))
        future.add_done_callback(self._prefetched)

    def flush(self) -> None:
        """Waits until all that was written or prefetched so far has reached its tiers."""
        self._background.flush()

    def close(self) -> None:
        """Writes what is pending, and closes every tier."""
        self.flush()
        self._background.close()
        for number, tier in enumerate(self.tiers):
            with self._skipped(number):
                tier.close()

    def _read_ahead(self, keys: Sequence[str]) -> None:
        with self._skipped(0):
            missing = [key for key in keys if key not in self.tiers[0]]
            self.tiers[0].prefetch(set(keys).difference(missing))
            self._read_many(dict.fromkeys(missing))

    def _prefetched(self, future: Future[None]) -> None:
        with self._lock:
            for key in [key for key, of in self._prefetching.items() if of is future]:
                del self._prefetching[key]

    def _one(self, key: str, wanted: Wanted | None) -> AnchorKV:
        entry = self.read_many({key: wanted})[key]
        if isinstance(entry, AnchorKV):
            return entry
        raise entry

    def _fill(self, number: int, key: str, kv: AnchorKV, generation: int) -> None:
        """Stores what a tier had in those before, unless something was deleted meanwhile."""
        if not number:
            return
        text_id = fingerprint = None
        with self._skipped(number):
            text_id, fingerprint = self.tiers[number].origin_of(key)
        with self._changing:
            if generation != self._generation:
                return
            for earlier, tier in enumerate(self.tiers[:number]):
                with self._skipped(earlier):
                    if not tier.read_only:
                        _put(tier, tier.offer, key, kv, (), text_id, fingerprint)

    def _copy(self, number: int, key: str) -> None:
        """Fills the tiers before one with all of an entry, in the background."""

        def copy() -> None:
            generation = self._generation
            try:
                with contextlib.suppress(KeyError), self._skipped(number):
                    self._fill(number, key, self.tiers[number][key], generation)
            finally:
                self._copying.discard(key)

        if key not in self._copying:
            self._copying.add(key)
            if self._background.submit(copy) is None:
                self._copying.discard(key)

    def _documents(self, key: str) -> set[str] | None:
        """Documents of an entry in all tiers; None if none has it."""
        documents: set[str] | None = None
        for number, tier in enumerate(self.tiers):
            with contextlib.suppress(KeyError), self._skipped(number):
                documents = (documents or set()).union(tier.documents(key))
        return documents

    def _write(self, write: Callable[[DocumentStore], None]) -> None:
        first, *rest = [n for n, tier in enumerate(self.tiers) if not tier.read_only] or [0]
        if not self.write_back:
            self._write_to([first, *rest], write)
            return
        try:
            self._write_to([first], write)
        except OSError:
            if not rest:
                raise
            self._write_to(rest, write)
            return
        generation = self._generation

        def later() -> None:
            with self._changing:
                if generation == self._generation:
                    with contextlib.suppress(OSError):  # counted
                        self._write_to(rest, write)

        if rest and self._background.submit(later) is None:
            later()

    def _write_to(self, numbers: Sequence[int], write: Callable[[DocumentStore], None]) -> None:
        errors: list[OSError] = []
        with self._changing:
            for number in numbers:
                try:
                    write(self.tiers[number])
                except OSError as error:
                    self._failed(number, error)
                    errors.append(error)
        if len(errors) == len(numbers):
            raise errors[0]

    def _delete_everywhere(self, delete: Callable[[DocumentStore], None]) -> None:
        self.flush()
        errors = []
        with self._changing:
            self._generation += 1
            for number, tier in enumerate(self.tiers):
                try:
                    delete(tier)
                except OSError as error:
                    self._failed(number, error)
                    errors.append(error)
        if errors:
            raise errors[0]

    def _ask(self, ask: Callable[[DocumentStore], _T]) -> list[_T]:
        """Answers of the tiers that have not failed."""
        answers = []
        for number, tier in enumerate(self.tiers):
            with self._skipped(number):
                answers.append(ask(tier))
        return answers

    @contextlib.contextmanager
    def _skipped(self, number: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed(number, error)

    def _failed(self, number: int, error: OSError) -> None:
        with self._lock:
            self.failures[number] += 1
        logger.warning("tier %d (%s) was skipped: %s", number, self.tiers[number].type_name, error)


def _is_enough(entry: Read, wanted: Wanted | None) -> bool:
    """Whether no later tier need be asked: one may have more KV entries of a chunk."""
    if not isinstance(entry, AnchorKV):
        return False
    return wanted is None or entry.num_entries >= wanted(entry.num_tokens)


def _put(
    tier: DocumentStore,
    put: Callable[..., None],
    key: str,
    kv: AnchorKV,
    ids: Iterable[str],
    text_id: str | None,
    fingerprint: str | None,
) -> None:
    """Calls a tier's `put` or `offer`, except where fewer KV entries would replace more."""
    if not tier.remembers_documents:
        with contextlib.suppress(KeyError):
            if tier.extent(key)[1] >= kv.num_entries:
                return
    put(key, kv, ids, text_id=text_id, fingerprint=fingerprint)


def _better(before: Read | None, entry: Read) -> Read:
    """Of what two tiers answered: most KV entries, else the error that says most."""
    if isinstance(before, AnchorKV):
        more = isinstance(entry, AnchorKV) and entry.num_entries > before.num_entries
        return entry if more else before
    if isinstance(before, OSError | CorruptEntryError) and not isinstance(entry, AnchorKV):
        return before
    return entry
