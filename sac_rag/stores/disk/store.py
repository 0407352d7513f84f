"""DiskStore: AnchorKVs in a folder.

    store.json                  what this folder is, and of which format
    entries/cache.db            the index (see index.py)
    entries/ab/<key>-<16>.kv    one entry (see stores/entry.py), written once, never changed
    fingerprints/<digest>.json  what a fingerprint is made of
    quarantine/<key>            bytes that were not those written, kept for inspection

An entry is visible when its row is there, and its row is written when its file is on the disk.

Every public method stands here with what it promises. How values are read and written stands in
values.py, what is done to rows and files in entries.py, index.py and the files beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sac_rag.kv import AnchorKV
from sac_rag.stores.base import Wanted, strings
from sac_rag.stores.disk import checks, keys, maintenance
from sac_rag.stores.disk.maintenance import Collected, Progress, StoreStats
from sac_rag.stores.disk.rebuild import Rebuilt, rebuild
from sac_rag.stores.disk.values import StoredValues

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher


class DiskStore(StoredValues):
    """AnchorKVs in a folder, the least recently used evicted when they exceed the cap.

    May be shared by threads and processes. A bad entry is a `KeyError` like an absent one, is
    moved to `quarantine/`, and never prevents its key from being written again. Nothing in the
    folder is ever unpickled, and no path in it is followed out of it. A write that has returned
    survives a power cut: flushing adds 3 ms to the 10 ms of writing an entry of 2 MiB.

    Args:
        folder: Made, for its owner only (0700), if it is not there. For the folder of a
            collection, the store in it is opened.
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
        super().__init__(_place_of(folder), max_bytes, read_only, max_age_s, cipher)

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

    def __contains__(self, key: object) -> bool:
        with self._named_errors():
            return self._is_there(self._entries.index.row(key))

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
        return self._entries.index.cipher is not None

    def close(self) -> None:
        """Closes this thread's connection to the index; those of other threads end with them."""
        self._background.close()
        self._entries.counters.flush()
        self._entries.index.database.close()

    def __reduce__(self) -> tuple[Any, ...]:
        opened = partial(
            type(self),
            max_bytes=self.max_bytes,
            read_only=self.read_only,
            max_age_s=self.max_age_s,
            cipher=self._entries.index.cipher,
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

    def prefetch(self, keys: Iterable[str]) -> None:
        """Has the system read entries from the disk into its memory, in the background (Linux)."""
        self._prefetch(strings(keys, "keys"))

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

        Waits up to a minute for others that write.

        Raises:
            OSError: if it cannot be written; nothing has then changed.
            TypeError, ValueError: if it cannot be stored, see `entry.encode`.
        """
        self._put(key, kv, documents, text_id, fingerprint, patience_s=None)

    def offer(
        self,
        key: str,
        kv: AnchorKV,
        documents: Iterable[str] = (),
        *,
        text_id: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Writes an entry as `put` does, but waits for others that write a second at most.

        Raises:
            OSError: if it cannot be written, or others write for longer.
            TypeError, ValueError: if it cannot be stored, see `entry.encode`.
        """
        patience_s = self._entries.index.database.brief_s
        self._put(key, kv, documents, text_id, fingerprint, patience_s)

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
            ids = strings(documents, "document ids")
            return self._entries.forget(dict.fromkeys(ids, frozenset()))

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
        strings(documents, "document ids")
        keep = {name: frozenset(strings(k, "keys of a document")) for name, k in documents.items()}
        with self._named_errors():
            return self._entries.forget(keep)

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

    def origin_of(self, key: str) -> tuple[str | None, str | None]:
        """The same as `origin`."""
        return self.origin(key)

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
            return checks.check(self._entries, self._read, fix, on_progress)

    def verify(self, on_progress: Progress | None = None) -> list[str]:
        """Reads every entry and changes nothing; a sentence for each that is bad."""
        with self._named_errors():
            return checks.verify(self._entries, self._read, on_progress)

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
        the old key, and an entry in the new one is a miss with the reason "secret"; with the old
        key as the new one, the change is taken back and such entries are deleted. Others that
        have the store open cannot write, once it has finished, until they open it again.

        Args:
            cipher: The new one; None to store unencrypted.
            on_progress: Called with the bytes read since the last call.

        Returns:
            The number of entries re-encrypted.

        Raises:
            ValueError: if a change to yet another key was begun and not finished.
        """
        self._require_writable()
        with self._named_errors():
            return keys.rekey(self._entries, cipher, on_progress)

    @classmethod
    def rebuild(
        cls,
        folder: str | os.PathLike[str],
        max_bytes: int = 64 * 2**30,
        *,
        cipher: Cipher | None = None,
        on_progress: Progress | None = None,
    ) -> Rebuilt:
        """Makes the index of a store again whose own is lost or damaged, from its entries.

        Keys, sizes and fingerprints are in the entries, and their age is that of their files.
        Documents, pins, text ids and counters are lost: until they are put again, `forget` does
        not find these entries. Nobody else must have the store open.

        Args:
            folder: Of the store.
            max_bytes: As the constructor takes it.
            cipher: The store's; its entries are then decrypted.
            on_progress: Called with the bytes of the entries seen since the last call.

        Raises:
            ValueError: if the index is intact, the folder no store, or no entry can be read.
            OSError: if the folder cannot be read or written.
        """
        return rebuild(_place_of(folder), max_bytes, cipher, on_progress)


def _place_of(folder: str | os.PathLike[str]) -> Path:
    """The folder of a store; where a collection's is given, that of its store."""
    # diskcache would expand variables too, and then look somewhere else than we do.
    path = Path(os.path.expandvars(folder)).expanduser().resolve()
    if (path / "collection.json").is_file() and not (path / "store.json").exists():
        return path / "anchors"
    return path
