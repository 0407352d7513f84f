"""Rebuilds the index of a DiskStore from the headers of its entries."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sac_rag import forks
from sac_rag.errors import CorruptEntryError
from sac_rag.stores.disk.database import SIDE_FILES, Database
from sac_rag.stores.disk.files import Files, make_folder
from sac_rag.stores.disk.folder import open_folder
from sac_rag.stores.disk.index import Extent, Index, IndexRow, NewEntry, key_id
from sac_rag.stores.disk.maintenance import Progress
from sac_rag.stores.entry import HEADER_LIMIT, described_by

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

_NEW = "index.new"


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuilt index has.

    Attributes:
        entries: Number of entries.
        nbytes: Their bytes.
        left_out: A sentence for each file that is no entry that can be read. It stays where it is
            until garbage is collected.
    """

    entries: int
    nbytes: int
    left_out: tuple[str, ...]


def rebuild(
    folder: Path, max_bytes: int, cipher: Cipher | None, on_progress: Progress | None = None
) -> Rebuilt:
    """Makes a store's index again, in place of a lost or damaged one; see `DiskStore.rebuild`."""
    open_folder(folder)
    files = Files(folder)
    files.make_folders()
    old = files.folder / "cache.db"
    if _is_intact(old):
        raise ValueError(
            f"the index of {folder} is intact, and has more than its entries tell: documents, "
            "pins, ages; `sac-rag store check --fix` repairs what else may be wrong"
        )
    place = folder / _NEW
    shutil.rmtree(place, ignore_errors=True)
    make_folder(place, parents=False)
    index = Index(place, max_bytes, read_only=False)
    try:
        index.set_meta("cipher", key_id(cipher))
        index.cipher = cipher
        left_out = _fill(index, files, cipher, on_progress)
        rebuilt = Rebuilt(index.num_entries, index.nbytes, tuple(left_out))
        index.database.rewrite()
    finally:
        index.database.close()
    if not rebuilt.entries and left_out:
        raise ValueError(f"none of the entries of {folder} can be read, the first: {left_out[0]}")
    for suffix in SIDE_FILES[1:]:
        old.with_name(old.name + suffix).unlink(missing_ok=True)
    (place / old.name).replace(old)
    shutil.rmtree(place)
    return rebuilt


def _fill(
    index: Index, files: Files, cipher: Cipher | None, on_progress: Progress | None
) -> list[str]:
    """Enters every entry that can be read; a sentence for each file that cannot."""
    left_out = []
    with forks.held_off(), index.transaction():
        for key, name, modified in _oldest_first(files):
            size = files.size(name)
            try:
                extent, fingerprint = _described(files, key, name, size, cipher)
            except (CorruptEntryError, OSError) as error:
                left_out.append(f"{name}: {getattr(error, 'detail', error)}")
                continue
            finally:
                if on_progress is not None:
                    on_progress(size)
            if index.row(key) is not None:
                left_out.append(f"another entry of {key}, which is newer, takes its place")
            entry = NewEntry(key, extent, fingerprint=fingerprint or None, stored=modified)
            index.add(entry, name, size)
    return left_out


def _oldest_first(files: Files) -> Iterator[tuple[str, str, float]]:
    """Key, name and time of each file. A killed writer may have left an older one of its key."""
    dated = []
    for key, name in files.entry_files():
        with contextlib.suppress(OSError):
            dated.append(((files.folder / name).lstat().st_mtime, key, name))
    for modified, key, name in sorted(dated):
        yield key, name, min(modified, time.time())


def _described(
    files: Files, key: str, name: str, size: int, cipher: Cipher | None
) -> tuple[Extent, str]:
    row = IndexRow.of_file(key, name, size)
    with files.opened(row) as first:
        head = first(size if cipher is not None else min(size, HEADER_LIMIT))
        num_tokens, (layers, kv_heads, entries, _), fingerprint = described_by(
            key, head, size, cipher
        )
    return Extent(num_tokens, entries, layers * kv_heads), fingerprint


def _is_intact(path: Path) -> bool:
    if not path.is_file():
        return False
    database = Database(path)
    try:
        tables = {name for (name,) in database.sql("SELECT name FROM sqlite_master")}
        problems = database.sql("PRAGMA quick_check")
        return {"Cache", "Owner", "Origin"} <= tables and problems == [("ok",)]
    except sqlite3.DatabaseError:
        return False
    finally:
        database.close()
