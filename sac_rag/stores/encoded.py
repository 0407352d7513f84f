"""EncodedStore: what every store shares that keeps entries as bytes somewhere else.

Fingerprint, checksum and encryption are those of `entry.py`, whatever the bytes are kept in: a
backend moves bytes and records, and neither reads nor trusts them.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sac_rag import forks
from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.stores.base import DocumentStore, Wanted, strings
from sac_rag.stores.entry import FORMAT, HEADER_LIMIT, decode, decode_first, encode, is_key

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

Read: TypeAlias = AnchorKV | KeyError | OSError


@dataclass(frozen=True)
class Piece:
    """The first bytes of an entry, at least as many as were asked for, or all.

    Attributes:
        data: The bytes.
        total: Bytes of the whole entry.
    """

    data: bytes
    total: int


class _MoreNeeded(Exception):
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class EncodedStore(DocumentStore):
    """A store of entries in the bytes of `entry.py`, read several at once.

    Args:
        cipher: Encrypts the entries and the documents' ids; None stores unencrypted.

    Attributes:
        counters: Hits, misses and their reasons, as far as this object has met them.
    """

    remembers_documents = True
    reads_many = True

    def __init__(self, cipher: Cipher | None) -> None:
        self._cipher = cipher
        self.counters: Counter[str] = Counter()
        self._counting = forks.lock(self, "_counting")

    @abstractmethod
    def _fetch(self, asked: Mapping[str, int | None]) -> Mapping[str, Piece | None]:
        """The first bytes of entries, None for all of them; None or nothing if there is none.

        Raises:
            OSError: if the backend cannot be read.
        """

    @abstractmethod
    def _drop_bad(self, key: str, piece: Piece, error: CorruptEntryError) -> bool:
        """Removes a bad entry if that is safe; False if it is no longer the one that was read."""

    def __getitem__(self, key: str) -> AnchorKV:
        """Reads an entry.

        Raises:
            KeyError: if there is none; a `CorruptEntryError` if there was one and it was bad.
            OSError: if the backend cannot be read.
        """
        return self._one(key, None)

    def read(self, key: str, wanted: Wanted) -> AnchorKV:
        """Reads an entry's first KV entries, and little more unless it is encrypted."""
        return self._one(key, wanted)

    def read_many(self, wanted: Mapping[str, Wanted | None]) -> dict[str, Read]:
        """Reads several entries in two round trips at most, one where all of each is read."""
        results: dict[str, Read] = {key: KeyError(key) for key in wanted if not is_key(key)}
        asked = {
            key: None if count is None else HEADER_LIMIT
            for key, count in wanted.items()
            if key not in results
        }
        replaced: set[str] = set()
        while asked:
            try:
                pieces = self._fetch(asked)
            except OSError as error:
                results.update(dict.fromkeys(asked, error))
                break
            again: dict[str, int | None] = {}
            for key, nbytes in asked.items():
                piece = pieces.get(key)
                if piece is None:
                    results[key] = KeyError(key)
                    continue
                try:
                    results[key] = self._decoded(key, piece, nbytes, wanted[key])
                except _MoreNeeded as more:
                    again[key] = more.nbytes
                except CorruptEntryError as error:
                    results[key] = error
                    if key not in replaced and not self._drop_bad(key, piece, error):
                        replaced.add(key)
                        again[key] = nbytes
            asked = again
        self._count_reads(results)
        return {key: results[key] for key in wanted}

    @property
    def is_encrypted(self) -> bool:
        """Whether it takes a key to read the entries."""
        return self._cipher is not None

    def _one(self, key: str, wanted: Wanted | None) -> AnchorKV:
        entry = self.read_many({key: wanted})[key]
        if isinstance(entry, AnchorKV):
            return entry
        raise entry

    def _decoded(
        self, key: str, piece: Piece, nbytes: int | None, wanted: Wanted | None
    ) -> AnchorKV:
        if wanted is None:
            return decode(key, piece.data, self._cipher)
        view = memoryview(bytearray(piece.data))

        def first(needed: int) -> memoryview:
            if needed > len(view) and nbytes is not None and len(view) >= min(nbytes, piece.total):
                raise _MoreNeeded(needed)
            return view[:needed]

        return decode_first(key, first, piece.total, wanted, self._cipher)

    def _count_reads(self, results: Mapping[str, Read]) -> None:
        with self._counting:
            for entry in results.values():
                self.counters["hits" if isinstance(entry, AnchorKV) else "misses"] += 1
                if isinstance(entry, CorruptEntryError):
                    self.counters[f"miss.{entry.reason}"] += 1
                elif isinstance(entry, OSError):
                    self.counters["miss.unreadable"] += 1

    def _count(self, name: str, number: int = 1) -> None:
        with self._counting:
            self.counters[name] += number

    def _encoded(self, key: str, kv: AnchorKV, fingerprint: str | None) -> bytes:
        return encode(key, kv, self._cipher, fingerprint or "")

    @property
    def _codec(self) -> str:
        """How entries are written that this object can read: format and id of the cipher's key."""
        return f"{FORMAT}:{'' if self._cipher is None else self._cipher.id}"

    def _seal(self, document: str) -> str:
        if self._cipher is None:
            return document
        return self._cipher.seal(document.encode("utf-8", "surrogatepass")).hex()

    def _unsealed(self, sealed: Iterable[str]) -> tuple[str, ...]:
        """Ids of documents, sorted, without those that another key has encrypted."""
        if self._cipher is None:
            return tuple(sorted(sealed))
        documents = []
        for name in sealed:
            with contextlib.suppress(ValueError):
                clear = self._cipher.unseal(bytes.fromhex(name))
                documents.append(clear.decode("utf-8", "surrogatepass"))
        return tuple(sorted(documents))


def kept_keys(documents: Mapping[str, Iterable[str]]) -> dict[str, frozenset[str]]:
    """Arguments of `replace_documents`, checked.

    Raises:
        TypeError: for an id that is no str, or keys that are one str.
    """
    strings(documents, "document ids")
    return {name: frozenset(strings(k, "keys of a document")) for name, k in documents.items()}
