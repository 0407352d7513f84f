"""Check and repair of a DiskStore: entries against their checksums, the index against the files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeAlias

from sac_rag import forks
from sac_rag.errors import CorruptEntryError
from sac_rag.stores.disk.entries import Entries
from sac_rag.stores.disk.index import Index, IndexRow
from sac_rag.stores.disk.maintenance import Progress

Reader: TypeAlias = Callable[[IndexRow], object]


def verify(entries: Entries, read: Reader, on_progress: Progress | None = None) -> list[str]:
    """Reads every entry; a sentence for each bad one."""
    return [f"{_name(row)}: {bad.detail}" for row, bad in _bad(entries, read, on_progress)]


def check(
    entries: Entries, read: Reader, fix: bool, on_progress: Progress | None = None
) -> list[str]:
    """Reads every entry and compares the index with itself and with the files."""
    index = entries.index
    problems = _check_integrity(index, fix)
    for row in index.rows():
        try:
            index.documents(row.key, strict=True)
        except CorruptEntryError as error:
            problems.append(f"{_name(row)}: {error.detail}")
            if fix:
                with forks.held_off(), index.transaction():
                    index.drop_unreadable_documents(row.key)
    if index.next_cipher is not None:
        problems.append(
            "a change of the key was begun and not finished: `sac-rag store rekey` with the new "
            "key finishes it, and with the old one as the new one takes it back"
        )
    for row, bad in _bad(entries, read, on_progress):
        problems.append(f"{_name(row)}: {bad.detail}")
        # In the midst of a change of the key, nothing is wrong with an entry in the new one.
        if fix and (bad.reason != "secret" or index.has_one_cipher):
            entries.quarantine(row, bad.reason)
    for name in entries.unknown_files():
        problems.append(f"unknown file: {entries.files.folder / name}")
    if fix:
        entries.scrub()
    quarantined = {path.name.partition(".")[0] for path in entries.files.quarantined()}
    return problems + _check_dangling(index, quarantined, fix) + _check_totals(index, fix)


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


def _check_integrity(index: Index, fix: bool) -> list[str]:
    """Problems that SQLite finds in the file."""
    rows = index.database.sql("PRAGMA integrity_check")
    problems = [f"index: {message}" for (message,) in rows if message != "ok"]
    if problems and fix:
        index.database.sql("REINDEX")
    return problems


def _check_dangling(index: Index, quarantined: Collection[str], fix: bool) -> list[str]:
    """What is recorded of keys that have neither a row nor bytes in quarantine."""
    problems = []
    for table in ("Owner", "Origin"):
        keys = "SELECT key FROM Cache WHERE key IS NOT NULL"
        select = f"SELECT DISTINCT CAST(key AS BLOB) FROM {table} WHERE key NOT IN ({keys})"  # noqa: S608
        for (key,) in index.database.sql(select):
            name = key.decode(errors="replace")
            if name in quarantined and table == "Owner":
                continue
            problems.append(f"{name}: noted in {table}, and not there")
            if fix:
                with forks.held_off(), index.transaction():
                    delete = f"DELETE FROM {table} WHERE CAST(key AS BLOB) = ?"  # noqa: S608
                    index.database.sql(delete, (key,))
    return problems


def _check_totals(index: Index, fix: bool) -> list[str]:
    """Totals of the triggers that are not those of the rows."""
    [(count, size)] = index.database.sql("SELECT COUNT(*), TOTAL(size) FROM Cache")
    problems = []
    for name, actual in (("count", count), ("size", int(size))):
        recorded = index.noted(name)
        if recorded != actual:
            problems.append(f"the {name} of all entries is noted as {recorded}, is {actual}")
            if fix:
                with forks.held_off(), index.transaction():
                    update = "UPDATE Settings SET value = ? WHERE key = ?"
                    index.database.sql(update, (actual, name))
    return problems


def _name(row: IndexRow) -> str:
    return row.key or f"row {row.rowid}"
