"""A precompressed corpus in one file, to be carried elsewhere. Knows nothing of models or prompts.

An archive is a ZIP file without compression, so that any unzip lists it and entries are read alone:

    entries/<key>.kv    one chunk's KV, as a store writes it and in plain (see stores/entry.py)
    cue.safetensors     the compressor's cue, if it has one
    manifest.json       what made the chunks, and a digest of every other file

The digests find damage. They do not tell who wrote the archive: take archives only from whom you
would take the model from, and guard them as you do the text, for an archive is not encrypted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load, save

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.origin import Origin
from sac_rag.stores.base import DocumentStore, ExplainingStore, PartialStore, Wanted
from sac_rag.stores.disk import DiskStore
from sac_rag.stores.entry import decode, decode_first, encode, is_key

MAGIC = "sac_rag.archive"
FORMAT = 2

_MANIFEST, _CUE = "manifest.json", "cue.safetensors"
_NAME_LENGTH_AT = 26  # in a ZIP file's header of a member: lengths of its name and extra field
_DIGEST = re.compile("[0-9a-f]{64}")


# (key, KV, documents, text id)
Entry: TypeAlias = tuple[str, AnchorKV, Iterable[str], str | None]


@dataclass(frozen=True)
class Record:
    """What the manifest says of one entry.

    Attributes:
        sha256: Of its bytes in the archive.
        num_tokens: Source tokens in the chunk.
        num_entries: Its KV entries.
        documents: Ids of the documents that have its text.
        text_id: See `keys.Namespace.text_id`; None if the store did not know it.
    """

    sha256: str
    num_tokens: int
    num_entries: int
    documents: tuple[str, ...] = ()
    text_id: str | None = None


def write(path: str | os.PathLike[str], origin: Origin, entries: Iterable[Entry]) -> int:
    """Writes an archive, for its owner alone; it appears whole or not at all.

    Args:
        path: A file that is not there yet.
        origin: What made the entries.
        entries: Taken one by one, never all in memory.

    Returns:
        How many entries were written.

    Raises:
        FileExistsError: if there is something at the path.
        OSError: if it cannot be written.
    """
    path = Path(path)
    _require_free(path)
    records: dict[str, Record] = {}
    fingerprint = origin.fingerprint
    descriptor, part = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for key, kv, documents, text_id in entries:
                    data = encode(key, kv, fingerprint=fingerprint)
                    archive.writestr(_member(_place(key)), data)
                    records[key] = Record(
                        _sha256(data),
                        kv.num_tokens,
                        kv.num_entries,
                        tuple(sorted(documents)),
                        text_id,
                    )
                cue = None
                if origin.cue is not None:
                    cue = save({"cue": origin.cue.detach().cpu().float().contiguous()})
                    archive.writestr(_member(_CUE), cue)
                archive.writestr(_member(_MANIFEST), _manifest(origin, cue, records))
            file.flush()
            os.fsync(file.fileno())
        _require_free(path)
        Path(part).replace(path)
    finally:
        Path(part).unlink(missing_ok=True)
    return len(records)


class Archive(MutableMapping[str, AnchorKV]):
    """An archive, as a store that can only be read. May be shared by threads and processes.

    Attributes:
        origin: What made its entries.
        records: What its manifest says of them, by key.

    Raises:
        ValueError: if the file is no archive, or one of a later format.
        OSError: if it cannot be read.
    """

    read_only = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as file:
                self._members = {member.filename: member for member in file.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ValueError(f"{self.path} is no archive of sac_rag: {error}") from error
        self.origin, self.records = self._open()

    def __getitem__(self, key: str) -> AnchorKV:
        """Reads an entry.

        Raises:
            KeyError: if there is none; a `CorruptEntryError` if it is damaged.
            OSError: if the file cannot be read.
        """
        if key not in self.records:
            raise KeyError(key)
        return decode(key, self._read(_place(key)))

    def read(self, key: str, wanted: Wanted) -> AnchorKV:
        """Reads an entry's first KV entries and little else; see `abilities.PartialStore`.

        Raises:
            KeyError: if there is none; a `CorruptEntryError` if what was read of it is damaged.
            OSError: if the file cannot be read.
            ValueError: if fewer than 1 are wanted.
        """
        if key not in self.records:
            raise KeyError(key)
        with self._opened(_place(key)) as (first, nbytes):
            return decode_first(key, first, nbytes, wanted)

    def extent(self, key: str) -> tuple[int, int]:
        """Source tokens and KV entries of a chunk, as the manifest says."""
        record = self.records[key]
        return record.num_tokens, record.num_entries

    def __setitem__(self, key: str, kv: AnchorKV) -> None:
        self._refuse()

    def __delitem__(self, key: str) -> None:
        self._refuse()

    def __contains__(self, key: object) -> bool:
        return key in self.records

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def verify(self, on_progress: Callable[[int], None] | None = None) -> list[str]:
        """Reads every entry; says what is wrong with which, nothing if all is well."""
        problems = []
        for key, record in self.records.items():
            try:
                self._verified(key, record)
            except CorruptEntryError as error:
                problems.append(f"{key}: {error.detail}")
            if on_progress is not None:
                on_progress(1)
        return problems

    def copy_to(
        self,
        store: MutableMapping[str, AnchorKV],
        on_progress: Callable[[int], None] | None = None,
    ) -> int:
        """Copies into a store what it does not have, each entry verified before.

        An entry of which the store has fewer KV entries replaces the one there. May be interrupted
        and done again: what is there with its documents is not read.

        Returns:
            How many entries were copied, or got documents.

        Raises:
            CorruptEntryError: at the first damaged entry; those before it are there.
            OSError: if the store cannot be written.
        """
        copied = 0
        fingerprint = self.origin.fingerprint
        if isinstance(store, ExplainingStore):
            store.note(fingerprint, self.origin.fields)
        for key, record in self.records.items():
            if not _has(store, key, record):
                kv = self._verified(key, record)
                if isinstance(store, ExplainingStore):
                    store.put(
                        key, kv, record.documents, text_id=record.text_id, fingerprint=fingerprint
                    )
                else:
                    store[key] = kv
                copied += 1
            if on_progress is not None:
                on_progress(1)
        return copied

    def _open(self) -> tuple[Origin, dict[str, Record]]:
        try:
            return self._parse(json.loads(bytes(self._read(_MANIFEST))))
        except (KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise ValueError(
                f"{self.path} is no archive of sac_rag, or is damaged: {error!r:.200}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{self.path} cannot be used as an archive: {error}") from error

    def _parse(self, about: Any) -> tuple[Origin, dict[str, Record]]:
        if about["magic"] != MAGIC:
            raise ValueError(f"its manifest does not say {MAGIC!r}, was: {about['magic']!r:.80}")
        if about["format"] != FORMAT:
            raise ValueError(
                f"it is of format {about['format']!r:.20}, this version of sac_rag reads format "
                f"{FORMAT}; upgrade sac_rag, or export it anew"
            )
        cue = None
        if about["cue"] is not None:
            data = self._read(_CUE)
            if _sha256(data) != about["cue"]:
                raise ValueError("the cue is not the one that was written")
            cue = load(bytes(data))["cue"]
        origin = Origin.from_dict(about["origin"], cue)
        records = {
            key: Record(**{**record, "documents": tuple(record["documents"])})
            for key, record in about["records"].items()
        }
        there = self._members.keys() - {_MANIFEST, _CUE}
        if not all(map(is_key, records)) or there != set(map(_place, records)):
            raise ValueError("the entries in it are not those of its manifest")
        if len(records) != about["entries"] or not all(map(_is_record, records.values())):
            raise ValueError("its manifest contradicts itself")
        return origin, records

    def _verified(self, key: str, record: Record) -> AnchorKV:
        data = self._read(_place(key))
        if _sha256(data) != record.sha256:
            raise CorruptEntryError("its bytes are not the ones that were written")
        kv = decode(key, data)
        if (kv.num_tokens, kv.num_entries) != self.extent(key):
            raise CorruptEntryError("it is not as large as the manifest says")
        return kv

    def _read(self, name: str) -> memoryview:
        with self._opened(name) as (first, nbytes):
            data = first(nbytes)
        if zlib.crc32(data) != self._members[name].CRC:
            raise CorruptEntryError(f"the bytes of {name} are not the ones that were written")
        return data

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[tuple[Callable[[int], memoryview], int]]:
        """Gives what reads the first bytes of a file in the archive, and how many it has."""
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED:
            raise CorruptEntryError(f"{name} is compressed")
        # Opened anew: the position in an open file would be shared with forked processes.
        with self.path.open("rb") as file:
            file.seek(member.header_offset + _NAME_LENGTH_AT)
            lengths = struct.unpack("<HH", file.read(4).ljust(4, b"\0"))
            begin = file.tell() + sum(lengths)
            # Asked before reading: room is made for as many bytes as are said to be there.
            if begin + member.file_size > os.fstat(file.fileno()).st_size:
                raise CorruptEntryError(f"{name} ends too early")

            def first(nbytes: int) -> memoryview:
                data = memoryview(bytearray(nbytes))
                file.seek(begin)
                return data[: file.readinto(data)]

            yield first, member.file_size

    def _refuse(self) -> NoReturn:
        raise OSError(errno.EROFS, "an archive can only be read", os.fspath(self.path))


def _manifest(origin: Origin, cue: bytes | None, records: Mapping[str, Record]) -> str:
    about = {
        "magic": MAGIC,
        "format": FORMAT,
        "origin": origin.to_dict(),
        "cue": None if cue is None else _sha256(cue),
        "entries": len(records),
        "records": {key: asdict(record) for key, record in records.items()},
    }
    return json.dumps(about, indent=1)


def _has(store: MutableMapping[str, AnchorKV], key: str, record: Record) -> bool:
    """Whether a store has as much of a chunk as an archive, and its documents."""
    try:
        if isinstance(store, PartialStore):
            _, num_entries = store.extent(key)
        else:
            num_entries = store[key].num_entries
        documents = store.documents(key) if isinstance(store, DocumentStore) else record.documents
    except KeyError:
        return False
    return num_entries >= record.num_entries and set(record.documents) <= set(documents)


def _is_record(record: Record) -> bool:
    texts = (*record.documents, "" if record.text_id is None else record.text_id)
    return (
        type(record.num_tokens) is int
        and type(record.num_entries) is int
        and isinstance(record.sha256, str)
        and _DIGEST.fullmatch(record.sha256) is not None
        and all(isinstance(text, str) for text in texts)
    )


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)  # of 1980: equal contents are equal archives
    member.external_attr = 0o600 << 16
    return member


def _place(key: str) -> str:
    return f"entries/{key}.kv"


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _require_free(path: Path) -> None:
    if path.exists():
        raise FileExistsError(errno.EEXIST, "there is something already; give another name", path)


@dataclass(frozen=True)
class Exported:
    """What came of an export.

    Attributes:
        written: Entries in the archive.
        others: Entries of other compressors, left out.
        bad: What was wrong with entries that could not be read, and were left out.
    """

    written: int
    others: int
    bad: tuple[str, ...]


def export(
    store: MutableMapping[str, AnchorKV],
    path: str | os.PathLike[str],
    origin: Origin,
    *,
    decrypt: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Exported:
    """Writes a store's entries of one fingerprint into an archive.

    Args:
        store: A DiskStore; it may be read-only. Its entries stay there.
        path: A file that is not there yet.
        origin: What made the entries to write.
        decrypt: Must be said for an encrypted store: whoever has the archive has what is in it.
        on_progress: Called with the number of entries looked at since the last call.

    Raises:
        TypeError: for another store: it does not know what made its entries.
        ValueError: for an encrypted store, without `decrypt`.
        FileExistsError: if there is something at the path.
        OSError: if the store cannot be read or the archive not be written.
    """
    if not isinstance(store, DiskStore):
        raise TypeError(f"only a DiskStore can be exported, was: {type(store).__name__}")
    if store.is_encrypted and not decrypt:
        raise ValueError(
            f"{store.folder} is encrypted, and an archive is not: who gets hold of it could tell "
            "what the documents say; ask for decrypting (decrypt=True, --decrypt) if that is "
            "meant, and carry the archive on an encrypted way only"
        )
    others = 0
    bad: list[str] = []

    def entries() -> Iterator[Entry]:
        nonlocal others
        for key in store:
            text_id, fingerprint = store.origin(key)
            if fingerprint != origin.fingerprint:
                others += 1
            else:
                try:
                    yield key, store[key], store.documents(key), text_id
                except CorruptEntryError as error:
                    bad.append(f"{key}: {error}")
                except KeyError:
                    pass  # evicted or forgotten meanwhile
            if on_progress is not None:
                on_progress(1)

    written = write(path, origin, entries())
    return Exported(written, others, tuple(bad))
