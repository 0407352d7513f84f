"""Why entries are no longer there, for the last hundred thousand. Knows nothing of their text."""

from __future__ import annotations

import hashlib

from sac_rag.stores.disk.index import Index

LIMIT = 100_000  # of about 60 bytes each


class Departed:
    """Reasons by a keyed digest of the key. What changes something belongs in a transaction.

    The key itself is not kept: where the namespace is known, it would tell whoever can guess the
    text of a forgotten document that it had been here.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        salt = index.meta("salt")
        self._salt = salt if isinstance(salt, bytes) and 0 < len(salt) <= 64 else b"\0"

    def note(self, key: str, reason: str) -> None:
        """Remembers why an entry is gone, and drops the oldest memories beyond the limit."""
        replace = "INSERT OR REPLACE INTO Departed (digest, reason) VALUES (?, ?)"
        last = self._index.sql(replace, (self._digest(key), reason)).lastrowid
        self._index.sql("DELETE FROM Departed WHERE number <= ?", ((last or 0) - LIMIT,))

    def returned(self, key: str) -> None:
        """The entry is there again."""
        self._index.sql("DELETE FROM Departed WHERE digest = ?", (self._digest(key),))

    def reason(self, key: str) -> str | None:
        """Why an entry is gone; None if nothing is known of it."""
        select = "SELECT CAST(reason AS TEXT) FROM Departed WHERE digest = ?"
        found = self._index.sql(select, (self._digest(key),)).fetchone()
        return None if found is None else str(found[0])

    def _digest(self, key: str) -> bytes:
        return hashlib.blake2b(key.encode(), key=self._salt, digest_size=16).digest()
