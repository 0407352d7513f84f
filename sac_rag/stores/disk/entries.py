"""Entries of a DiskStore: their rows and files, changed together. Knows nothing of AnchorKVs."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sac_rag.stores.disk.counters import Tally
from sac_rag.stores.disk.documents import Documents
from sac_rag.stores.disk.files import Files
from sac_rag.stores.disk.index import Index, Row
from sac_rag.stores.disk.readonly import ReadOnlyIndex
from sac_rag.stores.disk.tombstones import Departed

logger = logging.getLogger(__name__)


class Extent(NamedTuple):
    """How much of a chunk an entry holds.

    Attributes:
        num_tokens: Source tokens in the chunk.
        num_entries: KV entries of all heads together.
        num_heads: KV heads of all layers together.
    """

    num_tokens: int
    num_entries: int
    num_heads: int


class Entries:
    """Bytes under keys, with documents and a past.

    Attributes:
        index: A row for each entry.
        files: A file for each entry, and what was set aside of bad ones.
        documents: Whose an entry is. Those of an entry that was set aside are kept, so that to
            forget one finds its bytes in quarantine too.
        departed: Why entries are gone.
        tally: Counts that outlive the process.
    """

    def __init__(self, folder: Path, max_bytes: int, read_only: bool) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.files = Files(folder)
        if not read_only:
            self.files.make()
        self.index = (
            ReadOnlyIndex(self.files.folder) if read_only else Index(self.files.folder, max_bytes)
        )
        self.documents = Documents(self.index)
        self.departed = Departed(self.index)
        self.tally = Tally(self.index, read_only)

    def publish(
        self,
        key: str,
        data: bytes,
        extent: Extent,
        documents: Iterable[str] = (),
        text_id: str | None = None,
        fingerprint: str | None = None,
        unless: Callable[[], bool] | None = None,
    ) -> list[Row]:
        """Writes an entry: the file first, and the row that makes it seen when it is on the disk.

        Others need not wait for its bytes, and until its row is there nobody sees it.

        Args:
            key: A lower-case hex digest.
            data: The entry's bytes.
            extent: How much of the chunk they hold.
            documents: Ids to add to those of the key.
            text_id: The same for the same text whatever the fingerprint.
            fingerprint: What made the KV.
            unless: Asked when no other can write: where it is true, only the documents are added.

        Returns:
            What was evicted for it; its own row among them if pinned entries leave no room.
        """
        with self.files.written(key, data) as name:
            with self.index.transaction():
                self.documents.add(key, documents)
                superseded = self.index.row(key)
                if unless is not None and superseded is not None and unless():
                    superseded = superseded._replace(filename=name.encode())
                    evicted = []
                else:
                    self.index.insert(key, name, len(data))
                    self.note_origin(key, extent, text_id, fingerprint)
                    self.departed.returned(key)
                    evicted = self._make_room(key)
            if superseded is not None:
                self.files.remove(superseded)
        self._remove(evicted)
        return evicted

    def replace(self, row: Row, data: bytes) -> bool:
        """Writes an entry's bytes anew, everything else as it was; False if it has changed."""
        with self.files.written(row.key, data) as name:
            with self.index.transaction():
                current = row.same_entry(self.index.row(row.key))
                if current:
                    self.index.insert(row.key, name, len(data), row.stored)
            self.files.remove(row if current else row._replace(filename=name.encode()))
        return current

    def refuse(self, key: str, nbytes: int) -> None:
        """An entry alone is larger than the cap: neither it nor the one there was stays."""
        with self.index.transaction():
            row = self.index.row(key)
            if row is not None:
                self._delete(row, None)
            self.departed.note(key, "evicted")
            self.tally.add({"evicted": 1, "evicted_bytes": nbytes})
        self._remove([] if row is None else [row])

    def drop(self, rows: Sequence[Row], reason: str | None) -> list[Row]:
        """Deletes entries, if they are still the ones given; returns those."""
        try:
            gone = self._drop(rows, reason)
        except sqlite3.OperationalError as error:
            if "full" not in str(error):
                raise
            # Even deleting takes room in the index. What is to go anyway makes some.
            self._remove(rows)
            gone = self._drop(rows, reason)
        self._remove(gone)
        return gone

    def set_aside(self, row: Row, reason: str) -> bool:
        """Moves a bad entry to quarantine; False if it is no longer the one that was read."""
        with self.index.transaction():
            if row.key and not row.same_entry(self.index.row(row.key)):
                return False
            inline = self.index.delete(row)
            if inline is None and not self.files.has(row):
                self.documents.drop_key(row.key)
            self._drop_origin(row.key)
            self.departed.note(row.key, reason)
            self.tally.add({"quarantined": 1})
        self.files.set_aside(row, inline)
        return True

    def forget(self, kept: Mapping[str, frozenset[str]]) -> int:
        """Takes documents from entries; deletes those left without, and every trace of them.

        Args:
            kept: By document id, the keys of entries that stay its; those of the same texts under
                other fingerprints stay with them.

        Returns:
            How many entries were deleted.

        Raises:
            OSError: if something could not be deleted; doing it again goes on.
        """
        with self.index.transaction():
            keys: set[str] = set()
            for name, own in kept.items():
                keep = own.union(*map(self._of_same_text, own))
                keys.update(self.documents.disown(name, keep))
            rows = [row for key in keys if (row := self.index.row(key)) is not None]
            for key in keys:
                # Before the rows are gone: later nobody would know whose it was.
                self.files.discard(key)
                self._drop_origin(key)
                self.departed.note(key, "forgotten")
            for row in rows:
                self.index.delete(row)
        if all(kept.values()) and not keys:
            return 0
        self._remove(rows)
        self.files.flush(row.name for row in rows if row.name is not None)
        self.scrub()
        return len(rows)

    def empty_quarantine(self, older_than_s: float = 0.0) -> tuple[int, int]:
        """Deletes what was set aside so long ago, and whose it was; how many, and their bytes."""
        count = nbytes = 0
        for path in self.files.quarantined():
            found = path.lstat()
            if time.time() - found.st_ctime >= older_than_s:
                path.unlink(missing_ok=True)
                key = path.name.partition(".")[0]
                with self.index.transaction():
                    if self.index.row(key) is None:
                        self.documents.drop_key(key)
                count, nbytes = count + 1, nbytes + found.st_size
        return count, nbytes

    def scrub(self) -> None:
        """Deletes what killed writers left, and every byte of what is deleted from the index."""
        self.sweep()
        if not self.index.rewrite():
            raise OSError(
                errno.EBUSY,
                "what was deleted is still in the log of the index, which another program is "
                "reading; end it and collect garbage (`sac-rag store gc`)",
                os.fspath(self.folder),
            )

    def sweep(self) -> list[str]:
        """Deletes files without a row that nobody is writing; returns their names."""
        return self.files.sweep(self._asked_once())

    def strangers(self) -> list[str]:
        """Names of files without a row; some may be about to get one."""
        return self.files.strangers(self._asked_once())

    def _asked_once(self) -> Callable[[str], bool]:
        """Whether a file has a row, for many files; those without are asked for each by itself."""
        names = {row.name for row in self.index.rows()}
        return lambda name: name in names or self._knows(name)

    def _knows(self, name: str) -> bool:
        row = self.index.row(name.rpartition("/")[2].partition("-")[0])
        return row is not None and row.name == name

    def note_origin(
        self, key: str, extent: Extent, text_id: str | None, fingerprint: str | None
    ) -> None:
        """Remembers how much of what text an entry holds, and as whose compression, if known."""
        self.index.sql(
            "INSERT INTO Origin (key, num_tokens, num_entries, num_heads, text_id, fingerprint)"
            " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET"
            " num_tokens = excluded.num_tokens, num_entries = excluded.num_entries,"
            " num_heads = excluded.num_heads, text_id = IFNULL(excluded.text_id, text_id),"
            " fingerprint = IFNULL(excluded.fingerprint, fingerprint)",
            (key, *extent, text_id, fingerprint),
        )

    def origin(self, key: str) -> tuple[str | None, str | None]:
        """The text id and the fingerprint noted for an entry."""
        select = "SELECT text_id, fingerprint FROM Origin WHERE key = ?"
        text_id, fingerprint = self.index.sql(select, (key,)).fetchone() or (None, None)
        return text_id, fingerprint

    def extent(self, key: str) -> Extent | None:
        """How much of a chunk an entry holds; None if there is none, or it is of an old format."""
        columns = ", ".join(f"CAST({name} AS INTEGER)" for name in Extent._fields)
        select = f"SELECT {columns} FROM Origin WHERE key = ?"  # noqa: S608 (names of our own)
        found = self.index.sql(select, (key,)).fetchone() or (None,)
        return None if None in found else Extent(*found)

    def other_fingerprints(self, text_id: str, but: str | None) -> list[str]:
        """Fingerprints under which a text is there, the last stored first."""
        select = (
            "SELECT fingerprint FROM Origin JOIN Cache USING (key) WHERE text_id = ?"
            " AND fingerprint IS NOT NULL AND fingerprint IS NOT ? ORDER BY store_time DESC"
        )
        return [str(name) for (name,) in self.index.sql(select, (text_id, but)).fetchall()]

    def _of_same_text(self, key: str) -> set[str]:
        text_id, _ = self.origin(key)
        select = "SELECT key FROM Origin WHERE text_id = ?"
        return {key for (key,) in self.index.sql(select, (text_id,)).fetchall()}

    def _make_room(self, key: str) -> list[Row]:
        """Deletes what was used longest ago until the rest fits, and counts it."""
        evicted: list[Row] = []
        while self.index.number("size") > self.max_bytes:
            row = self.index.least_recently_used(but=key)
            if row is None:  # all the others are pinned
                row = self.index.row(key)
                if row is None or row.pinned:
                    break
            self._delete(row, "evicted")
            evicted.append(row)
        if evicted:
            nbytes = sum(row.size or 0 for row in evicted)
            self.tally.add({"evicted": len(evicted), "evicted_bytes": nbytes})
        return evicted

    def _drop(self, rows: Iterable[Row], reason: str | None) -> list[Row]:
        with self.index.transaction():
            gone = [row for row in rows if row.same_entry(self.index.row(row.key))]
            for row in gone:
                self._delete(row, reason)
        return gone

    def _delete(self, row: Row, reason: str | None) -> None:
        self.index.delete(row)
        self.documents.drop_key(row.key)
        self._drop_origin(row.key)
        if reason is not None:
            self.departed.note(row.key, reason)
        # With the documents goes what tells whose quarantined bytes are.
        self.files.discard(row.key)

    def _drop_origin(self, key: str) -> None:
        self.index.sql("DELETE FROM Origin WHERE key = ?", (key,))

    def _remove(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.files.remove(row)
