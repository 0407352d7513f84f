"""What a DiskStore tells whoever runs it. Knows nothing of how it is shown."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sac_rag.stores.entries import Entries
from sac_rag.stores.manifests import Manifests


@dataclass(frozen=True)
class FingerprintStats:
    """Entries of one fingerprint.

    Attributes:
        fingerprint: None for entries that were put without one.
        entries: How many.
        nbytes: Their bytes.
        ratio: Source tokens per KV entry, mean over heads and chunks; None if not known.
        fields: What it is made of; None if that was not noted.
    """

    fingerprint: str | None
    entries: int
    nbytes: int
    ratio: float | None
    fields: dict[str, str] | None


@dataclass(frozen=True)
class StoreStats:
    """A store at one moment, and what was counted since it was made.

    Attributes:
        entries: How many there are.
        nbytes: Their bytes.
        ratio: Source tokens per KV entry, mean over heads and chunks; None if not known.
        index_nbytes: Bytes of the index on top.
        pinned: Entries that are never evicted.
        documents: Documents that have entries.
        quarantined: Bad entries that were set aside and are still there.
        quarantined_nbytes: Their bytes.
        oldest_s: Seconds since the oldest entry was stored; None if there is none.
        newest_s: Seconds since the newest one was.
        unused_s: Seconds since the entry that would be evicted next was last used.
        hits: Entries read.
        misses: Keys that were asked for and not found.
        reasons: Misses by their reason, as far as it was asked for.
        evicted: Entries dropped, or not kept, for want of room.
        evicted_nbytes: Their bytes.
        set_aside: Bad entries that were ever come upon.
        cipher: Public id of the key that encrypts the store; None if it is in plain.
        fingerprints: What the entries were made by, most entries first.
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
    set_aside: int
    cipher: str | None
    fingerprints: tuple[FingerprintStats, ...]

    @property
    def hit_rate(self) -> float | None:
        """Hits among all that were asked for; None if nothing was."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


# Of the entries whose extent is known. A sum of integers could overflow, a TOTAL of floats cannot.
_RATIO = "TOTAL(num_tokens * num_heads) / TOTAL(num_entries)"


def collect(entries: Entries, manifests: Manifests) -> StoreStats:
    """Asks index and files."""
    index = entries.index
    count, nbytes, ratio, pinned, oldest, newest, unused = index.sql(
        f"SELECT COUNT(*), SUM(size), {_RATIO}, SUM(tag IS NOT NULL), MIN(store_time),"  # noqa: S608
        " MAX(store_time), MIN(CASE WHEN tag IS NULL THEN access_time END)"
        " FROM Cache LEFT JOIN Origin USING (key)"
    ).fetchone()
    by_fingerprint = index.sql(
        f"SELECT fingerprint, COUNT(*), SUM(size), {_RATIO} FROM Cache"  # noqa: S608
        " LEFT JOIN Origin USING (key) GROUP BY fingerprint ORDER BY COUNT(*) DESC"
    ).fetchall()
    counts = entries.tally.totals()
    quarantined = entries.files.quarantined()
    now = time.time()
    return StoreStats(
        entries=count,
        nbytes=nbytes or 0,
        ratio=ratio,
        index_nbytes=sum(
            path.stat().st_size for path in index.path.parent.glob(f"{index.path.name}*")
        ),
        pinned=pinned or 0,
        documents=entries.documents.count(),
        quarantined=len(quarantined),
        quarantined_nbytes=sum(path.lstat().st_size for path in quarantined),
        oldest_s=None if oldest is None else now - oldest,
        newest_s=None if newest is None else now - newest,
        unused_s=None if unused is None else now - unused,
        hits=counts["hits"],
        misses=counts["misses"],
        reasons={
            name.removeprefix("miss."): number
            for name, number in sorted(counts.items())
            if name.startswith("miss.")
        },
        evicted=counts["evicted"],
        evicted_nbytes=counts["evicted_bytes"],
        set_aside=counts["quarantined"],
        cipher=index.meta("cipher") or None,
        fingerprints=tuple(
            FingerprintStats(name, n, size or 0, ratio, manifests.fields(name) if name else None)
            for name, n, size, ratio in by_fingerprint
        ),
    )
