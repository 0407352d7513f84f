"""AnchorKVs in a folder, as a mapping. Knows nothing of documents, pins or upkeep."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.stores.base import Wanted
from sac_rag.stores.disk import maintenance as keyring
from sac_rag.stores.disk.entries import Entries, Extent
from sac_rag.stores.disk.folder import FORMAT, claim, state
from sac_rag.stores.disk.index import Row
from sac_rag.stores.entry import decode, decode_first, encode

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

logger = logging.getLogger(__name__)

_NO_DEFAULT = object()


class DiskMapping(MutableMapping[str, AnchorKV]):
    """What a DiskStore does as a mapping; see there."""

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
        with self._named():
            version = claim(self.folder, read_only)
            self._entries = Entries(self.folder, max_bytes, read_only)
            try:
                keyring.unlock(self._entries, cipher, read_only)
                if version != FORMAT:
                    state(self.folder)
            except BaseException:
                self._entries.index.close()
                raise

    @property
    def nbytes(self) -> int:
        """Bytes of entries in the folder."""
        with self._named():
            return self._entries.index.number("size")

    @property
    def is_encrypted(self) -> bool:
        """Whether it takes a key to read the entries."""
        return self._cipher is not None

    def __getitem__(self, key: str) -> AnchorKV:
        """Reads an entry.

        Raises:
            KeyError: if there is none; a `CorruptEntryError` if there was one and it was bad.
            OSError: if the folder cannot be read.
        """
        return self._get(key)

    def read(self, key: str, wanted: Wanted) -> AnchorKV:
        """Reads an entry's first KV entries, and little more of its file unless it is encrypted.

        Args:
            key: As for `store[key]`.
            wanted: Called with the chunk's source tokens, returns how many KV entries to read,
                at least 1. All that are stored are read where it returns more.

        Raises:
            KeyError: if there is none; a `CorruptEntryError` if there was one and what was read of
                it was bad.
            OSError: if the folder cannot be read.
            ValueError: if fewer than 1 are wanted.
        """
        return self._get(key, wanted)

    def extent(self, key: str) -> tuple[int, int]:
        """Source tokens and stored KV entries of a chunk, without reading its file.

        Raises:
            KeyError: if there is none, or an earlier version of sac_rag wrote it.
            OSError: if the folder cannot be read.
        """
        with self._named():
            extent = self._entries.extent(key) if key in self else None
        if extent is None:
            raise KeyError(key)
        return extent.num_tokens, extent.num_entries

    def _get(self, key: str, wanted: Wanted | None = None) -> AnchorKV:
        with self._named():
            while True:
                row = self._entries.index.row(key)
                if row is None or self._is_expired(row):
                    if row is not None:
                        self._expire(row)
                    self._entries.tally.count("misses")
                    raise KeyError(key)
                try:
                    kv = self._read(row, wanted)
                except CorruptEntryError as problem:
                    if not self._set_aside(row, problem):
                        continue  # written anew or dropped by another while we were reading
                    self._entries.tally.count("misses")
                    self._entries.tally.count(f"miss.{problem.reason}")
                    raise
                if not self.read_only:
                    self._entries.index.renew(row)
                self._entries.tally.count("hits")
                return kv

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        """Writes an entry, in place of the one there was; its documents stay.

        Raises:
            OSError: if it cannot be written; the entry there was is then still there.
            TypeError, ValueError: if it cannot be stored, see `entry.encode`.
        """
        self._write(key, kv)

    def __delitem__(self, key: str) -> None:
        self._require_writable()
        with self._named():
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
        with self._named():
            row = self._entries.index.row(key)
            return row is not None and not self._is_expired(row)

    def __iter__(self) -> Iterator[str]:
        with self._named():
            for row in self._entries.index.rows():
                if row.key and not self._is_expired(row):
                    yield row.key

    def __len__(self) -> int:
        if self.max_age_s is not None:
            return sum(1 for _ in self)
        with self._named():
            return self._entries.index.number("count")

    def clear(self) -> None:
        """Deletes every entry, bad ones too, without reading them."""
        self._require_writable()
        with self._named():
            self._entries.drop(list(self._entries.index.rows()), reason=None)

    def close(self) -> None:
        """Closes this thread's connection to the index; those of other threads end with them."""
        with contextlib.suppress(sqlite3.Error):
            self._entries.tally.flush()
        self._entries.index.close()

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

    def _read(self, row: Row, wanted: Wanted | None = None) -> AnchorKV:
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
        with self._named():
            if len(data) > self.max_bytes:
                self._entries.refuse(key, len(data))
                kept, evicted = False, 1
            else:
                rows = self._entries.publish(
                    key, data, extent, documents, text_id, fingerprint, unless
                )
                kept, evicted = all(row.key != key for row in rows), len(rows)
        if not kept:
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

    def _is_expired(self, row: Row) -> bool:
        return (
            self.max_age_s is not None
            and row.stored is not None
            and time.time() - row.stored > self.max_age_s
        )

    def _expire(self, row: Row) -> None:
        if not self.read_only:
            try:
                self._entries.drop([row], reason="expired")
            except (OSError, sqlite3.Error) as error:
                # A miss all the same: the query must not fail for want of a tidy folder.
                logger.warning("%s is expired and could not be deleted: %s", row.key, error)

    def _set_aside(self, row: Row, problem: CorruptEntryError) -> bool:
        """Moves a bad entry out of the way; False if it is no longer the one that was read."""
        if self.read_only or problem.reason == "key":
            # Nothing is wrong with an entry that is encrypted with another's key.
            return row.same_entry(self._entries.index.row(row.key))
        try:
            if not self._entries.set_aside(row, problem.reason):
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
    def _named(self) -> Iterator[None]:
        """Lets what goes wrong below through as an OSError with the folder's name."""
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"the index of the store {self.folder} failed: {error}") from error
        except OSError as error:
            if error.filename is None and error.errno is not None:
                error.filename = str(self.folder)
            raise
