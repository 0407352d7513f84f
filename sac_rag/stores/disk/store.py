"""DiskStore: AnchorKVs in a folder.

    store.json                  what this folder is, and of which format
    entries/cache.db            the index (see index.py)
    entries/ab/<key>-<16>.kv    one entry (see stores/entry.py), written once, never changed
    fingerprints/<digest>.json  what a fingerprint is made of
    quarantine/<key>            bytes that were not those written, kept for inspection

An entry is visible when its row is there, and its row is written when its file is on the disk.

More than 500 lines, because it is one class: every public method with what it promises. What they
do to rows and files stands in entries.py, index.py and maintenance.py.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.stores.base import DocumentStore, Wanted
from sac_rag.stores.disk import maintenance
from sac_rag.stores.disk.entries import Entries
from sac_rag.stores.disk.folder import FORMAT, Manifests, open_folder, write_format
from sac_rag.stores.disk.index import Extent, IndexRow, NewEntry
from sac_rag.stores.disk.maintenance import Collected, Progress, StoreStats
from sac_rag.stores.entry import decode, decode_first, encode

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

logger = logging.getLogger(__name__)

_NO_DEFAULT = object()


class DiskStore(DocumentStore):
    """AnchorKVs in a folder, the least recently used evicted when they exceed the cap.

    May be shared by threads and processes. A bad entry is a `KeyError` like an absent one, is
    moved to `quarantine/`, and never prevents its key from being written again. Nothing in the
    folder is ever unpickled, and no path in it is followed out of it. A write that has returned
    survives a power cut: flushing adds 3 ms to the 10 ms of writing an entry of 2 MiB.

    Args:
        folder: Made, for its owner only (0700), if it is not there.
        max_bytes: Most bytes of entries to keep; the index takes about 1 KB for each on top.
        read_only: Writes nothing, not even counters, and opens folders that cannot be written.
            Whatever would change the store raises an OSError.
        max_age_s: Entries stored longer ago than this many seconds are not served, even pinned
            ones.
        cipher: Encrypts the entries and the documents' ids. A store has one for all its entries.

    Attributes:
        evictions: Entries that this object evicted, or did not keep because there was no room.
        quarantined: Bad entries that this object moved to quarantine.

    Raises:
        ValueError: if the folder holds something else, a store of a later format, or one that is
            encrypted with another key.
        OSError: if the folder cannot be made, read or written.
    """

    remembers_documents = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_bytes: int = 64 * 2**30,
        *,
        read_only: bool = False,
        max_age_s: float | None = None,
        cipher: Cipher | None = None,
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, was: {max_bytes}")
        if max_age_s is not None and not max_age_s > 0:
            raise ValueError(f"max_age_s must be more than 0, was: {max_age_s}")
        # diskcache would expand variables too, and then look somewhere else than we do.
        self.folder = Path(os.path.expandvars(folder)).expanduser().resolve()
        self.max_bytes = max_bytes
        self.read_only = read_only
        self.max_age_s = max_age_s
        self.evictions = 0
        self.quarantined = 0
        self._counting = threading.Lock()
        self._cipher = cipher
        self._manifests = Manifests(self.folder, read_only)
        with self._named_errors():
            version = open_folder(self.folder, read_only)
            self._entries = Entries(self.folder, max_bytes, read_only)
            try:
                maintenance.unlock(self._entries, cipher, read_only)
                if version != FORMAT:
                    write_format(self.folder)
            except BaseException:
                self._entries.index.database.close()
                raise

    # A mapping.

    def __getitem__(self, key: str) -> AnchorKV:
        """Reads an entry.

        Raises:
            KeyError: if there is none; a `CorruptEntryError` if there was one and it was bad.
            OSError: if the folder cannot be read.
        """
        return self._get(key)

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        """Writes an entry in place of the key's, if there is one; its documents stay.

        Raises:
            OSError: if it cannot be written; a previous entry is then still there.
            TypeError, ValueError: if it cannot be stored, see `entry.encode`.
        """
        self._write(key, kv)

    def __delitem__(self, key: str) -> None:
        self._require_writable()
        with self._named_errors():
            row = self._entries.index.row(key)
            if row is None or not self._entries.drop([row], reason=None):
                raise KeyError(key)

    def pop(self, key: str, default: Any = _NO_DEFAULT) -> Any:
        """Removes an entry and returns it, or the default; others may remove it meanwhile."""
        try:
            kv = self[key]
        except KeyError:
            if default is _NO_DEFAULT:
                raise
            return default
        with contextlib.suppress(KeyError):
            del self[key]
        return kv

    def __contains__(self, key: object) -> bool:
        with self._named_errors():
            row = self._entries.index.row(key)
            return row is not None and not self._is_expired(row)

    def __iter__(self) -> Iterator[str]:
        with self._named_errors():
            for row in self._entries.index.rows():
                if row.key and not self._is_expired(row):
                    yield row.key

    def __len__(self) -> int:
        if self.max_age_s is not None:
            return sum(1 for _ in self)
        with self._named_errors():
            return self._entries.index.num_entries

    def clear(self) -> None:
        """Deletes every entry, bad ones too, without reading them."""
        self._require_writable()
        with self._named_errors():
            self._entries.drop(list(self._entries.index.rows()), reason=None)

    @property
    def nbytes(self) -> int:
        """Bytes of entries in the folder."""
        with self._named_errors():
            return self._entries.index.nbytes

    @property
    def is_encrypted(self) -> bool:
        """Whether it takes a key to read the entries."""
        return self._cipher is not None

    def close(self) -> None:
        """Closes this thread's connection to the index; those of other threads end with them."""
        with contextlib.suppress(sqlite3.Error):
            self._entries.counters.flush()
        self._entries.index.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        opened = partial(
            type(self),
            max_bytes=self.max_bytes,
            read_only=self.read_only,
            max_age_s=self.max_age_s,
            cipher=self._cipher,
        )
        return opened, (str(self.folder),)

    # Parts of entries, documents and pins.

    def read(self, key: str, wanted: Wanted) -> AnchorKV:
        """Reads an entry's first KV entries, and little more of its file unless it is encrypted.

        Raises:
            KeyError, OSError: as for `store[key]`; bad bytes behind those read raise nothing.
            ValueError: if fewer than 1 are wanted.
        """
        return self._get(key, wanted)

    def extent(self, key: str) -> tuple[int, int]:
        """Source tokens and stored KV entries of a chunk, without reading its file.

        Raises:
            KeyError: if there is none, or an earlier version of sac_rag wrote it.
        """
        with self._named_errors():
            extent = self._entries.index.extent(key) if key in self else None
        if extent is None:
            raise KeyError(key)
        return extent.num_tokens, extent.num_entries

    def put(
        self,
        key: str,
        kv: AnchorKV,
        documents: Iterable[str] = (),
        *,
        text_id: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Writes an entry unless one with as many KV entries is there, and adds its documents.

        Raises:
            OSError: if it cannot be written; nothing has then changed.
            TypeError, ValueError: if it cannot be stored, see `entry.encode`.
        """
        ids = _document_ids(documents)
        index = self._entries.index

        def is_stored() -> bool:
            row = index.row(key)
            if row is None or self._is_expired(row):
                return False
            extent = index.extent(key)
            return extent is not None and extent.num_entries >= kv.num_entries

        with self._named_errors():
            if is_stored():
                if ids <= index.documents(key):
                    return
                self._require_writable()
                with index.database.transaction():
                    if is_stored():
                        index.add_documents(key, ids)
                        return
        self._write(key, kv, ids, text_id, fingerprint, unless=is_stored)

    def documents(self, key: str) -> tuple[str, ...]:
        """Ids of the documents recorded for an entry, sorted, without reading it."""
        with self._named_errors():
            if self._entries.index.row(key) is None:
                raise KeyError(key)
            return tuple(sorted(self._entries.index.documents(key)))

    def keys_of(self, document: str) -> list[str]:
        """Keys of a document's entries."""
        with self._named_errors():
            return self._entries.index.keys_of(document)

    def forget(self, *documents: str) -> int:
        """Deletes what only these documents use, and every trace of it in the folder.

        Texts that other documents have too stay. Which blocks of the disk are overwritten when is
        up to the file system: only encryption makes sure that they cannot be read.

        Returns:
            The number of entries deleted.

        Raises:
            OSError: if something could not be deleted; repeating it deletes the rest.
        """
        self._require_writable()
        with self._named_errors():
            return self._entries.forget(dict.fromkeys(_document_ids(documents), frozenset()))

    def replace_document(self, document: str, keys: Iterable[str]) -> int:
        """Sets which entries hold a document now; deletes those that no other document uses.

        Args:
            document: An id. It is not added to entries that do not have it: `put` does that.
            keys: Those of its entries that stay. Entries of the same texts that other compressors
                made stay too.

        Returns:
            The number of entries deleted.

        Raises:
            OSError: if something could not be deleted; repeating it deletes the rest.
        """
        return self.replace_documents({document: keys})

    def replace_documents(self, documents: Mapping[str, Iterable[str]]) -> int:
        """Does for many documents at once what `replace_document` does for one, and faster.

        Rewriting the index, so that no byte stays in it, takes as long for all as for one.
        """
        self._require_writable()
        _document_ids(documents)
        with self._named_errors():
            return self._entries.forget({name: frozenset(k) for name, k in documents.items()})

    def pin(self, keys: Iterable[str]) -> int:
        """Protects entries from eviction until they are unpinned; returns how many were there.

        Pins are recorded in the folder, and removed with their entries. Where pinned entries leave
        no room, a new one is not kept.
        """
        return self._pin(keys, True)

    def unpin(self, keys: Iterable[str]) -> int:
        """Lets entries be evicted again; returns how many were there."""
        return self._pin(keys, False)

    # Reasons of misses.

    def note(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        """Records what a fingerprint is made of, so that a difference can be named.

        A read-only store remembers it until it is closed.

        Raises:
            OSError: if it cannot be written.
            TypeError, ValueError: if the fingerprint is not a hex digest, or a field not a str.
        """
        with self._named_errors():
            self._manifests.note(fingerprint, fields)

    def fields(self, fingerprint: str) -> dict[str, str] | None:
        """What a fingerprint is made of; None if it was not noted."""
        return self._manifests.fields(fingerprint)

    def origin(self, key: str) -> tuple[str | None, str | None]:
        """The text id and the fingerprint that an entry was put with; None where not known."""
        with self._named_errors():
            return self._entries.index.origin(key)

    def why_absent(
        self, key: str, *, text_id: str | None = None, fingerprint: str | None = None
    ) -> str:
        """Why an entry was not found; counts the reason.

        Returns:
            "expired", "evicted", "forgotten", "corrupt" or "format" if it was there once;
            "fingerprint: …" with what differs if the text is there under another one; "absent".
        """
        with self._named_errors():
            reason = self._reason(key, text_id, fingerprint)
            self._entries.counters.count(f"miss.{reason.partition(':')[0]}")
        return reason

    # Maintenance.

    def stats(self) -> StoreStats:
        """Figures of the store and its counters, for its operator."""
        with self._named_errors():
            return maintenance.collect_stats(self._entries, self._manifests)

    def check(self, fix: bool = False, on_progress: Progress | None = None) -> list[str]:
        """Reads every entry and compares index and files.

        Meant for a store at rest: what others are writing meanwhile may be reported as unknown.

        Args:
            fix: Quarantines what is bad and deletes what belongs to nothing; else nothing changes.
            on_progress: Called with the bytes read since the last call.

        Returns:
            A sentence for each problem; none if all is well.
        """
        if fix:
            self._require_writable()
        with self._named_errors():
            return maintenance.check(self._entries, self._read, fix, on_progress)

    def verify(self, on_progress: Progress | None = None) -> list[str]:
        """Reads every entry and changes nothing; a sentence for each that is bad."""
        with self._named_errors():
            return maintenance.verify(self._entries, self._read, on_progress)

    def gc(self, keep_fingerprints: Iterable[str] | None = None) -> Collected:
        """Deletes expired entries, leftovers of killed writers, and week-old quarantined bytes.

        Args:
            keep_fingerprints: If given, entries put with any other fingerprint are deleted too,
                except pinned ones.
        """
        self._require_writable()
        with self._named_errors():
            return maintenance.collect_garbage(self._entries, self._is_expired, keep_fingerprints)

    def rekey(self, cipher: Cipher | None, on_progress: Progress | None = None) -> int:
        """Re-encrypts every entry with another key, or with none.

        Repeated after it was killed, it resumes. Until it has finished, the store is opened with
        the old key. Others that have it open should be closed: what they write meanwhile is
        encrypted with the old one, and not found later.

        Args:
            cipher: The new one; None to store unencrypted.
            on_progress: Called with the bytes read since the last call.

        Returns:
            The number of entries re-encrypted.
        """
        self._require_writable()
        with self._named_errors():
            count = maintenance.rekey(self._entries, self._cipher, cipher, on_progress)
        self._cipher = cipher
        return count

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
        files = self._entries.files
        try:
            if wanted is None:
                return decode(row.key, files.read(row), self._cipher)
            with files.opened(row) as first:
                return decode_first(row.key, first, row.size or 0, wanted, self._cipher)
        except FileNotFoundError:
            raise CorruptEntryError("its file is gone") from None

    def _write(
        self,
        key: str,
        kv: AnchorKV,
        documents: frozenset[str] = frozenset(),
        text_id: str | None = None,
        fingerprint: str | None = None,
        unless: Callable[[], bool] | None = None,
    ) -> None:
        self._require_writable()
        data = encode(key, kv, self._cipher, fingerprint or "")
        extent = Extent(kv.num_tokens, kv.num_entries, kv.num_layers * kv.num_kv_heads)
        entry = NewEntry(key, extent, documents, text_id, fingerprint)
        with self._named_errors():
            if len(data) > self.max_bytes:
                self._entries.refuse(key, len(data))
                is_stored, evicted = False, 1
            else:
                rows = self._entries.publish(entry, data, unless)
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
        with self._named_errors(), index.database.transaction():
            return sum(index.pin(key, pinned) for key in keys)

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
            and time.time() - row.stored > self.max_age_s
        )

    def _drop_expired(self, row: IndexRow) -> None:
        if not self.read_only:
            try:
                self._entries.drop([row], reason="expired")
            except (OSError, sqlite3.Error) as error:
                # A miss all the same: a query must not fail because tidying up does.
                logger.warning("%s is expired and could not be deleted: %s", row.key, error)

    def _quarantine(self, row: IndexRow, problem: CorruptEntryError) -> bool:
        """Moves a bad entry out of the way; False if it is no longer the one that was read."""
        if self.read_only or problem.reason == "secret":
            # Nothing is wrong with an entry that is encrypted with another's key.
            return row.same_entry(self._entries.index.row(row.key))
        try:
            if not self._entries.quarantine(row, problem.reason):
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
            raise OSError(f"the index of the store {self.folder} failed: {error}") from error
        except OSError as error:
            if error.filename is None and error.errno is not None:
                error.filename = str(self.folder)
            raise


def _document_ids(documents: Iterable[str]) -> frozenset[str]:
    """Document ids as a set; refuses anything but several str."""
    if isinstance(documents, str):
        raise TypeError(f"documents must be several ids, was one str: {documents!r:.100}")
    ids = frozenset(documents)
    if not all(isinstance(name, str) for name in ids):
        raise TypeError(f"document ids must be str, were: {sorted(map(repr, ids))[:3]}")
    return ids
