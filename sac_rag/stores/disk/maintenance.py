"""Keeping a DiskStore in order: check, repair, collect garbage. Knows nothing of AnchorKVs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sac_rag.errors import CorruptEntryError
from sac_rag.stores.disk.documents import Plain
from sac_rag.stores.disk.entries import Entries
from sac_rag.stores.disk.index import Row
from sac_rag.stores.entry import reencrypt

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher
import time

from sac_rag.stores.disk.folder import Manifests

Progress: TypeAlias = Callable[[int], None]
Reads: TypeAlias = Callable[[Row], object]

_QUARANTINE_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Collected:
    """What was deleted because nobody will ask for it.

    Attributes:
        expired: Entries older than the store's max_age_s.
        superseded: Entries of fingerprints that were not to be kept.
        leftovers: Files of killed writers.
        quarantined: Bad entries that had been set aside long enough.
        nbytes: Bytes of them all.
    """

    expired: int
    superseded: int
    leftovers: int
    quarantined: int
    nbytes: int


def verify(entries: Entries, read: Reads, on_progress: Progress | None = None) -> list[str]:
    """Reads every entry; a sentence for each that is bad."""
    return [f"{_name(row)}: {bad.detail}" for row, bad in _bad(entries, read, on_progress)]


def check(
    entries: Entries, read: Reads, fix: bool, on_progress: Progress | None = None
) -> list[str]:
    """Reads every entry and compares the index with itself and with the files."""
    problems = _integrity(entries)
    if problems and fix:
        entries.index.sql("REINDEX")
    for row in entries.index.rows():
        try:
            entries.documents.of(row.key, strict=True)
        except CorruptEntryError as error:
            problems.append(f"{_name(row)}: {error.detail}")
            if fix:
                with entries.index.transaction():
                    entries.documents.drop_unreadable(row.key)
    for row, bad in _bad(entries, read, on_progress):
        problems.append(f"{_name(row)}: {bad.detail}")
        if fix and bad.reason != "key":
            entries.set_aside(row, bad.reason)
    for name in entries.strangers():
        problems.append(f"unknown file: {entries.files.folder / name}")
    if fix:
        entries.scrub()
    return problems + _dangling(entries, fix) + _miscounted(entries, fix)


def gc(
    entries: Entries,
    is_expired: Callable[[Row], bool],
    keep_fingerprints: Iterable[str] | None = None,
) -> Collected:
    """Deletes what nobody will ask for."""
    expired = entries.drop([row for row in entries.index.rows() if is_expired(row)], "expired")
    superseded: list[Row] = []
    if keep_fingerprints is not None:
        kept = {None, *keep_fingerprints}
        rows = [row for row in entries.index.rows() if not row.pinned]
        others = [row for row in rows if entries.origin(row.key)[1] not in kept]
        superseded = entries.drop(others, "evicted")
    quarantined, nbytes = entries.empty_quarantine(_QUARANTINE_SECONDS)
    nbytes += sum(row.size or 0 for row in expired + superseded)
    sizes = {name: entries.files.size(name) for name in entries.strangers()}
    swept = entries.sweep()
    nbytes += sum(sizes.get(name, 0) for name in swept)
    entries.scrub()
    return Collected(len(expired), len(superseded), len(swept), quarantined, nbytes)


def _bad(
    entries: Entries, read: Reads, on_progress: Progress | None
) -> Iterator[tuple[Row, CorruptEntryError]]:
    for row in entries.index.rows():
        try:
            read(row)
        except CorruptEntryError as bad:
            if not row.key or row.same_entry(entries.index.row(row.key)):
                yield row, bad
        if on_progress is not None:
            on_progress(row.size or 0)


def _integrity(entries: Entries) -> list[str]:
    rows = entries.index.sql("PRAGMA integrity_check").fetchall()
    return [f"index: {message}" for (message,) in rows if message != "ok"]


def _dangling(entries: Entries, fix: bool) -> list[str]:
    """What is noted for keys that are neither there nor in quarantine."""
    aside = {path.name.partition(".")[0] for path in entries.files.quarantined()}
    problems = []
    for table in ("Owner", "Origin"):
        there = "SELECT key FROM Cache WHERE key IS NOT NULL"
        select = f"SELECT DISTINCT CAST(key AS BLOB) FROM {table} WHERE key NOT IN ({there})"  # noqa: S608
        for (key,) in entries.index.sql(select).fetchall():
            name = key.decode(errors="replace")
            if name in aside and table == "Owner":
                continue
            problems.append(f"{name}: noted in {table}, and not there")
            if fix:
                with entries.index.transaction():
                    delete = f"DELETE FROM {table} WHERE CAST(key AS BLOB) = ?"  # noqa: S608
                    entries.index.sql(delete, (key,))
    return problems


def _miscounted(entries: Entries, fix: bool) -> list[str]:
    count, size = entries.index.sql("SELECT COUNT(*), TOTAL(size) FROM Cache").fetchone()
    problems = []
    for name, is_so in (("count", count), ("size", int(size))):
        noted = entries.index.number(name)
        if noted != is_so:
            problems.append(f"the {name} of all entries is noted as {noted}, is {is_so}")
            if fix:
                update = "UPDATE Settings SET value = ? WHERE key = ?"
                with entries.index.transaction():
                    entries.index.sql(update, (is_so, name))
    return problems


def _name(row: Row) -> str:
    return row.key or f"row {row.rowid}"


_PLAIN = ""  # the id that stands for no key


def unlock(entries: Entries, cipher: Cipher | None, read_only: bool) -> None:
    """Sees that a store is opened with its own key; a new store takes the one that is given.

    Raises:
        ValueError: if it has another.
    """
    given = _id(cipher)
    if not read_only and entries.index.meta("cipher") is None:
        # Of several that open a new store at once, the first decides.
        entries.index.sql("INSERT OR IGNORE INTO Meta VALUES ('cipher', ?)", (given,))
    own = entries.index.meta("cipher") or _PLAIN
    if given != own:
        raise ValueError(
            f"{entries.folder} is {_described(own)}, and was opened with "
            f"{f'key {given}' if given else 'no key'}; give its own, or change it with "
            "`sac-rag store rekey`"
        )
    entries.documents.sealing = Plain() if cipher is None else cipher


def rekey(
    entries: Entries, old: Cipher | None, new: Cipher | None, on_progress: Progress | None = None
) -> int:
    """Encrypts every entry anew, one by one, and only then says that the store has another key."""
    if _id(old) == _id(new):
        return 0
    done = 0
    for row in entries.index.rows():
        found: Row | None = row
        while found is not None:
            try:
                data = reencrypt(entries.files.read(found), old, new)
            except FileNotFoundError:
                pass
            except CorruptEntryError as problem:
                # With reason "key" it is done already, by a run that was killed.
                if problem.reason == "key" or entries.set_aside(found, problem.reason):
                    break
            else:
                if entries.replace(found, data):
                    done += 1
                    break
            newer = entries.index.row(row.key)  # written anew meanwhile?
            found = None if found.same_entry(newer) else newer
        if on_progress is not None:
            on_progress(row.size or 0)
    with entries.index.transaction():
        entries.documents.reseal(Plain() if new is None else new)
        entries.index.set_meta("cipher", _id(new))
    entries.empty_quarantine()  # which is encrypted as it was, or not at all
    entries.scrub()
    return done


def _id(cipher: Cipher | None) -> str:
    return _PLAIN if cipher is None else cipher.id


def _described(key: object) -> str:
    return f"encrypted with key {key!s:.20}" if key != _PLAIN else "not encrypted"


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
