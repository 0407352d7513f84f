"""Maintenance of a DiskStore: check and repair, garbage collection, encryption keys, figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sac_rag.errors import CorruptEntryError
from sac_rag.stores.disk.entries import Entries
from sac_rag.stores.disk.folder import Manifests
from sac_rag.stores.disk.index import IndexRow
from sac_rag.stores.entry import reencrypt

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

Progress: TypeAlias = Callable[[int], None]
Reader: TypeAlias = Callable[[IndexRow], object]

_QUARANTINE_SECONDS = 7 * 24 * 3600.0
_UNENCRYPTED = ""  # the id that stands for no key


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


def verify(entries: Entries, read: Reader, on_progress: Progress | None = None) -> list[str]:
    """Reads every entry; a sentence for each bad one."""
    return [f"{_name(row)}: {bad.detail}" for row, bad in _bad(entries, read, on_progress)]


def check(
    entries: Entries, read: Reader, fix: bool, on_progress: Progress | None = None
) -> list[str]:
    """Reads every entry and compares the index with itself and with the files."""
    index = entries.index
    problems = index.check_integrity(fix)
    for row in index.rows():
        try:
            index.documents(row.key, strict=True)
        except CorruptEntryError as error:
            problems.append(f"{_name(row)}: {error.detail}")
            if fix:
                with index.database.transaction():
                    index.drop_unreadable_documents(row.key)
    for row, bad in _bad(entries, read, on_progress):
        problems.append(f"{_name(row)}: {bad.detail}")
        if fix and bad.reason != "secret":
            entries.quarantine(row, bad.reason)
    for name in entries.unknown_files():
        problems.append(f"unknown file: {entries.files.folder / name}")
    if fix:
        entries.scrub()
    quarantined = {path.name.partition(".")[0] for path in entries.files.quarantined()}
    return problems + index.check_dangling(quarantined, fix) + index.check_totals(fix)


def collect_garbage(
    entries: Entries,
    is_expired: Callable[[IndexRow], bool],
    keep_fingerprints: Iterable[str] | None = None,
) -> Collected:
    """Deletes entries and files that nobody will ask for."""
    index = entries.index
    expired = entries.drop([row for row in index.rows() if is_expired(row)], "expired")
    superseded: list[IndexRow] = []
    if keep_fingerprints is not None:
        current = {None, *keep_fingerprints}
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


def unlock(entries: Entries, cipher: Cipher | None, read_only: bool) -> None:
    """Checks that a store is opened with its key; a new store takes the one it is opened with.

    Raises:
        ValueError: if it has another.
    """
    key_id = _id(cipher)
    if not read_only and entries.index.meta("cipher") is None:
        # Of several that open a new store at once, the first decides.
        entries.index.set_meta("cipher", key_id, replace=False)
    recorded = entries.index.meta("cipher") or _UNENCRYPTED
    if key_id != recorded:
        raise ValueError(
            f"{entries.folder} is {_described(recorded)}, and was opened with "
            f"{f'key {key_id}' if key_id else 'no key'}; give its own, or change it with "
            "`sac-rag store rekey`"
        )
    entries.index.cipher = cipher


def rekey(
    entries: Entries, old: Cipher | None, new: Cipher | None, on_progress: Progress | None = None
) -> int:
    """Re-encrypts every entry, one by one, and only then records the store's new key."""
    if _id(old) == _id(new):
        return 0
    index = entries.index
    count = 0
    for row in index.rows():
        current: IndexRow | None = row
        while current is not None:
            try:
                data = reencrypt(entries.files.read(current), old, new)
            except FileNotFoundError:
                pass
            except CorruptEntryError as problem:
                # With reason "secret" it was re-encrypted by a run that was killed.
                if problem.reason == "secret" or entries.quarantine(current, problem.reason):
                    break
            else:
                if entries.replace(current, data):
                    count += 1
                    break
            latest = index.row(row.key)  # rewritten meanwhile?
            current = None if current.same_entry(latest) else latest
        if on_progress is not None:
            on_progress(row.size or 0)
    with index.database.transaction():
        index.reencrypt_documents(new)
        index.set_meta("cipher", _id(new))
    entries.empty_quarantine()  # it still has the old key, or none
    entries.scrub()
    return count


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


def _bad(
    entries: Entries, read: Reader, on_progress: Progress | None
) -> Iterator[tuple[IndexRow, CorruptEntryError]]:
    for row in entries.index.rows():
        try:
            read(row)
        except CorruptEntryError as bad:
            if not row.key or row.same_entry(entries.index.row(row.key)):
                yield row, bad
        if on_progress is not None:
            on_progress(row.size or 0)


def _name(row: IndexRow) -> str:
    return row.key or f"row {row.rowid}"


def _id(cipher: Cipher | None) -> str:
    return _UNENCRYPTED if cipher is None else cipher.id


def _described(key_id: object) -> str:
    return "not encrypted" if key_id == _UNENCRYPTED else f"encrypted with key {key_id!s:.20}"
