"""Entries of a DiskStore as bytes: rows and files, changed together."""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sac_rag import forks
from sac_rag.stores.disk.files import Files, require_folder
from sac_rag.stores.disk.index import Index, IndexRow, NewEntry, key_of
from sac_rag.stores.entry import HEADER_LIMIT, cipher_in_header

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

# Counting every read on disk would cost more than the read.
_FLUSH_SECONDS = 30.0
_FLUSH_COUNTS = 1000


class Entries:
    """Bytes under keys, with documents and a past.

    Attributes:
        index: A row for each entry. Documents of a quarantined entry stay in it, so that
            forgetting a document deletes its bytes in quarantine too.
        files: A file for each entry, and the quarantine.
        counters: Counts that outlive the process.
    """

    def __init__(self, folder: Path, max_bytes: int, read_only: bool) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.files = Files(folder)
        if read_only:
            require_folder(self.files.folder)
        else:
            self.files.make_folders()
            self.files.require_index()
        self.index = Index(self.files.folder, max_bytes, read_only)
        self.counters = Counters(self.index, read_only)

    def publish(
        self,
        entry: NewEntry,
        data: bytes,
        cipher: Cipher | None,
        *,
        unless: Callable[[], bool] | None = None,
        patience_s: float | None = None,
    ) -> list[IndexRow]:
        """Writes an entry: the file first, then the row that makes it visible.

        Others need not wait for its bytes, and see the entry only when it is on the disk.

        Args:
            entry: What the index records of it.
            data: Its bytes.
            cipher: What they are encrypted with.
            unless: Called when no other can write: where it is true, only documents are added.
            patience_s: Longest wait for others that write; see `Database.transaction`.

        Returns:
            The rows evicted for it; its own among them if pinned entries leave no room.
        """
        index = self.index
        with self.files.written(entry.key, data, self.has_row) as name:
            with forks.held_off(), index.transaction(patience_s):
                index.require_cipher(cipher)
                obsolete = index.row(entry.key)
                evicted: list[IndexRow] = []
                if unless is not None and obsolete is not None and unless():
                    index.add_documents(entry.key, entry.documents)
                    index.add_origin(entry.key, entry.text_id, entry.fingerprint)
                    obsolete = obsolete._replace(filename=name.encode())
                else:
                    index.add(entry, name, len(data))
                    evicted = self._make_room(entry.key)
            if obsolete is not None:
                self.files.remove(obsolete)
        self._remove_files(evicted)
        return evicted

    def replace(self, row: IndexRow, data: bytes) -> bool:
        """Rewrites an entry's bytes and changes nothing else; False if it was changed meanwhile."""
        with self.files.written(row.key, data, self.has_row) as name:
            with forks.held_off(), self.index.transaction():
                is_current = row.same_entry(self.index.row(row.key))
                if is_current:
                    self.index.add(NewEntry(row.key, stored=row.stored), name, len(data))
            self.files.remove(row if is_current else row._replace(filename=name.encode()))
        return is_current

    def cipher_of(self, row: IndexRow) -> str:
        """Id of the key that an entry is encrypted with, as its header says; "" for none.

        Raises:
            CorruptEntryError: if its file or header is not as we write them.
            FileNotFoundError: if it has no file.
        """
        with self.files.opened(row) as first:
            size = row.size or 0
            return cipher_in_header(first(min(size, HEADER_LIMIT)), size)

    def refuse(self, key: str, nbytes: int) -> None:
        """Removes a key's entry because the next one alone is larger than the cap."""
        with forks.held_off(), self.index.transaction():
            row = self.index.row(key)
            if row is None:
                self.index.remove_traces(key, "evicted", keep_documents=True)
            else:
                self._remove(row, "evicted")
            self.index.add_counts({"evicted": 1, "evicted_bytes": nbytes})
        self._remove_files([] if row is None else [row])

    def drop(
        self, rows: Sequence[IndexRow], reason: str | None, patience_s: float | None = None
    ) -> list[IndexRow]:
        """Deletes entries, if they are still the ones in these rows; returns the deleted ones."""
        try:
            dropped = self._drop(rows, reason, patience_s)
        except sqlite3.OperationalError as error:
            if "full" not in str(error):
                raise
            # Even deleting takes room in the index, which the files make.
            self._remove_files(rows)
            dropped = self._drop(rows, reason, patience_s)
        self._remove_files(dropped)
        return dropped

    def quarantine(self, row: IndexRow, reason: str, patience_s: float | None = None) -> bool:
        """Moves a bad entry to quarantine; False if it is no longer the one that was read."""
        with forks.held_off(), self.index.transaction(patience_s):
            if row.key and not row.same_entry(self.index.row(row.key)):
                return False
            inline = self.index.remove(row, reason, keep_documents=True)
            if inline is None and not self.files.has(row):
                self.index.database.require_file()  # else the whole folder is gone, not one entry
                self.index.remove_traces(row.key, None)
            self.index.add_counts({"quarantined": 1})
        self.files.move_to_quarantine(row, inline)
        return True

    def forget(self, kept_keys: Mapping[str, frozenset[str]]) -> int:
        """Takes documents from entries; deletes those left without, and every trace of them.

        Args:
            kept_keys: By document id, the keys of its entries that stay; those of the same texts
                under other fingerprints stay with them.

        Returns:
            How many entries were deleted.

        Raises:
            OSError: if something could not be deleted; repeating it deletes the rest.
        """
        index = self.index
        with forks.held_off(), index.transaction():
            orphans: set[str] = set()
            for document, keys in kept_keys.items():
                same_texts = keys.union(*map(index.keys_of_same_text, keys))
                orphans.update(index.disown(document, same_texts))
            rows = []
            for key in orphans:
                # Before its row is gone: later nothing would tell whose bytes they are.
                self.files.empty_quarantine_of(key)
                row = index.row(key)
                if row is None:
                    index.remove_traces(key, "forgotten")
                else:
                    index.remove(row, "forgotten")
                    rows.append(row)
        if all(kept_keys.values()) and not orphans:
            return 0
        self._remove_files(rows)
        self.files.flush(row.name for row in rows if row.name is not None)
        self.scrub()
        return len(rows)

    def empty_quarantine(self, older_than_s: float = 0.0) -> tuple[int, int]:
        """Deletes what is in quarantine for that long; how many files, and their bytes."""
        count = nbytes = 0
        for path in self.files.quarantined():
            stat = path.lstat()
            if time.time() - stat.st_ctime >= older_than_s:
                path.unlink(missing_ok=True)
                key = path.name.partition(".")[0]
                with forks.held_off(), self.index.transaction():
                    if self.index.row(key) is None:
                        self.index.remove_traces(key, None)
                count, nbytes = count + 1, nbytes + stat.st_size
        return count, nbytes

    def scrub(self) -> None:
        """Deletes what killed writers left, and every byte of deleted rows in the index."""
        self.sweep()
        if not self.index.database.rewrite():
            raise OSError(
                errno.EBUSY,
                "what was deleted is still in the log of the index, which another program is "
                "reading; end it and collect garbage (`sac-rag store gc`)",
                os.fspath(self.folder),
            )

    def sweep(self) -> list[str]:
        """Deletes files without a row that nobody is writing; returns their names."""
        return self.files.sweep(self._known_files())

    def unknown_files(self) -> list[str]:
        """Names of files without a row; some may be about to get one."""
        return self.files.unknown(self._known_files())

    def _known_files(self) -> Callable[[str], bool]:
        """Whether a file has a row; the index is read once, and again for names without one."""
        names = {row.name for row in self.index.rows()}
        return lambda name: name in names or self.has_row(name)

    def has_row(self, name: str) -> bool:
        """Whether a file is that of its key's row."""
        row = self.index.row(key_of(name))
        return row is not None and row.name == name

    def _make_room(self, key: str) -> list[IndexRow]:
        """Removes the least recently used entries until the rest fits, and counts them."""
        evicted: list[IndexRow] = []
        while self.index.nbytes > self.max_bytes:
            row = self.index.least_recently_used(excluded=key)
            if row is None:  # all the others are pinned
                row = self.index.row(key)
                if row is None or row.pinned:
                    break
            self._remove(row, "evicted")
            evicted.append(row)
        if evicted:
            nbytes = sum(row.size or 0 for row in evicted)
            self.index.add_counts({"evicted": len(evicted), "evicted_bytes": nbytes})
        return evicted

    def _drop(
        self, rows: Iterable[IndexRow], reason: str | None, patience_s: float | None
    ) -> list[IndexRow]:
        with forks.held_off(), self.index.transaction(patience_s):
            current = [row for row in rows if row.same_entry(self.index.row(row.key))]
            for row in current:
                self._remove(row, reason)
        return current

    def _remove(self, row: IndexRow, reason: str | None) -> None:
        self.index.remove(row, reason)
        # Without the documents nothing tells whose quarantined bytes are.
        self.files.empty_quarantine_of(row.key)

    def _remove_files(self, rows: Iterable[IndexRow]) -> None:
        for row in rows:
            self.files.remove(row)


class Counters:
    """Counts in memory, added to those in the index now and then, and when the store is closed.

    A killed process loses its counts since the last time. Shared by threads; after a fork, the
    child counts from zero.
    """

    def __init__(self, index: Index, read_only: bool) -> None:
        self._index = index
        self._read_only = read_only
        self._lock = forks.lock(self, "_lock")
        self._pending: Counter[str] = Counter()
        self._flushed = time.monotonic()
        self._pid = os.getpid()

    def count(self, name: str) -> None:
        """Counts one more."""
        with self._lock:
            self._of_this_process()[name] += 1
            is_due = (
                self._pending.total() >= _FLUSH_COUNTS
                or time.monotonic() - self._flushed > _FLUSH_SECONDS
            )
        if is_due:
            self.flush()

    def flush(self) -> None:
        """Adds the counts to the index, if it can be written just now."""
        with self._lock:
            pending, self._pending = self._of_this_process(), Counter()
            self._flushed = time.monotonic()
        if self._read_only or not pending:
            return
        is_written = False
        try:
            is_written = self._index.database.best_effort(
                lambda: self._index.add_counts(dict(pending))
            )
        finally:
            if not is_written:
                with self._lock:
                    self._pending.update(pending)

    def totals(self) -> Counter[str]:
        """All counts: those in the index, of other processes too, and the pending ones."""
        totals = Counter(self._index.counts())
        with self._lock:
            totals.update(self._of_this_process())
        return totals

    def _of_this_process(self) -> Counter[str]:
        if self._pid != os.getpid():
            self._pid, self._pending = os.getpid(), Counter()
        return self._pending
