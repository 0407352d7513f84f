"""Shards of an ObjectStore: packed entries with an index each, and the manifest that lists them.

    manifest.json                   what this is, and which index every shard has now
    shards/<name>.shard             entries (see entry.py), one behind the other, never changed
    indexes/<name>-<generation>.json  where each entry lies, and what is known of it

Every object but the manifest is written once. What the manifest does not name is not there.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sac_rag.stores.entry import is_key
from sac_rag.stores.fingerprints import Fields

MAGIC = "sac_rag.ObjectStore"
FORMAT = 1
_MOST_REASONS = 10_000


@dataclass(frozen=True)
class Place:
    """Where an entry lies, and what is known of it.

    Attributes:
        offset: Of its first byte in the shard.
        nbytes: Of the entry.
        tokens: Source tokens in the chunk.
        entries: KV entries of the chunk.
        codec: Format, and id of the key that it is encrypted with.
        documents: Ids as they are stored, sorted.
        text_id: The same for the same text whatever the fingerprint; "" if it is not known.
        fingerprint: What made the KV; "" if it is not known.
    """

    offset: int
    nbytes: int
    tokens: int
    entries: int
    codec: str
    documents: tuple[str, ...] = ()
    text_id: str = ""
    fingerprint: str = ""


@dataclass
class Shard:
    """A shard and its index. `nbytes` are those of the object, `name` is random."""

    name: str
    nbytes: int
    places: dict[str, Place]
    generation: int = 0
    changed: bool = True

    @property
    def path(self) -> str:
        """Of the bytes, below the store's folder."""
        return f"shards/{self.name}.shard"

    @property
    def index_path(self) -> str:
        """Of the index, below the store's folder."""
        return f"indexes/{self.name}-{self.generation}.json"

    @property
    def live_nbytes(self) -> int:
        """Bytes of entries that are still there."""
        return sum(place.nbytes for place in self.places.values())

    def to_json(self) -> bytes:
        """The index."""
        places = {key: list(asdict(place).values()) for key, place in self.places.items()}
        about = {"magic": MAGIC, "format": FORMAT, "nbytes": self.nbytes, "places": places}
        return json.dumps(about, separators=(",", ":")).encode()


@dataclass
class Manifest:
    """Which shards there are, the last to be written last."""

    generation: int = 0
    shards: dict[str, int] = field(default_factory=dict)  # generation of the index, by name
    fingerprints: dict[str, Fields] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # by SHA-1 of the key

    def to_json(self) -> bytes:
        """The manifest."""
        reasons = dict(list(self.reasons.items())[-_MOST_REASONS:])
        about = {"magic": MAGIC, "format": FORMAT, **asdict(replace(self, reasons=reasons))}
        return json.dumps(about, indent=1).encode()


def manifest_from_json(data: bytes) -> Manifest:
    """The manifest of these bytes.

    Raises:
        ValueError: if they are none, or of another format.
    """
    about = _parsed(data)
    try:
        return Manifest(
            int(about["generation"]),
            {_name(name): int(number) for name, number in about["shards"].items()},
            about["fingerprints"],
            about["reasons"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the manifest cannot be read: {error!r:.100}") from error


def shard_from_json(name: str, generation: int, data: bytes) -> Shard:
    """The shard of this index.

    Raises:
        ValueError: if it is no index, or one that contradicts itself.
    """
    about = _parsed(data)
    try:
        places = {key: _place(values) for key, values in about["places"].items()}
        shard = Shard(name, int(about["nbytes"]), places, generation, changed=False)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the index of shard {name} cannot be read: {error!r:.100}") from error
    for key, place in places.items():
        if not is_key(key) or not 0 <= place.offset <= place.offset + place.nbytes <= shard.nbytes:
            raise ValueError(f"the index of shard {name} has a place outside of it: {place}")
    return shard


class Objects:
    """Objects below a folder of an fsspec file system.

    Attributes:
        requests: Objects, or ranges of one, that were read.
    """

    def __init__(self, fs: Any, root: str, is_local: bool) -> None:
        self.fs, self.root = fs, root.rstrip("/")
        self._is_local = is_local
        self.requests = 0

    def read(self, path: str) -> bytes:
        """All of an object."""
        self.requests += 1
        return bytes(self.fs.cat_file(f"{self.root}/{path}"))

    def range(self, path: str, place: Place) -> bytes:
        """The bytes at a place of an object."""
        return self.ranges([(path, place.offset, place.offset + place.nbytes)])[0]

    def ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """Bytes from begin to end of objects, asked for together.

        Raises:
            OSError: if one of them cannot be read.
        """
        self.requests += len(ranges)
        paths, begins, ends = zip(*ranges, strict=True)
        full = [f"{self.root}/{path}" for path in paths]
        parts = self.fs.cat_ranges(full, list(begins), list(ends), on_error="return")
        for part in parts:
            if isinstance(part, Exception):
                raise part if isinstance(part, OSError) else OSError(str(part)) from part
        return [bytes(part) for part in parts]

    def write(self, path: str, data: bytes) -> None:
        """Writes an object, which others see whole or not at all."""
        full = f"{self.root}/{path}"
        self.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
        if self._is_local:
            self.fs.pipe_file(f"{full}.part", data)
            self.fs.mv(f"{full}.part", full)
        else:
            self.fs.pipe_file(full, data)

    def remove(self, path: str) -> None:
        """Deletes an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{path}")

    def sweep(self, named: Iterable[str]) -> None:
        """Deletes all other objects, which killed writers leave."""
        keep = {f"{self.root}/{path}" for path in named}
        self.fs.invalidate_cache()
        for path in self.fs.find(self.root):
            if path not in keep:
                self.fs.rm_file(path)


def pack(entries: Mapping[str, tuple[Place, bytes]]) -> tuple[Shard, bytes]:
    """A new shard of entries, whose places get their offsets, and its bytes."""
    places, parts, offset = {}, [], 0
    for key, (place, part) in entries.items():
        places[key] = replace(place, offset=offset, nbytes=len(part))
        parts.append(part)
        offset += len(part)
    return Shard(uuid.uuid4().hex, offset, places), b"".join(parts)


def batches(shards: Iterable[Shard], most: int) -> Iterator[list[tuple[Shard, str, Place]]]:
    """Entries of shards, in batches of about as many bytes as a shard should have."""
    batch: list[tuple[Shard, str, Place]] = []
    nbytes = 0
    for shard in shards:
        for key, place in shard.places.items():
            batch.append((shard, key, place))
            nbytes += place.nbytes
            if nbytes >= most:
                yield batch
                batch, nbytes = [], 0
    if batch:
        yield batch


def _place(values: list[Any]) -> Place:
    offset, nbytes, tokens, entries, codec, documents, text_id, fingerprint = values
    return Place(
        int(offset),
        int(nbytes),
        int(tokens),
        int(entries),
        str(codec),
        tuple(map(str, documents)),
        str(text_id),
        str(fingerprint),
    )


def _name(name: str) -> str:
    if not is_key(name):  # it becomes a path
        raise ValueError(f"the manifest names a shard {name!r:.80}")
    return name


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        about = json.loads(data)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    if not isinstance(about, dict) or about.get("magic") != MAGIC:
        raise ValueError(f"does not say {MAGIC!r}")
    if about.get("format") != FORMAT:
        raise ValueError(f"is of format {about.get('format')!r:.20}, not {FORMAT}; upgrade sac_rag")
    return about
