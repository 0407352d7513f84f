"""Values of a DiskStore: read and written as entries, with their ages and the reasons of misses."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sac_rag import forks
from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.stores.background import Background
from sac_rag.stores.base import DocumentStore, Wanted, strings
from sac_rag.stores.disk import keys
from sac_rag.stores.disk.entries import Entries
from sac_rag.stores.disk.folder import FORMAT, Manifests, open_folder, write_format
from sac_rag.stores.disk.index import Extent, IndexRow, NewEntry, key_id
from sac_rag.stores.entry import decode_first, encode

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

logger = logging.getLogger(__name__)

# More are left out: their entries are read when they are asked for.
_MOST_PREFETCHES = 64


class StoredValues(DocumentStore):
    """What DiskStore's public methods do; see there for the arguments and attributes."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        read_only: bool,
        max_age_s: float | None,
        cipher: Cipher | None,
    ) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.read_only = read_only
        self.max_age_s = max_age_s
        self.evictions = 0
        self.quarantined = 0
        self._counting = forks.lock(self, "_counting")
        self._background = Background("sac_rag prefetch", _MOST_PREFETCHES)
        self._manifests = Manifests(self.folder, read_only)
        with self._named_errors():
            version = open_folder(self.folder, read_only)
            self._entries = Entries(self.folder, max_bytes, read_only)
            try:
                keys.unlock(self._entries, cipher, read_only)
                if version != FORMAT:
                    write_format(self.folder)
            except BaseException:
                self._entries.index.database.close()
                raise

    def _get(self, key: str, wanted: Wanted | None = None) -> AnchorKV:
        entries = self._entries
        with self._named_errors():
            while True:
                row = entries.index.row(key)
                if row is None or self._is_expired(row):
                    if row is not None:
                        self._drop_expired(row)
                    entries.counters.count("misses")
                    raise KeyError(key)
                try:
                    kv = self._read(row, wanted)
                except CorruptEntryError as problem:
                    if not self._quarantine(row, problem):
                        continue  # rewritten or removed by another while it was read
                    entries.counters.count("misses")
                    entries.counters.count(f"miss.{problem.reason}")
                    raise
                if not self.read_only:
                    entries.index.renew(row)
                entries.counters.count("hits")
                return kv

    def _read(self, row: IndexRow, wanted: Wanted | None = None) -> AnchorKV:
        index = self._entries.index
        try:
            with self._entries.files.opened(row) as first:
                return decode_first(
                    row.key, first, row.size or 0, wanted or _all_entries, index.cipher
                )
        except FileNotFoundError:
            index.database.require_file()  # else the whole folder is gone, not one entry
            raise CorruptEntryError("its file is gone") from None

    def _prefetch(self, keys: Sequence[str]) -> None:
        def read_ahead() -> None:
            for key in keys:
                with contextlib.suppress(OSError, sqlite3.Error, CorruptEntryError):
                    row = self._entries.index.row(key)
                    if row is not None:
                        self._entries.files.read_ahead(row)

        self._background.submit(read_ahead)

    def _is_there(self, row: IndexRow | None) -> bool:
        """Whether an entry can be read, as far as its header says.

        Reading, writing and `in` agree on it: what is not there is written again.
        """
        if row is None or self._is_expired(row):
            return False
        try:
            return self._entries.cipher_of(row) == key_id(self._entries.index.cipher)
        except (FileNotFoundError, CorruptEntryError):
            return False

    def _put(
        self,
        key: str,
        kv: AnchorKV,
        documents: Iterable[str],
        text_id: str | None,
        fingerprint: str | None,
        patience_s: float | None,
    ) -> None:
        ids = frozenset(strings(documents, "documents"))
        index = self._entries.index

        def is_stored() -> bool:
            extent = index.extent(key)
            has_as_many = extent is not None and extent.num_entries >= kv.num_entries
            return has_as_many and self._is_there(index.row(key))

        with self._named_errors():
            if is_stored():
                if ids <= index.documents(key) and _is_known(index.origin(key), text_id):
                    return
                self._require_writable()
                with forks.held_off(), index.transaction(patience_s):
                    if is_stored():
                        index.add_documents(key, ids)
                        index.add_origin(key, text_id, fingerprint)
                        return
        self._write(key, kv, ids, text_id, fingerprint, is_stored, patience_s)

    def _write(
        self,
        key: str,
        kv: AnchorKV,
        documents: frozenset[str] = frozenset(),
        text_id: str | None = None,
        fingerprint: str | None = None,
        unless: Callable[[], bool] | None = None,
        patience_s: float | None = None,
    ) -> None:
        self._require_writable()
        cipher = self._entries.index.cipher
        data = encode(key, kv, cipher, fingerprint or "")
        extent = Extent(kv.num_tokens, kv.num_entries, kv.num_layers * kv.num_kv_heads)
        entry = NewEntry(key, extent, documents, text_id, fingerprint)
        with self._named_errors():
            if len(data) > self.max_bytes:
                self._entries.refuse(key, len(data))
                is_stored, evicted = False, 1
            else:
                rows = self._entries.publish(
                    entry, data, cipher, unless=unless, patience_s=patience_s
                )
                is_stored, evicted = all(row.key != key for row in rows), len(rows)
        if not is_stored:
            logger.warning(
                "%s not kept: %d bytes, the store's cap is %d and what is pinned stays",
                key,
                len(data),
                self.max_bytes,
            )
        elif evicted:
            logger.info(
                "%d entries evicted from %s to keep it below %d bytes; the last one was %s",
                evicted,
                self.folder,
                self.max_bytes,
                rows[-1].key,
            )
        with self._counting:
            self.evictions += evicted

    def _pin(self, keys: Iterable[str], pinned: bool) -> int:
        self._require_writable()
        index = self._entries.index
        chosen = strings(keys, "keys")
        with self._named_errors(), forks.held_off(), index.transaction():
            return sum(index.pin(key, pinned) for key in chosen)

    def _reason(self, key: str, text_id: str | None, fingerprint: str | None) -> str:
        index = self._entries.index
        row = index.row(key)
        if row is not None and self._is_expired(row):
            return "expired"
        reason = index.reason(key)
        if reason is not None:
            return reason
        if text_id is None or fingerprint is None:
            return "absent"
        others = index.other_fingerprints(text_id, fingerprint)
        if not others:
            return "absent"
        return f"fingerprint: {self._manifests.nearest(others, fingerprint)}"

    def _is_expired(self, row: IndexRow) -> bool:
        return (
            self.max_age_s is not None
            and row.stored is not None
            # Both ways: a clock that was ahead must not make an entry last until that date.
            and abs(time.time() - row.stored) > self.max_age_s
        )

    def _drop_expired(self, row: IndexRow) -> None:
        if not self.read_only:
            try:
                self._entries.drop([row], "expired", self._entries.index.database.brief_s)
            except (OSError, sqlite3.Error) as error:
                # A miss all the same: a query must not fail because tidying up does.
                logger.warning("%s is expired and could not be deleted: %s", row.key, error)

    def _quarantine(self, row: IndexRow, problem: CorruptEntryError) -> bool:
        """Moves a bad entry out of the way; False if it is no longer the one that was read."""
        index = self._entries.index
        if self.read_only or (problem.reason == "secret" and not index.has_one_cipher):
            # Nothing is wrong with an entry in another key while the key is being changed.
            return row.same_entry(index.row(row.key))
        try:
            if not self._entries.quarantine(row, problem.reason, index.database.brief_s):
                return False
            with self._counting:
                self.quarantined += 1
        except (OSError, sqlite3.Error) as error:
            logger.warning("%s could not be moved to quarantine: %s", row.key, error)
        logger.warning("%s in %s is bad and was not used: %s", row.key, self.folder, problem)
        return True

    def _require_writable(self) -> None:
        if self.read_only:
            raise OSError(
                errno.EROFS, "the store was opened with read_only=True", os.fspath(self.folder)
            )

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Raises errors of SQLite and the file system as an OSError with the folder's name."""
        try:
            yield
        except sqlite3.Error as error:
            remedy = ""
            if isinstance(error, sqlite3.DatabaseError) and "not a database" in str(error):
                remedy = "; `sac-rag store rebuild` makes it again"
            raise OSError(
                f"the index of the store {self.folder} failed: {error}{remedy}"
            ) from error
        except OSError as error:
            if error.filename is None and error.errno is not None:
                error.filename = str(self.folder)
            raise


def _all_entries(num_tokens: int) -> int:
    return sys.maxsize


def _is_known(origin: tuple[str | None, str | None], text_id: str | None) -> bool:
    """Whether the origin of an entry says as much as a `put` with this text id."""
    return text_id is None or origin[0] is not None
