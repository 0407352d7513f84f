"""Keeping a DiskStore in order: check, repair, collect garbage. Knows nothing of AnchorKVs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from sac_rag.errors import CorruptEntry
from sac_rag.stores.entries import Entries
from sac_rag.stores.index import Row

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
        except CorruptEntry as error:
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
) -> Iterator[tuple[Row, CorruptEntry]]:
    for row in entries.index.rows():
        try:
            read(row)
        except CorruptEntry as bad:
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
