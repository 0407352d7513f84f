"""ObjectStore: AnchorKVs packed into objects of S3, GCS or another file system (extra "objects").

`shards.py` says which objects there are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sac_rag import forks
from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.stores.base import strings
from sac_rag.stores.encoded import EncodedStore, Piece, kept_keys
from sac_rag.stores.entry import is_key
from sac_rag.stores.fingerprints import Fields, nearest, require_fields
from sac_rag.stores.shards import (
    Manifest,
    Objects,
    Place,
    Shard,
    batches,
    manifest_from_json,
    pack,
    shard_from_json,
)

try:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem
except ImportError as error:
    raise ImportError(
        "sac_rag.stores.objects needs the 'objects' extra: pip install 'sac-rag[objects]'"
    ) from error

if TYPE_CHECKING:
    import threading

    from sac_rag.stores.cipher import Cipher

_MANIFEST = "manifest.json"
_WHOLE_BYTES = 256 * 1024  # up to this, an entry is read whole: a request costs more


class ObjectStore(EncodedStore):
    """AnchorKVs in packed shards: one request per entry read, one object per thousands of entries.

    One writer and any number of readers. Written entries are in the writer's memory until a shard
    is full, or `flush`; readers see them after that. Forgetting takes entries out of the index at
    once; their bytes are deleted by `compact`. Each process holds the index in memory, about 1 KB
    for each entry. May be shared by threads.

    Args:
        url: Of a folder, as fsspec takes it: s3://, gs://, memory://, a path.
        shard_bytes: Of a shard, at which it is written.
        read_only: Whether this is a reader; it looks for a new manifest when it misses an entry.
        cipher: Encrypts the entries and the documents' ids.
        storage_options: What fsspec needs to open the url.

    Attributes:
        objects: Reads and writes objects, and counts the requests for it.

    Raises:
        ValueError: if there is something else at the url, or a size is less than 1.
        OSError: if it cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        shard_bytes: int = 256 * 2**20,
        read_only: bool = False,
        cipher: Cipher | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(cipher)
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, was: {shard_bytes}")
        self.url, self.shard_bytes, self.read_only = url, shard_bytes, read_only
        self.storage_options = dict(storage_options or {})
        fs, root = fsspec.core.url_to_fs(url, **self.storage_options)
        is_local = isinstance(fs, LocalFileSystem)
        if is_local and not read_only:
            Path(root).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.objects = Objects(fs, root, is_local)
        self._lock: threading.RLock = forks.lock(self, "_lock", _rlock)
        self._manifest = Manifest()
        self._shards: dict[str, Shard] = {}
        self._where: dict[str, str] = {}  # shard by key
        self._pending: dict[str, tuple[Place, bytes]] = {}
        self._pending_nbytes = 0
        self._obsolete: list[str] = []  # objects that the next manifest does not name
        self._noted = False
        self.refresh()

    # A mapping.

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        """Writes an entry in place of the key's, if there is one; its documents stay."""
        self._add(key, kv, (), None, None)

    def __delitem__(self, key: str) -> None:
        self._require_writable()
        with self._lock:
            if not is_key(key) or not self._drop(key, None):
                raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        place = self._place(key) if is_key(key) else None
        return place is not None and place.codec == self._codec

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter([*self._where, *self._pending])

    def __len__(self) -> int:
        return len(self._where) + len(self._pending)

    def extent(self, key: str) -> tuple[int, int]:
        """Source tokens and stored KV entries of a chunk, from the index."""
        place = self._place(key)
        if place is None or key not in self:
            raise KeyError(key)
        return place.tokens, place.entries

    def clear(self) -> None:
        """Deletes every entry, and its bytes at the next `compact`."""
        self._require_writable()
        with self._lock:
            for key in list(self):
                self._drop(key, None)

    # Documents.

    def put(
        self,
        key: str,
        kv: AnchorKV,
        documents: Iterable[str] = (),
        *,
        text_id: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Adds an entry unless one with as many KV entries is there, and adds its documents."""
        ids = strings(documents, "documents")
        if not isinstance(kv, AnchorKV):
            raise TypeError(f"a store holds AnchorKVs, got: {type(kv).__name__}")
        with self._lock:
            place = self._place(key)
            if place is None or key not in self or place.entries < kv.num_entries:
                self._add(key, kv, ids, text_id, fingerprint)
                return
            sealed = tuple(sorted({*place.documents, *map(self._seal, ids)}))
            new = replace(
                place,
                documents=sealed,
                text_id=place.text_id or text_id or "",
                fingerprint=place.fingerprint or fingerprint or "",
            )
            if new != place:
                self._require_writable()
                self._update(key, new)

    def documents(self, key: str) -> tuple[str, ...]:
        """Ids of the documents recorded for an entry, sorted, from the index."""
        place = self._place(key)
        if place is None:
            raise KeyError(key)
        return self._unsealed(place.documents)

    def origin_of(self, key: str) -> tuple[str | None, str | None]:
        """The text id and the fingerprint that an entry was put with; None where not known."""
        place = self._place(key)
        return (None, None) if place is None else (place.text_id or None, place.fingerprint or None)

    def keys_of(self, document: str) -> list[str]:
        """Keys of a document's entries."""
        sealed = self._seal(document)
        return sorted(key for key, place in self._places() if sealed in place.documents)

    def replace_documents(self, documents: Mapping[str, Iterable[str]]) -> int:
        """Takes what only these documents use, except some keys of each, out of the index.

        `compact` deletes the bytes.
        """
        self._require_writable()
        deleted = 0
        with self._lock:
            for name, keep in kept_keys(documents).items():
                sealed = self._seal(name)
                texts = {place.text_id for key, place in self._places() if key in keep} - {""}
                for key, place in self._places():
                    if sealed not in place.documents or key in keep or place.text_id in texts:
                        continue
                    others = tuple(other for other in place.documents if other != sealed)
                    if others:
                        self._update(key, replace(place, documents=others))
                    else:
                        deleted += self._drop(key, "forgotten")
            self.flush()
        return deleted

    # Reasons of misses.

    def note(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        """Records what a fingerprint is made of, so that a difference can be named."""
        require_fields(fingerprint, fields)
        with self._lock:
            if self._manifest.fingerprints.get(fingerprint) != dict(fields):
                self._manifest.fingerprints[fingerprint] = dict(fields)
                self._noted = True

    def fields(self, fingerprint: str) -> Fields | None:
        """What a fingerprint is made of; None if it was not noted."""
        return self._manifest.fingerprints.get(fingerprint)

    def why_absent(
        self, key: str, *, text_id: str | None = None, fingerprint: str | None = None
    ) -> str:
        """Why there is no entry: "forgotten", "corrupt", "fingerprint: …" or "absent"."""
        reason = self._manifest.reasons.get(_digest(key))
        if reason is None and text_id is not None and fingerprint is not None:
            others = [
                place.fingerprint
                for _, place in self._places()
                if place.text_id == text_id and place.fingerprint not in ("", fingerprint)
            ]
            if others:
                reason = f"fingerprint: {nearest(others, fingerprint, self.fields)}"
        reason = reason or "absent"
        self._count(f"miss.{reason.partition(':')[0]}")
        return reason

    # Objects.

    def flush(self) -> None:
        """Writes what readers cannot see yet: entries, indexes, and then the manifest.

        Raises:
            OSError: if it cannot be written, or another writer has written meanwhile.
        """
        with self._lock:
            if self.read_only:
                return
            if self._pending:
                shard, data = pack(self._pending)
                self.objects.write(shard.path, data)
                self._adopt(shard)
                self._pending, self._pending_nbytes = {}, 0
            changed = [shard for shard in self._shards.values() if shard.changed]
            if not changed and not self._obsolete and not self._noted:
                return
            for shard in changed:
                if shard.name in self._manifest.shards:
                    self._obsolete.append(shard.index_path)
                    shard.generation += 1
                self.objects.write(shard.index_path, shard.to_json())
                shard.changed = False
            self._publish()

    def compact(self) -> int:
        """Rewrites shards that hold deleted bytes, or less than half of a full one.

        Readers that still have the old manifest read the new one when a shard is gone.

        Returns:
            The number of bytes deleted.
        """
        self._require_writable()
        with self._lock:
            self.flush()
            old = [
                shard
                for shard in self._shards.values()
                if shard.live_nbytes < shard.nbytes or 2 * shard.nbytes < self.shard_bytes
            ]
            if len(old) == 1 and old[0].live_nbytes == old[0].nbytes:
                old = []
            before = sum(shard.nbytes for shard in old)
            after = 0
            for batch in batches(old, self.shard_bytes):
                entries = {key: (p, self.objects.range(s.path, p)) for s, key, p in batch}
                shard, data = pack(entries)
                after += len(data)
                self.objects.write(shard.path, data)
                self.objects.write(shard.index_path, shard.to_json())
                shard.changed = False
                self._adopt(shard)
            for shard in old:
                self._obsolete += [shard.path, shard.index_path]
                del self._shards[shard.name]
            self._publish()
            names = [(shard.path, shard.index_path) for shard in self._shards.values()]
            self.objects.sweep({_MANIFEST, *(name for pair in names for name in pair)})
            return before - after

    def refresh(self) -> bool:
        """Reads the manifest, and indexes that are new in it; False if nothing has changed."""
        with self._lock:
            try:
                manifest = manifest_from_json(self.objects.read(_MANIFEST))
            except FileNotFoundError:
                return False
            except ValueError as error:
                raise ValueError(f"{self.url} is no store of sac_rag: {error}") from error
            if manifest.generation == self._manifest.generation:
                return False
            shards = {}
            for name, generation in manifest.shards.items():
                shard = self._shards.get(name)
                if shard is None or shard.generation != generation:
                    data = self.objects.read(Shard(name, 0, {}, generation).index_path)
                    shard = shard_from_json(name, generation, data)
                shards[name] = shard
            self._manifest, self._shards, self._where = manifest, {}, {}
            for shard in shards.values():
                self._adopt(shard)
            return True

    @property
    def nbytes(self) -> int:
        """Bytes of entries."""
        return sum(place.nbytes for _, place in self._places())

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def close(self) -> None:
        """Writes what is pending."""
        self.flush()

    def __reduce__(self) -> tuple[Any, ...]:
        self.flush()
        return _opened, (
            type(self),
            self.url,
            {
                "shard_bytes": self.shard_bytes,
                "read_only": self.read_only,
                "cipher": self._cipher,
                "storage_options": self.storage_options,
            },
        )

    def _fetch(self, asked: Mapping[str, int | None]) -> dict[str, Piece | None]:
        if self.read_only and any(self._place(key) is None for key in asked):
            self.refresh()
        for _ in range(3):
            try:
                return self._ranges(asked)
            except FileNotFoundError:
                if not self.refresh():  # else compacted meanwhile
                    raise
        raise OSError(errno.EAGAIN, "the shards changed again at every attempt", self.url)

    def _ranges(self, asked: Mapping[str, int | None]) -> dict[str, Piece | None]:
        pieces: dict[str, Piece | None] = dict.fromkeys(asked)
        remote: list[tuple[str, str, Place, int]] = []
        with self._lock:
            for key, nbytes in asked.items():
                if key in self._pending:
                    data = self._pending[key][1]
                    pieces[key] = Piece(data, len(data))
                elif key in self._where:
                    shard = self._shards[self._where[key]]
                    place = shard.places[key]
                    is_whole = nbytes is None or place.nbytes <= _WHOLE_BYTES
                    end = place.offset + (
                        place.nbytes if is_whole else min(nbytes or 0, place.nbytes)
                    )
                    remote.append((key, shard.path, place, end))
        if remote:
            parts = self.objects.ranges([(path, p.offset, end) for _, path, p, end in remote])
            for (key, _, place, _), part in zip(remote, parts, strict=True):
                pieces[key] = Piece(part, place.nbytes)
        return pieces

    def _drop_bad(self, key: str, piece: Piece, error: CorruptEntryError) -> bool:
        if not self.read_only and error.reason == "corrupt":
            with self._lock:
                self._drop(key, "corrupt")
        return True

    def _add(
        self,
        key: str,
        kv: AnchorKV,
        ids: Iterable[str],
        text_id: str | None,
        fingerprint: str | None,
    ) -> None:
        self._require_writable()
        data = self._encoded(key, kv, fingerprint)
        with self._lock:
            old = self._place(key)
            documents = {*map(self._seal, ids), *(old.documents if old else ())}
            self._drop(key, None)
            place = Place(
                0,
                len(data),
                kv.num_tokens,
                kv.num_entries,
                self._codec,
                tuple(sorted(documents)),
                text_id or (old.text_id if old else ""),
                fingerprint or "",
            )
            self._pending[key] = (place, data)
            self._pending_nbytes += len(data)
            self._manifest.reasons.pop(_digest(key), None)
            if self._pending_nbytes >= self.shard_bytes:
                self.flush()

    def _place(self, key: str) -> Place | None:
        with self._lock:
            if key in self._pending:
                return self._pending[key][0]
            name = self._where.get(key)
            return None if name is None else self._shards[name].places[key]

    def _places(self) -> list[tuple[str, Place]]:
        with self._lock:
            stored = [(k, self._shards[name].places[k]) for k, name in self._where.items()]
            return stored + [(key, place) for key, (place, _) in self._pending.items()]

    def _update(self, key: str, place: Place) -> None:
        if key in self._pending:
            self._pending[key] = (place, self._pending[key][1])
        else:
            shard = self._shards[self._where[key]]
            shard.places[key] = place
            shard.changed = True

    def _drop(self, key: str, reason: str | None) -> bool:
        pending = self._pending.pop(key, None)
        if pending is not None:
            self._pending_nbytes -= len(pending[1])
        name = self._where.pop(key, None)
        if name is not None:
            del self._shards[name].places[key]
            self._shards[name].changed = True
        if reason is not None:
            self._manifest.reasons[_digest(key)] = reason
            self._noted = True
        return pending is not None or name is not None

    def _adopt(self, shard: Shard) -> None:
        self._shards[shard.name] = shard
        self._where.update(dict.fromkeys(shard.places, shard.name))

    def _publish(self) -> None:
        """Writes the manifest, then deletes what it no longer names."""
        with contextlib.suppress(FileNotFoundError):
            current = manifest_from_json(self.objects.read(_MANIFEST)).generation
            if current != self._manifest.generation:
                raise OSError(errno.EBUSY, "another writer has written; open it again", self.url)
        self._manifest.generation += 1
        self._manifest.shards = {shard.name: shard.generation for shard in self._shards.values()}
        self.objects.write(_MANIFEST, self._manifest.to_json())
        self._noted = False
        while self._obsolete:
            self.objects.remove(self._obsolete[-1])
            self._obsolete.pop()

    def _require_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the store was opened with read_only=True", self.url)


def _digest(key: str) -> str:
    return hashlib.sha1(key.encode(), usedforsecurity=False).hexdigest()


def _opened(kind: type[ObjectStore], url: str, options: dict[str, Any]) -> ObjectStore:
    return kind(url, **options)


def _rlock() -> Any:
    import threading

    return threading.RLock()
