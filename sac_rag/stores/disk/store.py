"""Keeps AnchorKVs in a folder. Knows nothing of text, models or how a KV was made.

    store.json                  what this folder is, and of which format
    entries/cache.db            the index, diskcache's tables and ours (see index.py, schema.py)
    entries/ab/<key>-<16>.kv    one entry (see entry.py), written once, never changed
    fingerprints/<digest>.json  what a fingerprint is made of
    quarantine/<key>            bytes that were not what had been written, to be looked at

An entry is seen when its row is there, and its row is written when its file is on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from sac_rag.kv import AnchorKV
from sac_rag.stores.disk import maintenance as keyring
from sac_rag.stores.disk import maintenance as upkeep
from sac_rag.stores.disk.documents import document_ids
from sac_rag.stores.disk.folder import Manifests
from sac_rag.stores.disk.maintenance import Collected, Progress, StoreStats, collect
from sac_rag.stores.disk.mapping import DiskMapping

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher


class DiskStore(DiskMapping):
    """AnchorKVs in a folder, the least recently used dropped when they pass the cap.

    May be shared by threads and processes. A bad entry is a `KeyError` like an absent one, is
    moved to `quarantine/`, and is never in the way of writing its key anew. Nothing found in the
    folder is ever unpickled, and no path found in it is followed out of it. What a write returned
    from survives a power cut: flushing adds 3 ms to the 10 ms of writing an entry of 2 MiB.

    Args:
        folder: Made, for its owner alone, if it is not there.
        max_bytes: Most bytes of entries to keep; the index takes about 1 KB for each on top.
        read_only: Writes nothing, not even what it counts, and opens folders that cannot be
            written. Whatever would change the store raises an OSError.
        max_age_s: Entries stored longer ago than so many seconds are not served, pinned or not.
        cipher: Encrypts the entries and the documents' ids. A store has one for all its entries.

    Attributes:
        evictions: Entries that this object dropped, or did not keep, for want of room.
        quarantined: Bad entries that this object came upon and moved out of the way.

    Raises:
        ValueError: if the folder holds something else, a store of a later format, or one that is
            encrypted with another key.
        OSError: if the folder cannot be made, read or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_bytes: int = 64 * 2**30,
        *,
        read_only: bool = False,
        max_age_s: float | None = None,
        cipher: Cipher | None = None,
    ) -> None:
        super().__init__(folder, max_bytes, read_only=read_only, max_age_s=max_age_s, cipher=cipher)
        self._manifests = Manifests(self.folder, read_only)

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

        Args:
            key: A lower-case hex digest of at most 64 characters.
            kv: Replaces the entry that is there if it has more KV entries.
            documents: Ids to add to those noted for this key.
            text_id: The same for the same text whatever the fingerprint, to explain a miss.
            fingerprint: What made the KV, see `note`.

        Raises:
            OSError: if it cannot be written; nothing has then changed.
            TypeError, ValueError: if it cannot be stored, see `entry.encode`.
        """
        ids = document_ids(documents)

        def is_stored() -> bool:
            row = self._entries.index.row(key)
            if row is None or self._is_expired(row):
                return False
            extent = self._entries.extent(key)
            return extent is not None and extent.num_entries >= kv.num_entries

        with self._named():
            if is_stored():
                if ids <= self._entries.documents.of(key):
                    return
                self._require_writable()
                with self._entries.index.transaction():
                    if is_stored():
                        self._entries.documents.add(key, ids)
                        return
        self._write(key, kv, ids, text_id, fingerprint, unless=is_stored)

    def documents(self, key: str) -> tuple[str, ...]:
        """Ids of the documents whose text an entry holds, sorted. Does not read the entry.

        Raises:
            KeyError: if there is no such entry.
        """
        with self._named():
            if self._entries.index.row(key) is None:
                raise KeyError(key)
            return tuple(sorted(self._entries.documents.of(key)))

    def keys_of(self, document: str) -> list[str]:
        """Keys of a document's entries."""
        with self._named():
            return self._entries.documents.keys(document)

    def forget(self, *documents: str) -> int:
        """Deletes what only these documents use, and every trace of it in the folder.

        Texts that other documents have too stay. Which blocks of the disk are overwritten when is
        up to the file system: only encryption makes sure that they cannot be read.

        Returns:
            How many entries were deleted.

        Raises:
            OSError: if something could not be deleted; doing it again goes on.
        """
        self._require_writable()
        with self._named():
            return self._entries.forget(dict.fromkeys(document_ids(documents), frozenset()))

    def replace_document(self, document: str, keys: Iterable[str]) -> int:
        """Says which entries hold a document now; deletes those that no other document uses.

        Args:
            document: An id. It is not added to entries that do not have it: `put` does that.
            keys: Those of its entries that are still its. What other compressors made of the
                same texts stays too.

        Returns:
            How many entries were deleted.

        Raises:
            OSError: if something could not be deleted; doing it again goes on.
        """
        return self.replace_documents({document: keys})

    def replace_documents(self, documents: Mapping[str, Iterable[str]]) -> int:
        """Does for many documents at once what `replace_document` does for one, and faster.

        Rewriting the index, so that no byte stays in it, takes as long for all as for one.
        """
        self._require_writable()
        document_ids(documents)
        with self._named():
            return self._entries.forget({name: frozenset(k) for name, k in documents.items()})

    def pin(self, keys: Iterable[str]) -> int:
        """Keeps entries from eviction until they are unpinned; returns how many were there.

        Pins are kept in the folder, and go with their entries. Where pinned entries leave no
        room, a new one is not kept.
        """
        return self._pin(keys, True)

    def unpin(self, keys: Iterable[str]) -> int:
        """Lets entries be evicted again; returns how many were there."""
        return self._pin(keys, False)

    def note(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        """Remembers what a fingerprint is made of, so that a difference can be named.

        A store that is only read remembers it until it is closed.

        Raises:
            OSError: if it cannot be written.
            TypeError, ValueError: if the fingerprint is not a hex digest, or a field not a str.
        """
        with self._named():
            self._manifests.note(fingerprint, fields)

    def fields(self, fingerprint: str) -> dict[str, str] | None:
        """What a fingerprint is made of; None if it was not noted."""
        return self._manifests.fields(fingerprint)

    def origin(self, key: str) -> tuple[str | None, str | None]:
        """The text id and the fingerprint that an entry was put with; None where not known."""
        with self._named():
            return self._entries.origin(key)

    def why_absent(
        self, key: str, *, text_id: str | None = None, fingerprint: str | None = None
    ) -> str:
        """Why an entry was not found, and counts that.

        Returns:
            "expired", "evicted", "forgotten", "corrupt" or "format" if it was there once;
            "fingerprint: …" with what differs if the text is there under another one; "absent".
        """
        with self._named():
            reason = self._reason(key, text_id, fingerprint)
            self._entries.tally.count(f"miss.{reason.partition(':')[0]}")
        return reason

    def stats(self) -> StoreStats:
        """What is in the store and what became of the rest, for whoever runs it."""
        with self._named():
            return collect(self._entries, self._manifests)

    def check(self, fix: bool = False, on_progress: Progress | None = None) -> list[str]:
        """Reads every entry and compares index and files.

        Meant for a store at rest: what others are writing meanwhile may be reported as unknown.

        Args:
            fix: Quarantines what is bad and deletes what belongs to nothing; else nothing changes.
            on_progress: Called with the bytes read since the last call.

        Returns:
            A sentence for each problem found; none if all is well.
        """
        if fix:
            self._require_writable()
        with self._named():
            return upkeep.check(self._entries, self._read, fix, on_progress)

    def verify(self, on_progress: Progress | None = None) -> list[str]:
        """Reads every entry and changes nothing; a sentence for each that is bad."""
        with self._named():
            return upkeep.verify(self._entries, self._read, on_progress)

    def gc(self, keep_fingerprints: Iterable[str] | None = None) -> Collected:
        """Deletes what nobody will ask for.

        That is expired entries, leftovers of killed writers, and what has been in quarantine for
        a week.

        Args:
            keep_fingerprints: If given, entries put with any other fingerprint are deleted too,
                but for pinned ones.
        """
        self._require_writable()
        with self._named():
            return upkeep.gc(self._entries, self._is_expired, keep_fingerprints)

    def rekey(self, cipher: Cipher | None, on_progress: Progress | None = None) -> int:
        """Encrypts every entry with another key, or with none; killed, it goes on when repeated.

        Until it is done, the store is opened with the old key. Others that have it open should be
        closed: what they write meanwhile is encrypted with the old one, and not found later.

        Args:
            cipher: The new one; None to store in plain.
            on_progress: Called with the bytes read since the last call.

        Returns:
            How many entries were encrypted anew.
        """
        self._require_writable()
        with self._named():
            done = keyring.rekey(self._entries, self._cipher, cipher, on_progress)
        self._cipher = cipher
        return done

    def _pin(self, keys: Iterable[str], pinned: bool) -> int:
        self._require_writable()
        with self._named(), self._entries.index.transaction():
            return sum(self._entries.index.pin(key, pinned) for key in keys)

    def _reason(self, key: str, text_id: str | None, fingerprint: str | None) -> str:
        row = self._entries.index.row(key)
        if row is not None and self._is_expired(row):
            return "expired"
        past = self._entries.departed.reason(key)
        if past is not None:
            return past
        if text_id is None or fingerprint is None:
            return "absent"
        others = self._entries.other_fingerprints(text_id, fingerprint)
        if not others:
            return "absent"
        return f"fingerprint: {self._manifests.nearest(others, fingerprint)}"
