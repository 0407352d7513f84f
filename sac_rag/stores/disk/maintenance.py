"""Maintenance of a DiskStore: garbage collection and figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from sac_rag.stores.base import strings
from sac_rag.stores.disk.entries import Entries
from sac_rag.stores.disk.folder import Manifests
from sac_rag.stores.disk.index import IndexRow

Progress: TypeAlias = Callable[[int], None]

_QUARANTINE_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Collected:
    """What garbage collection deleted.

    Attributes:
        expired: Entries older than the store's max_age_s.
        superseded: Entries of fingerprints that were not to keep.
        leftovers: Files of killed writers.
        quarantined: Bad entries that were in quarantine long enough.
        nbytes: Bytes of them all.
    """

    expired: int
    superseded: int
    leftovers: int
    quarantined: int
    nbytes: int


@dataclass(frozen=True)
class FingerprintStats:
    """Entries of one fingerprint.

    Attributes:
        fingerprint: None for entries that were put without one.
        entries: Number of entries.
        nbytes: Their bytes.
        ratio: Source tokens per KV entry, mean over heads and chunks; None if not known.
        fields: What the fingerprint is made of; None if that was not noted.
    """

    fingerprint: str | None
    entries: int
    nbytes: int
    ratio: float | None
    fields: dict[str, str] | None


@dataclass(frozen=True)
class StoreStats:
    """A store at one moment, and its counters since it was made.

    Attributes:
        entries: Number of entries.
        nbytes: Their bytes.
        ratio: Source tokens per KV entry, mean over heads and chunks; None if not known.
        index_nbytes: Bytes of the index on top.
        pinned: Entries that are never evicted.
        documents: Documents that have entries.
        quarantined: Bad entries in quarantine now.
        quarantined_nbytes: Their bytes.
        oldest_s: Seconds since the oldest entry was stored; None if there is none.
        newest_s: Seconds since the newest entry was stored.
        unused_s: Seconds since the last use of the entry that would be evicted next.
        hits: Entries read.
        misses: Keys asked for that had no entry to read.
        reasons: Misses by their reason, where it was asked for.
        evicted: Entries evicted, or not kept because there was no room.
        evicted_nbytes: Their bytes.
        total_quarantined: Bad entries ever moved to quarantine.
        cipher: Public id of the key that encrypts the store; None if it is not encrypted.
        fingerprints: Entries by fingerprint, most entries first.
    """

    entries: int
    nbytes: int
    ratio: float | None
    index_nbytes: int
    pinned: int
    documents: int
    quarantined: int
    quarantined_nbytes: int
    oldest_s: float | None
    newest_s: float | None
    unused_s: float | None
    hits: int
    misses: int
    reasons: dict[str, int]
    evicted: int
    evicted_nbytes: int
    total_quarantined: int
    cipher: str | None
    fingerprints: tuple[FingerprintStats, ...]

    @property
    def hit_rate(self) -> float | None:
        """Hits among all keys asked for; None if there were none."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else None


def collect_garbage(
    entries: Entries,
    is_expired: Callable[[IndexRow], bool],
    keep_fingerprints: Iterable[str] | None = None,
) -> Collected:
    """Deletes entries and files that nobody will ask for."""
    index = entries.index
    current: set[str | None] | None = None
    if keep_fingerprints is not None:
        current = {None, *strings(keep_fingerprints, "fingerprints")}
    expired = entries.drop([row for row in index.rows() if is_expired(row)], "expired")
    superseded: list[IndexRow] = []
    if current is not None:
        rows = [row for row in index.rows() if not row.pinned]
        others = [row for row in rows if index.origin(row.key)[1] not in current]
        superseded = entries.drop(others, "evicted")
    quarantined, nbytes = entries.empty_quarantine(_QUARANTINE_SECONDS)
    nbytes += sum(row.size or 0 for row in expired + superseded)
    sizes = {name: entries.files.size(name) for name in entries.unknown_files()}
    swept = entries.sweep()
    nbytes += sum(sizes.get(name, 0) for name in swept)
    entries.scrub()
    return Collected(len(expired), len(superseded), len(swept), quarantined, nbytes)


def collect_stats(entries: Entries, manifests: Manifests) -> StoreStats:
    """Figures out of index, files and counters."""
    index = entries.index
    totals = index.totals()
    counts = entries.counters.totals()
    quarantined = entries.files.quarantined()
    now = time.time()
    return StoreStats(
        entries=totals.entries,
        nbytes=totals.nbytes or 0,
        ratio=totals.ratio,
        index_nbytes=index.database.nbytes,
        pinned=totals.pinned or 0,
        documents=index.num_documents(),
        quarantined=len(quarantined),
        quarantined_nbytes=sum(path.lstat().st_size for path in quarantined),
        oldest_s=None if totals.oldest is None else now - totals.oldest,
        newest_s=None if totals.newest is None else now - totals.newest,
        unused_s=None if totals.least_recent_use is None else now - totals.least_recent_use,
        hits=counts["hits"],
        misses=counts["misses"],
        reasons={
            name.removeprefix("miss."): count
            for name, count in sorted(counts.items())
            if name.startswith("miss.")
        },
        evicted=counts["evicted"],
        evicted_nbytes=counts["evicted_bytes"],
        total_quarantined=counts["quarantined"],
        cipher=index.meta("cipher") or None,
        fingerprints=tuple(
            FingerprintStats(name, count, size, ratio, manifests.fields(name) if name else None)
            for name, count, size, ratio in index.by_fingerprint()
        ),
    )
