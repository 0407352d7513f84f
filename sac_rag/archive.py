"""Archives: a precompressed corpus in one file, written from a store and served on any machine.

An archive is an uncompressed ZIP file, so that any unzip can list it and each entry is read alone:

    entries/<key>.kv    one chunk's KV as a store writes it, unencrypted (see stores/entry.py)
    cue.safetensors     the compressor's cue, if it has one
    manifest.json       what made the chunks, and a digest of every other file

The digests detect damage. They do not authenticate the writer: use archives only from sources that
you would use a model from, and protect them like the text, because an archive is not encrypted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import struct
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
from sac_rag.stores.base import DocumentStore, Wanted, as_document_store, strings
from sac_rag.stores.disk import DiskStore
from sac_rag.stores.entry import decode, decode_first, encode, is_key
from sac_rag.whole_file import owner_only, require_free, whole_file

MAGIC = "sac_rag.archive"
FORMAT = 2

_MANIFEST, _CUE = "manifest.json", "cue.safetensors"
_NAME_LENGTH_AT = 26  # in a ZIP member's header: lengths of its name and extra field
_DIGEST = re.compile("[0-9a-f]{64}")

# (key, KV, documents, text id)
Entry: TypeAlias = tuple[str, AnchorKV, Iterable[str], str | None]


@dataclass(frozen=True)
class Record:
    """One entry in the manifest.

    Attributes:
        sha256: Digest of its bytes in the archive.
        num_tokens: Source tokens in the chunk.
        num_entries: KV entries of the chunk.
        documents: Ids of the documents that contain the text.
        text_id: See `namespace.Namespace.text_id`; None if the store has none.
    """

    sha256: str
    num_tokens: int
    num_entries: int
    documents: tuple[str, ...] = ()
    text_id: str | None = None


def write(path: str | os.PathLike[str], origin: Origin, entries: Iterable[Entry]) -> int:
    """Writes an owner-only (0600) archive, atomically.

    Args:
        path: A file that does not exist.
        origin: What made the entries.
        entries: Read one by one, never all in memory.

    Returns:
        Number of entries written.

    Raises:
        FileExistsError: if the path exists.
        OSError: if the archive cannot be written.
        TypeError: for documents that are one str.
    """
    path = Path(path)
    require_free(path)
    records: dict[str, Record] = {}
    fingerprint = origin.fingerprint
    with whole_file(path) as draft:
        with open(draft, "xb", opener=owner_only) as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for key, kv, documents, text_id in entries:
                    data = encode(key, kv, fingerprint=fingerprint)
                    archive.writestr(_member(_place(key)), data)
                    records[key] = Record(
                        _sha256(data),
                        kv.num_tokens,
                        kv.num_entries,
                        tuple(sorted(strings(documents, "documents"))),
                        text_id,
                    )
                cue = None
                if origin.cue is not None:
                    cue = save({"cue": origin.cue.detach().cpu().float().contiguous()})
                    archive.writestr(_member(_CUE), cue)
                archive.writestr(_member(_MANIFEST), _manifest(origin, cue, records))
            file.flush()
            os.fsync(file.fileno())
        require_free(path)
    return len(records)


class Archive(DocumentStore):
    """An archive as a read-only store. May be shared by threads and processes.

    Attributes:
        origin: What made the entries.
        records: The manifest's record of each, by key.

    Raises:
        ValueError: if the file is no archive, or has another format.
        OSError: if it cannot be read.
    """

    read_only = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is no archive of sac_rag: it is no plain file")
        try:
            with zipfile.ZipFile(self.path) as file:
                self._members = {member.filename: member for member in file.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ValueError(f"{self.path} is no archive of sac_rag: {error}") from error
        self.origin, self.records = self._open()

    def __getitem__(self, key: str) -> AnchorKV:
        """Reads an entry.

        Raises:
            KeyError: if there is no entry; a `CorruptEntryError` if it is damaged.
            OSError: if the file cannot be read.
        """
        if key not in self.records:
            raise KeyError(key)
        return decode(key, self._read(_place(key)))

    def read(self, key: str, wanted: Wanted) -> AnchorKV:
        """Reads only the first KV entries of an entry; see `stores.base`.

        Raises:
            KeyError: if there is no entry; a `CorruptEntryError` if what is read is damaged.
            OSError: if the file cannot be read.
            ValueError: if fewer than 1 are wanted.
        """
        if key not in self.records:
            raise KeyError(key)
        with self._opened(_place(key)) as (first, nbytes):
            return decode_first(key, first, nbytes, wanted)

    def extent(self, key: str) -> tuple[int, int]:
        """Source tokens and KV entries of a chunk, from the manifest."""
        record = self.records[key]
        return record.num_tokens, record.num_entries

    def origin_of(self, key: str) -> tuple[str | None, str | None]:
        """The text id of an entry, and the fingerprint of all."""
        record = self.records.get(key)
        return (None, None) if record is None else (record.text_id, self.origin.fingerprint)

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
        """Reads every entry; returns one problem per damaged entry."""
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
        """Copies verified entries into a store, except those that it has.

        An entry with more KV entries than the store has replaces the store's. An interrupted copy
        can be repeated: entries that the store has with their documents are not read.

        Returns:
            Number of entries that were copied or got documents.

        Raises:
            CorruptEntryError: at the first damaged entry; those before it are stored.
            OSError: if the store cannot be written.
        """
        copied = 0
        fingerprint = self.origin.fingerprint
        target = as_document_store(store)
        target.note(fingerprint, self.origin.fields)
        for key, record in self.records.items():
            if not _has(target, key, record):
                kv = self._verified(key, record)
                target.put(
                    key, kv, record.documents, text_id=record.text_id, fingerprint=fingerprint
                )
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
                f"{FORMAT}; upgrade sac_rag, or export it again"
            )
        cue = None
        if about["cue"] is not None:
            data = self._read(_CUE)
            if _sha256(data) != about["cue"]:
                raise ValueError("the cue is not the one that was written")
            cue = load(bytes(data))["cue"]
        origin = Origin.from_dict(about["origin"], cue)
        records = {
            key: Record(**{**record, "documents": tuple(strings(record["documents"], "documents"))})
            for key, record in about["records"].items()
        }
        entries = self._members.keys() - {_MANIFEST, _CUE}
        if not all(map(is_key, records)) or entries != set(map(_place, records)):
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
        """A function that reads the first bytes of a member, and the member's size."""
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED:
            raise CorruptEntryError(f"{name} is compressed")
        # Opened for each read: forked processes would share the position in an open file.
        with self.path.open("rb") as file:
            file.seek(member.header_offset + _NAME_LENGTH_AT)
            lengths = struct.unpack("<HH", file.read(4).ljust(4, b"\0"))
            begin = file.tell() + sum(lengths)
            # Checked before reading: memory is allocated for the size that the header declares.
            if begin + member.file_size > os.fstat(file.fileno()).st_size:
                raise CorruptEntryError(f"{name} ends too early")

            def first(nbytes: int) -> memoryview:
                data = memoryview(bytearray(nbytes))
                file.seek(begin)
                return data[: file.readinto(data)]

            yield first, member.file_size

    def _refuse(self) -> NoReturn:
        raise OSError(errno.EROFS, "an archive can only be read", os.fspath(self.path))


@dataclass(frozen=True)
class Exported:
    """Result of `export`.

    Attributes:
        written: Number of entries in the archive.
        others: Number of entries of other compressors, which were skipped.
        bad: One problem per entry that could not be read and was skipped.
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
        store: A DiskStore, which may be read-only. It is not changed.
        path: A file that does not exist.
        origin: What made the entries to write.
        decrypt: Must be True for an encrypted store, because the archive is not encrypted.
        on_progress: Called with the number of entries visited since the last call.

    Raises:
        TypeError: for any other store, which does not record what made its entries.
        ValueError: for an encrypted store without `decrypt`.
        FileExistsError: if the path exists.
        OSError: if the store cannot be read or the archive cannot be written.
    """
    if not isinstance(store, DiskStore):
        name = as_document_store(store).type_name
        raise TypeError(f"only a DiskStore can be exported, was: {name}")
    if store.is_encrypted and not decrypt:
        raise ValueError(
            f"{store.folder} is encrypted, and an archive is not: its reader could reconstruct "
            "what the documents say; give decrypt=True (--decrypt) if that is meant, and transfer "
            "the archive over an encrypted channel only"
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
                    pass  # evicted or forgotten since it was listed
            if on_progress is not None:
                on_progress(1)

    written = write(path, origin, entries())
    return Exported(written, others, tuple(bad))


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


def _has(store: DocumentStore, key: str, record: Record) -> bool:
    """Whether a store has all KV entries and documents that an archive has of a chunk."""
    try:
        _, num_entries = store.extent(key)
        documents = store.documents(key) if store.remembers_documents else record.documents
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
    member = zipfile.ZipInfo(name)  # dated 1980: equal contents make equal archives
    member.external_attr = 0o600 << 16
    return member


def _place(key: str) -> str:
    return f"entries/{key}.kv"


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
