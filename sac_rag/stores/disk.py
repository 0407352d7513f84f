"""Keeps AnchorKVs in a folder. Knows nothing of text, models or how a KV was made.

    store.json                 what this folder is, and of which format
    entries/cache.db           diskcache's index: key, file, size, documents, last use
    entries/ab/<key>-<16>.kv   one entry (see entry.py), written once, never changed
    quarantine/<key>           bytes that were not what had been written, for whoever wants to look

Entries are not flushed to the platter one by one: what a power cut tears fails its checksum, and
is computed again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from sac_rag.errors import CorruptEntry
from sac_rag.kv import AnchorKV
from sac_rag.stores.entry import decode, encode
from sac_rag.stores.files import Files, make_folder, owner_only
from sac_rag.stores.index import Index, Row, document_ids

logger = logging.getLogger(__name__)

MAGIC = "sac_rag.DiskStore"
FORMAT = 1

_NO_DEFAULT = object()


class DiskStore(MutableMapping[str, AnchorKV]):
    """AnchorKVs in a folder, the least recently used dropped when they pass the cap.

    May be shared by threads and processes. A bad entry is a `KeyError` like an absent one, is
    moved to `quarantine/`, and is never in the way of writing its key anew. Nothing found in the
    folder is ever unpickled, and no path found in it is followed out of it.

    Args:
        folder: Made, for its owner alone, if it is not there.
        max_bytes: Most bytes of entries to keep; the index takes about 0.5 KB for each on top.

    Raises:
        ValueError: if the folder holds something else, or a store of a later format.
        OSError: if the folder cannot be made, read or written.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = 64 * 2**30) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, was: {max_bytes}")
        # diskcache would expand variables too, and then look somewhere else than we do.
        self.folder = Path(os.path.expandvars(folder)).expanduser().resolve()
        self.max_bytes = max_bytes
        self._evictions = 0
        self._quarantined = 0
        self._counting = threading.Lock()
        with self._named():
            _claim(self.folder)
            self._files = Files(self.folder)
            self._index = Index(self._files.folder, max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of entries in the folder."""
        with self._named():
            return self._index.number("size")

    @property
    def evictions(self) -> int:
        """Entries that this object dropped, or did not keep, for want of room."""
        return self._evictions

    @property
    def quarantined(self) -> int:
        """Bad entries that this object came upon and moved out of the way."""
        return self._quarantined

    def __getitem__(self, key: str) -> AnchorKV:
        """Reads an entry.

        Raises:
            KeyError: if there is none; a `CorruptEntry` if there was one and it was bad.
            OSError: if the folder cannot be read.
        """
        with self._named():
            while True:
                row = self._index.row(key)
                if row is None:
                    raise KeyError(key)
                try:
                    kv = decode(key, self._files.read(row))
                except FileNotFoundError:
                    problem = CorruptEntry("its file is gone")
                except CorruptEntry as error:
                    problem = error
                else:
                    self._index.renew(row)
                    return kv
                if self._quarantine(key, row, problem):
                    raise problem
                # Written anew or dropped by another while we were reading: look again.

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        """Writes an entry, in place of the one there was; its documents stay.

        Raises:
            OSError: if it cannot be written; the entry there was is then still there.
            TypeError, ValueError: if it cannot be stored, see `entry.encode`.
        """
        self._write(key, kv, frozenset())

    def put(self, key: str, kv: AnchorKV, documents: Iterable[str] = ()) -> None:
        """Writes an entry if its key is not there yet, and notes whose text it holds.

        Args:
            key: A lower-case hex digest of at most 64 characters.
            kv: Written only if the key is new.
            documents: Ids to add to those noted for this key.

        Raises:
            OSError: if it cannot be written; nothing has then changed.
            TypeError, ValueError: if it cannot be stored, see `entry.encode`.
        """
        ids = document_ids(documents)
        with self._named():
            row = self._index.row(key)
            if row is not None:
                if ids <= row.documents():
                    return
                with self._index.transaction():
                    if self._index.add_documents(key, ids):
                        return
        self._write(key, kv, ids)

    def documents(self, key: str) -> tuple[str, ...]:
        """Ids of the documents whose text an entry holds, sorted. Does not read the entry.

        Raises:
            KeyError: if there is no such entry.
        """
        with self._named():
            row = self._index.row(key)
        if row is None:
            raise KeyError(key)
        return tuple(sorted(row.documents()))

    def __delitem__(self, key: str) -> None:
        with self._named():
            with self._index.transaction():
                row = self._index.row(key)
                if row is None:
                    raise KeyError(key)
                self._index.delete(row)
            self._files.remove(row)

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
            return self._index.row(key) is not None

    def __iter__(self) -> Iterator[str]:
        with self._named():
            yield from (row.key for row in self._index.rows() if row.key)

    def __len__(self) -> int:
        with self._named():
            return self._index.number("count")

    def clear(self) -> None:
        """Deletes every entry, bad ones too, without reading them."""
        for key in list(self):
            with contextlib.suppress(KeyError):
                del self[key]

    def check(self) -> list[str]:
        """Reads every entry and compares index and files; changes nothing.

        Meant for a store at rest: what others are writing meanwhile may be reported as unknown.

        Returns:
            A sentence for each problem; none if all is well.
        """
        with self._named():
            problems = self._index.problems()
            for row in self._index.rows():
                try:
                    row.documents(strict=True)
                    decode(row.key, self._files.read(row))
                except CorruptEntry as error:
                    problems.append(f"{row.key or f'row {row.rowid}'}: {error.detail}")
                except FileNotFoundError:
                    if self._index.row(row.key) == row:
                        problems.append(f"{row.key}: its file is gone")
        return problems

    def close(self) -> None:
        """Closes this thread's connection to the index; those of other threads end with them."""
        self._index.close()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.folder), self.max_bytes)

    def _write(self, key: str, kv: AnchorKV, documents: frozenset[str]) -> None:
        data = encode(key, kv)
        if len(data) > self.max_bytes:
            logger.warning(
                "%s not kept: %d bytes, the store's cap is %d", key, len(data), self.max_bytes
            )
            with self._counting:
                self._evictions += 1
            with contextlib.suppress(KeyError):
                del self[key]
            return
        with self._named():
            # The file first, outside of the transaction: others need not wait for its bytes, and
            # until its row is there nobody sees it.
            name = self._files.write(key, data)
            try:
                with self._index.transaction():
                    replaced = self._index.insert(key, name, len(data), documents)
                    evicted = self._index.evict(key)
            except BaseException:
                self._files.unlink(name)
                raise
            with self._counting:
                self._evictions += len(evicted)
            for row in evicted:
                logger.debug("%s evicted", row.key)
            for row in replaced + evicted:
                self._files.remove(row)

    def _quarantine(self, key: str, row: Row, problem: CorruptEntry) -> bool:
        """Moves a bad entry out of the way; False if it is no longer the one that was read."""
        try:
            with self._index.transaction():
                found = self._index.row(key)
                if found is None or found[:5] != row[:5]:
                    return False
                inline = self._index.delete(row)
            with self._counting:
                self._quarantined += 1
            self._files.set_aside(row, inline)
        except (OSError, sqlite3.Error) as error:
            # A miss all the same: the query must not fail for want of a tidy folder.
            logger.warning("%s could not be moved to quarantine: %s", key, error)
        logger.warning("%s in %s is bad and was not used: %s", key, self.folder, problem)
        return True

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


def _claim(folder: Path) -> None:
    """Makes a folder a store, or sees that it is one that we can read."""
    make_folder(folder)
    path = folder / "store.json"
    if not path.exists():
        names = {other.name for other in folder.iterdir()}
        strange = sorted(name for name in names if not name.startswith(path.name))
        if strange and not path.exists():  # asked again: another may have claimed it just now
            raise ValueError(
                f"{folder} is not empty and not a store (it has {strange[0]!r}, but no store.json);"
                " give a new or an empty folder"
            )
        draft = folder / f"{path.name}.{secrets.token_hex(8)}"
        try:
            with open(draft, "x", opener=owner_only) as file:
                json.dump({"magic": MAGIC, "format": FORMAT}, file)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(4096))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not that of a store: {error}") from error
    if not isinstance(found, dict) or found.get("magic") != MAGIC:
        raise ValueError(f"{path} does not say {MAGIC!r}, was: {found!r:.100}")
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is a store of format {found.get('format')!r:.20}, this version of sac_rag "
            f"reads format {FORMAT}; upgrade sac_rag or give another folder"
        )
