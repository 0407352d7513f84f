"""The index of a DiskStore: one row per entry, and its documents, origin and past.

What diskcache does: it makes the SQLite file with the table Cache, its triggers that count entries
and bytes, its index by last use and its settings, and any diskcache.Cache can list the folder.
What it does not do: its transactions stay open where a COMMIT fails on a full disk, and its `set`
and `get` are transactions of their own, so that an entry could not appear together with its
documents; it evicts ten entries at a time, pinned ones too; it expires by the age given when an
entry was stored and not when it is read; its `get` for least-recently-used holds the write lock
while it reads the file, and unpickles what a row tells it to (CVE-2025-69872). Statements,
transactions and connections are therefore ours (database.py), and files are read and written by
`Files`, never by a diskcache.Disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diskcache.core import MODE_BINARY

from sac_rag.errors import CorruptEntryError
from sac_rag.stores.disk.database import Connection, open_database
from sac_rag.stores.entry import is_key

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

# A read renews an entry's last use only when that is this old. Renewing at every read writes at
# every read: 28 instead of 7 microseconds alone, but 8 milliseconds in a hundredth of the reads
# while others write. To a store of gigabytes, a minute is no difference.
RENEW_SECONDS = 60.0
_TOMBSTONES = 100_000  # of about 60 bytes each
_COUNT = "count."  # beginning of the names of counters in Meta
_UNENCRYPTED = ""  # the id that stands for no key

# CAST, since SQLite lets a column hold anything, even text that is not UTF-8. A key that is not a
# key of ours reads as "".
_SELECT = (
    "SELECT rowid, CASE WHEN raw = 1 AND typeof(key) = 'text' AND length(key) BETWEEN 1 AND 64"
    " AND key NOT GLOB '*[^0-9a-f]*' THEN key ELSE '' END, CAST(mode AS INTEGER),"
    " CAST(filename AS BLOB), CAST(size AS INTEGER), CAST(store_time AS REAL), tag IS NOT NULL,"
    " CAST(access_time AS REAL) FROM Cache"
)
# Of the entries whose extent is known. A sum of integers could overflow, a TOTAL of floats cannot.
_RATIO = "TOTAL(num_tokens * num_heads) / TOTAL(num_entries)"
_FILE_NAME = re.compile(r"([0-9a-f]{1,2})/([0-9a-f]{1,64})-[0-9a-f]{16}\.kv")


def key_of(name: str) -> str | None:
    """The key of an entry's file; None for any other name."""
    match = _FILE_NAME.fullmatch(name)
    return match[2] if match is not None and match[1] == match[2][:2] else None


class IndexRow(NamedTuple):
    """A row of the index as it was read; its contents are checked before they are followed."""

    rowid: int
    key: str
    mode: int | None
    filename: bytes | None
    size: int | None
    stored: float | None
    pinned: int
    used: float | None

    @classmethod
    def of_file(cls, key: str, name: str, size: int) -> IndexRow:
        """The row that an entry's file should have."""
        return cls(0, key, MODE_BINARY, name.encode(), size, None, 0, None)

    @property
    def name(self) -> str | None:
        """The entry's file, within the folder; None if the row is not one that we wrote."""
        name = (self.filename or b"").decode("ascii", "replace")
        return name if self.mode == MODE_BINARY and key_of(name) == self.key else None

    def same_entry(self, other: IndexRow | None) -> bool:
        """Whether the other row is of the same bytes: pins and last uses may differ."""
        return other is not None and self[:6] == other[:6]


class Extent(NamedTuple):
    """How much an entry holds of its chunk.

    Attributes:
        num_tokens: Source tokens in the chunk.
        num_entries: KV entries of all heads together.
        num_heads: KV heads of all layers together.
    """

    num_tokens: int
    num_entries: int
    num_heads: int


@dataclass(frozen=True)
class NewEntry:
    """What the index records of an entry beside its file; None leaves what is recorded.

    Attributes:
        key: A lower-case hex digest.
        extent: How much of the chunk it holds.
        documents: Ids to add to those of the key.
        text_id: The same for the same text whatever the fingerprint.
        fingerprint: What made the KV.
        stored: When it was stored, in seconds since 1970; None for now.
    """

    key: str
    extent: Extent | None = None
    documents: Iterable[str] = ()
    text_id: str | None = None
    fingerprint: str | None = None
    stored: float | None = None


def key_id(cipher: Cipher | None) -> str:
    """Public id of a cipher's key; "" for none."""
    return _UNENCRYPTED if cipher is None else cipher.id


def described(recorded: object) -> str:
    """What is encrypted with the key of this id, in words."""
    return f"encrypted with key {recorded!s:.20}" if recorded else "not encrypted"


class Totals(NamedTuple):
    """Figures of all entries; None where there are none. Times are in seconds since 1970."""

    entries: int
    nbytes: int | None
    ratio: float | None
    pinned: int | None
    oldest: float | None
    newest: float | None
    least_recent_use: float | None


class Index:
    """Tables of all entries. What changes an entry must be inside of a transaction.

    Attributes:
        database: Connections and transactions.
        cipher: Encrypts document ids; None keeps them as they are.
    """

    def __init__(self, folder: Path, max_bytes: int, read_only: bool) -> None:
        self.cipher: Cipher | None = None
        self.database = open_database(folder, max_bytes, read_only)
        try:
            salt = self.meta("salt")
        except BaseException:
            self.database.close()
            raise
        self._salt = salt if isinstance(salt, bytes) and 0 < len(salt) <= 64 else b"\0"

    def transaction(self, patience_s: float | None = None) -> Connection:
        """Begins a transaction as `Database.transaction` does, with the store's key only."""
        check = partial(self.require_cipher, self.cipher)
        return self.database.transaction(patience_s, check=check)

    # The store's key.

    @property
    def recorded_cipher(self) -> str:
        """Id of the store's key; "" for none."""
        return str(self.meta("cipher") or _UNENCRYPTED)

    @property
    def next_cipher(self) -> str | None:
        """Id of the key of a `rekey` that has begun and is not finished; None if there is none."""
        recorded = self.meta("rekey")
        return None if recorded is None else str(recorded)

    @property
    def has_one_cipher(self) -> bool:
        """Whether all entries should be encrypted with this object's key."""
        return self.next_cipher is None and self.recorded_cipher == key_id(self.cipher)

    def require_cipher(self, cipher: Cipher | None) -> None:
        """Raises PermissionError if another process has given the store another key."""
        recorded = self.recorded_cipher
        if not key_id(cipher) == key_id(self.cipher) == recorded:
            raise PermissionError(
                errno.EACCES,
                f"the store is {described(recorded)} by now, and was opened when it was "
                f"{described(key_id(cipher))}; open it again with its key",
                os.fspath(self.database.path),
            )

    # Entries.

    def add(self, entry: NewEntry, name: str, nbytes: int) -> None:
        """Records an entry in place of the key's, if there is one: pin and documents stay.

        Args:
            entry: What is recorded of it.
            name: Its file, within the folder.
            nbytes: Of the file.
        """
        now = time.time()
        stored = now if entry.stored is None else entry.stored
        fields = (stored, now, nbytes, MODE_BINARY, name)
        row = self.row(entry.key)
        if row is None:
            self._sql(
                "INSERT INTO Cache (store_time, access_time, size, mode, filename, key, raw)"
                " VALUES (?, ?, ?, ?, ?, ?, 1)",
                (*fields, entry.key),
            )
        else:
            self._sql(
                "UPDATE Cache SET store_time = ?, access_time = ?, size = ?, mode = ?,"
                " filename = ?, value = NULL WHERE rowid = ?",
                (*fields, row.rowid),
            )
        self.add_documents(entry.key, entry.documents)
        if entry.extent is not None:
            self._sql(
                "INSERT INTO Origin (key, num_tokens, num_entries, num_heads, text_id, fingerprint)"
                " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET"
                " num_tokens = excluded.num_tokens, num_entries = excluded.num_entries,"
                " num_heads = excluded.num_heads, text_id = IFNULL(excluded.text_id, text_id),"
                " fingerprint = IFNULL(excluded.fingerprint, fingerprint)",
                (entry.key, *entry.extent, entry.text_id, entry.fingerprint),
            )
        self._sql("DELETE FROM Departed WHERE digest = ?", (self._digest(entry.key),))

    def remove(
        self, row: IndexRow, reason: str | None, *, keep_documents: bool = False
    ) -> bytes | None:
        """Removes an entry.

        Args:
            row: Of the entry.
            reason: Recorded to explain later misses; None records nothing.
            keep_documents: Whether to keep the entry's documents, which tell whose bytes are in
                quarantine.

        Returns:
            What the row held in place of a file, which no row of ours does.
        """
        select = "SELECT CAST(value AS BLOB) FROM Cache WHERE rowid = ?"
        inline: bytes | None = self._sql(select, (row.rowid,))[0][0]
        self._sql("DELETE FROM Cache WHERE rowid = ?", (row.rowid,))
        self.remove_traces(row.key, reason, keep_documents=keep_documents)
        return inline

    def remove_traces(self, key: str, reason: str | None, *, keep_documents: bool = False) -> None:
        """Removes what is recorded of a key beside its row; see `remove`."""
        if not keep_documents:
            self._sql("DELETE FROM Owner WHERE key = ?", (key,))
        self._sql("DELETE FROM Origin WHERE key = ?", (key,))
        if reason is not None:
            replace = "INSERT OR REPLACE INTO Departed (digest, reason) VALUES (?, ?)"
            self._sql(replace, (self._digest(key), reason))
            delete = "DELETE FROM Departed WHERE number <= last_insert_rowid() - ?"
            self._sql(delete, (_TOMBSTONES,))

    def row(self, key: object) -> IndexRow | None:
        """The row of a key, or None."""
        if not is_key(key):
            return None
        fields = self._first(_SELECT + " WHERE key = ? AND raw = 1", (key,))
        return None if fields is None else IndexRow(*fields)

    def rows(self) -> Iterator[IndexRow]:
        """All rows, read a thousand at a time, so that no snapshot is held open meanwhile."""
        last = 0
        select = _SELECT + " WHERE rowid > ? ORDER BY rowid LIMIT 1000"
        while page := self._sql(select, (last,)):
            yield from map(IndexRow._make, page)
            last = page[-1][0]

    def least_recently_used(self, excluded: str) -> IndexRow | None:
        """The row to evict next: neither a pinned one nor that of the excluded key."""
        select = _SELECT + " WHERE tag IS NULL AND key != ? ORDER BY access_time LIMIT 1"
        fields = self._first(select, (excluded,))
        return None if fields is None else IndexRow(*fields)

    def pin(self, key: str, pinned: bool) -> bool:
        """Pins or unpins an entry; False if there is none."""
        update = "UPDATE Cache SET tag = ? WHERE key = ? AND raw = 1"
        self._sql(update, ("pinned" if pinned else None, key))
        return bool(self._sql("SELECT changes()")[0][0])

    def renew(self, row: IndexRow) -> None:
        """Records that an entry was used, if that was last recorded a while ago."""
        now = time.time()
        if row.used is None or abs(now - row.used) >= RENEW_SECONDS:
            update = "UPDATE Cache SET access_time = ? WHERE rowid = ?"
            self.database.best_effort(lambda: self._sql(update, (now, row.rowid)))

    @property
    def num_entries(self) -> int:
        """Number of entries, which a trigger keeps up to date."""
        return self.noted("count")

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, which a trigger keeps up to date."""
        return self.noted("size")

    # Documents.

    def documents(self, key: str, strict: bool = False) -> frozenset[str]:
        """The documents of an entry.

        Raises:
            CorruptEntryError: with `strict`, if one cannot be read; else it is left out.
        """
        self.require_cipher(self.cipher)
        select = "SELECT CAST(document AS BLOB) FROM Owner WHERE key = ?"
        names = set()
        for (sealed,) in self._sql(select, (key,)):
            try:
                names.add(self._unseal(sealed))
            except ValueError as error:
                if strict:
                    raise CorruptEntryError(f"its document ids cannot be read: {error}") from error
        return frozenset(names)

    def keys_of(self, document: str) -> list[str]:
        """Keys of a document's entries."""
        self.require_cipher(self.cipher)
        select = "SELECT key FROM Owner JOIN Cache USING (key) WHERE document = ? AND raw = 1"
        keys = self._sql(select, (self._seal(document),))
        return [key for (key,) in keys if is_key(key)]

    def add_documents(self, key: str, documents: Iterable[str]) -> None:
        """Records more documents for an entry."""
        for document in documents:
            sealed = self._seal(document)
            self._sql("INSERT OR IGNORE INTO Owner VALUES (?, ?)", (sealed, key))

    def disown(self, document: str, keep: Collection[str]) -> list[str]:
        """Takes a document from all entries except some; returns keys left without documents."""
        sealed = self._seal(document)
        select = "SELECT key FROM Owner WHERE document = ?"
        orphans = []
        for (key,) in self._sql(select, (sealed,)):
            if key in keep:
                continue
            self._sql("DELETE FROM Owner WHERE document = ? AND key = ?", (sealed, key))
            other = self._first("SELECT 1 FROM Owner WHERE key = ? LIMIT 1", (key,))
            if other is None and is_key(key):
                orphans.append(key)
        return orphans

    def num_documents(self) -> int:
        """Number of documents that have entries."""
        return int(self._sql("SELECT COUNT(DISTINCT document) FROM Owner")[0][0])

    def drop_unreadable_documents(self, key: str) -> None:
        """Removes those of an entry's documents that cannot be read."""
        select = "SELECT document, CAST(document AS BLOB) FROM Owner WHERE key = ?"
        for document, sealed in self._sql(select, (key,)):
            try:
                self._unseal(sealed)
            except ValueError:
                delete = "DELETE FROM Owner WHERE document = ? AND key = ?"
                self._sql(delete, (document, key))

    def reencrypt_documents(self, cipher: Cipher | None) -> None:
        """Encrypts every document id with another key, or none; drops those it cannot read."""
        for (sealed,) in self._sql("SELECT DISTINCT document FROM Owner"):
            try:
                name = sealed if self.cipher is None else self.cipher.unseal(sealed)
            except (TypeError, ValueError):
                self._sql("DELETE FROM Owner WHERE document = ?", (sealed,))
                continue
            update = "UPDATE OR REPLACE Owner SET document = ? WHERE document = ?"
            self._sql(update, (name if cipher is None else cipher.seal(name), sealed))

    # Origins and tombstones.

    def origin(self, key: str) -> tuple[str | None, str | None]:
        """The text id and the fingerprint recorded for an entry."""
        select = "SELECT text_id, fingerprint FROM Origin WHERE key = ?"
        text_id, fingerprint = self._first(select, (key,)) or (None, None)
        return text_id, fingerprint

    def add_origin(self, key: str, text_id: str | None, fingerprint: str | None) -> None:
        """Records the origin of an entry as far as it is not known."""
        self._sql(
            "UPDATE Origin SET text_id = IFNULL(text_id, ?),"
            " fingerprint = IFNULL(fingerprint, ?) WHERE key = ?",
            (text_id, fingerprint, key),
        )

    def extent(self, key: str) -> Extent | None:
        """How much an entry holds of its chunk; None if it is absent or of an old format."""
        columns = ", ".join(f"CAST({name} AS INTEGER)" for name in Extent._fields)
        select = f"SELECT {columns} FROM Origin WHERE key = ?"  # noqa: S608 (names of our own)
        numbers = self._first(select, (key,)) or (None,)
        return None if None in numbers else Extent(*numbers)

    def other_fingerprints(self, text_id: str, excluded: str) -> list[str]:
        """Fingerprints under which a text is stored, the last stored first."""
        select = (
            "SELECT fingerprint FROM Origin JOIN Cache USING (key) WHERE text_id = ?"
            " AND fingerprint IS NOT NULL AND fingerprint IS NOT ? ORDER BY store_time DESC"
        )
        return [str(name) for (name,) in self._sql(select, (text_id, excluded))]

    def keys_of_same_text(self, key: str) -> set[str]:
        """Keys of the entries of a key's text under all fingerprints."""
        text_id, _ = self.origin(key)
        select = "SELECT key FROM Origin WHERE text_id = ?"
        return {key for (key,) in self._sql(select, (text_id,))}

    def reason(self, key: str) -> str | None:
        """Why an entry was removed; None if nothing is recorded of it."""
        select = "SELECT CAST(reason AS TEXT) FROM Departed WHERE digest = ?"
        values = self._first(select, (self._digest(key),))
        return None if values is None else str(values[0])

    # Counters and other values of the store.

    def add_counts(self, counts: dict[str, int]) -> None:
        """Adds to counters; in the open transaction, if there is one."""
        rows = ", ".join("(?, ?)" for _ in counts)
        values = [part for name, count in counts.items() for part in (_COUNT + name, count)]
        self._sql(
            f"INSERT INTO Meta VALUES {rows} "  # noqa: S608 (nothing but question marks)
            "ON CONFLICT (name) DO UPDATE SET value = CAST(value AS INTEGER) + excluded.value",
            tuple(values),
        )

    def counts(self) -> dict[str, int]:
        """All counters."""
        select = "SELECT name, CAST(value AS INTEGER) FROM Meta WHERE name GLOB ?"
        rows = self._sql(select, (_COUNT + "*",))
        return {name.removeprefix(_COUNT): int(value or 0) for name, value in rows}

    def meta(self, name: str) -> Any:
        """A value of the store's own, or None."""
        values = self._first("SELECT value FROM Meta WHERE name = ?", (name,))
        return None if values is None else values[0]

    def set_meta(self, name: str, value: object, *, replace: bool = True) -> None:
        """Records a value of the store's own, None for none; or, without `replace`, a first one."""
        if value is None:
            self._sql("DELETE FROM Meta WHERE name = ?", (name,))
            return
        conflict = "REPLACE" if replace else "IGNORE"
        insert = f"INSERT OR {conflict} INTO Meta VALUES (?, ?)"  # noqa: S608 (words of our own)
        self._sql(insert, (name, value))

    # Figures.

    def totals(self) -> Totals:
        """Figures of all entries."""
        [fields] = self._sql(
            f"SELECT COUNT(*), SUM(size), {_RATIO}, SUM(tag IS NOT NULL), MIN(store_time),"  # noqa: S608
            " MAX(store_time), MIN(CASE WHEN tag IS NULL THEN access_time END)"
            " FROM Cache LEFT JOIN Origin USING (key)"
        )
        return Totals(*fields)

    def by_fingerprint(self) -> list[tuple[str | None, int, int, float | None]]:
        """Fingerprint, number of entries, their bytes and ratio; most entries first."""
        return self._sql(
            f"SELECT fingerprint, COUNT(*), IFNULL(SUM(size), 0), {_RATIO} FROM Cache"  # noqa: S608
            " LEFT JOIN Origin USING (key) GROUP BY fingerprint ORDER BY COUNT(*) DESC"
        )

    def _sql(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        return self.database.sql(statement, values)

    def _first(self, statement: str, values: tuple[Any, ...]) -> Any:
        return next(iter(self._sql(statement, values)), None)

    def noted(self, name: str) -> int:
        """A figure that triggers keep up to date: "count" or "size" of all entries."""
        select = "SELECT CAST(value AS INTEGER) FROM Settings WHERE key = ?"
        return int((self._first(select, (name,)) or [0])[0] or 0)

    def _digest(self, key: str) -> bytes:
        # Tombstones do not hold the key itself: where the namespace is known, it would tell whoever
        # can guess the text of a forgotten document that it was here.
        return hashlib.blake2b(key.encode(), key=self._salt, digest_size=16).digest()

    def _seal(self, document: str) -> bytes:
        # surrogatepass: half a surrogate pair is no valid text, but no reason to crash either.
        name = document.encode("utf-8", "surrogatepass")
        return name if self.cipher is None else self.cipher.seal(name)

    def _unseal(self, sealed: bytes) -> str:
        name = sealed if self.cipher is None else self.cipher.unseal(sealed)
        return name.decode("utf-8", "surrogatepass")
