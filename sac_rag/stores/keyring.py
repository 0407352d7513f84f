"""Which key encrypts a DiskStore, and another in its place. Knows nothing of encryption itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sac_rag.errors import CorruptEntry
from sac_rag.stores.documents import Plain
from sac_rag.stores.entries import Entries
from sac_rag.stores.entry import reencrypt
from sac_rag.stores.index import Row
from sac_rag.stores.upkeep import Progress

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

_PLAIN = ""  # the id that stands for no key


def unlock(entries: Entries, cipher: Cipher | None, read_only: bool) -> None:
    """Sees that a store is opened with its own key; a new store takes the one that is given.

    Raises:
        ValueError: if it has another.
    """
    given = _id(cipher)
    if not read_only and entries.index.meta("cipher") is None:
        # Of several that open a new store at once, the first decides.
        entries.index.sql("INSERT OR IGNORE INTO Meta VALUES ('cipher', ?)", (given,))
    own = entries.index.meta("cipher") or _PLAIN
    if given != own:
        raise ValueError(
            f"{entries.folder} is {_described(own)}, and was opened with "
            f"{f'key {given}' if given else 'no key'}; give its own, or change it with "
            "`sac-rag store rekey`"
        )
    entries.documents.sealing = Plain() if cipher is None else cipher


def rekey(
    entries: Entries, old: Cipher | None, new: Cipher | None, on_progress: Progress | None = None
) -> int:
    """Encrypts every entry anew, one by one, and only then says that the store has another key."""
    if _id(old) == _id(new):
        return 0
    done = 0
    for row in entries.index.rows():
        found: Row | None = row
        while found is not None:
            try:
                data = reencrypt(entries.files.read(found), old, new)
            except FileNotFoundError:
                pass
            except CorruptEntry as problem:
                # With reason "key" it is done already, by a run that was killed.
                if problem.reason == "key" or entries.set_aside(found, problem.reason):
                    break
            else:
                if entries.replace(found, data):
                    done += 1
                    break
            newer = entries.index.row(row.key)  # written anew meanwhile?
            found = None if found.same_entry(newer) else newer
        if on_progress is not None:
            on_progress(row.size or 0)
    with entries.index.transaction():
        entries.documents.reseal(Plain() if new is None else new)
        entries.index.set_meta("cipher", _id(new))
    entries.empty_quarantine()  # which is encrypted as it was, or not at all
    entries.scrub()
    return done


def _id(cipher: Cipher | None) -> str:
    return _PLAIN if cipher is None else cipher.id


def _described(key: object) -> str:
    return f"encrypted with key {key!s:.20}" if key != _PLAIN else "not encrypted"
