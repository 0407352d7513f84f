"""The encryption key of a DiskStore: required at its opening, changed by `rekey`.

While a change is not finished, the index has the id of the next key beside that of the store's, and
an entry is in one of the two. The store is opened with the old key until all are in the new one.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from typing import TYPE_CHECKING

from sac_rag import forks
from sac_rag.errors import CorruptEntryError
from sac_rag.stores.disk.entries import Entries
from sac_rag.stores.disk.index import IndexRow, NewEntry, described, key_id
from sac_rag.stores.disk.maintenance import Progress
from sac_rag.stores.entry import reencrypt

if TYPE_CHECKING:
    from sac_rag.stores.cipher import Cipher

# Entries written meanwhile that are re-encrypted while nobody else can write; more are first taken
# in another turn without the lock, but not for ever.
_FEW = 64
_TURNS = 4


def unlock(entries: Entries, cipher: Cipher | None, read_only: bool) -> None:
    """Checks that a store is opened with its key; a new store takes the one it is opened with.

    Raises:
        ValueError: if it has another.
    """
    index = entries.index
    if not read_only and index.meta("cipher") is None:
        # Of several that open a new store at once, the first decides.
        index.set_meta("cipher", key_id(cipher), replace=False)
    recorded = index.recorded_cipher
    if key_id(cipher) != recorded:
        remedy = "give its own, or change it with `sac-rag store rekey`"
        if index.next_cipher == key_id(cipher):
            remedy = "its change to that is not finished: repeat `sac-rag store rekey`"
        raise ValueError(
            f"{entries.folder} is {described(recorded)}, and was opened with "
            f"{'no key' if cipher is None else f'key {cipher.id}'}; {remedy}"
        )
    index.cipher = cipher


def rekey(entries: Entries, new: Cipher | None, on_progress: Progress | None = None) -> int:
    """Re-encrypts every entry, one by one, and only then records the store's new key.

    With the store's own key, takes an unfinished change back.

    Raises:
        ValueError: if entries have neither the store's key nor the new one.
    """
    index, old = entries.index, entries.index.cipher
    index.require_cipher(old)
    is_change = key_id(old) != key_id(new)
    others = _others(entries, {key_id(old), key_id(new)})
    if is_change and others:
        raise ValueError(
            f"{sum(others.values())} entries of {entries.folder} are "
            f"{' or '.join(map(described, others))}, by a change of the key that was not finished; "
            "finish it first, with that key as the new one, or take it back, which deletes "
            "these entries: with the store's own key as the new one"
        )
    if not is_change and not others and index.next_cipher is None:
        return 0
    with forks.held_off(), index.transaction():
        index.set_meta("rekey", key_id(new))
    count, last = 0, None
    for turn in itertools.count(1):
        for row in index.rows():
            if _needs(entries, row, new):
                count += _reencrypt(entries, row, old, new)
            if on_progress is not None:
                on_progress(row.size or 0)
        on_progress = None  # what is left was written meanwhile
        last = _finish(entries, old, new, _FEW if turn < _TURNS else sys.maxsize)
        if last is not None:
            break
    entries.empty_quarantine()  # it still has the old key, or none
    entries.scrub()
    return count + (last or 0)


def _finish(entries: Entries, old: Cipher | None, new: Cipher | None, most: int) -> int | None:
    """Re-encrypts what is left and records the new key, while nobody else can write.

    Returns:
        The number of entries re-encrypted; None if more than `most` are left, or a bad one.
    """
    index = entries.index
    try:
        with contextlib.ExitStack() as files:  # closed behind the COMMIT
            with forks.held_off(), index.transaction():
                left = [row for row in index.rows() if _needs(entries, row, new)]
                if len(left) > most:
                    return None
                for row in left:
                    data = reencrypt(entries.files.read(row), old, new)
                    written = entries.files.written(row.key, data, entries.has_row)
                    entry = NewEntry(row.key, stored=row.stored)
                    index.add(entry, files.enter_context(written), len(data))
                index.reencrypt_documents(new)
                index.set_meta("cipher", key_id(new))
                index.set_meta("rekey", None)
                # Before the COMMIT: from then on other threads of this object write with it.
                index.cipher = new
            for row in left:
                entries.files.remove(row)
            return len(left)
    except CorruptEntryError:
        return None
    except BaseException:
        index.cipher = old if index.recorded_cipher == key_id(old) else new
        raise


def _reencrypt(entries: Entries, row: IndexRow, old: Cipher | None, new: Cipher | None) -> bool:
    """Whether an entry was written again; one that cannot be read is moved to quarantine."""
    current: IndexRow | None = row
    while current is not None:
        try:
            data = reencrypt(entries.files.read(current), old, new)
            if entries.replace(current, data):
                return True
        except FileNotFoundError:
            entries.index.database.require_file()
        except CorruptEntryError as problem:
            if entries.quarantine(current, problem.reason):
                return False
        latest = entries.index.row(row.key)  # rewritten meanwhile?
        current = None if current.same_entry(latest) else latest
    return False


def _needs(entries: Entries, row: IndexRow, new: Cipher | None) -> bool:
    """Whether an entry is not encrypted with the new key yet."""
    try:
        return entries.cipher_of(row) != key_id(new)
    except FileNotFoundError:
        return False
    except CorruptEntryError:
        return True


def _others(entries: Entries, expected: set[str]) -> dict[str, int]:
    """Number of entries by the id of their key, for all but the expected ones."""
    counts: dict[str, int] = {}
    for row in entries.index.rows():
        try:
            recorded = entries.cipher_of(row)
        except (FileNotFoundError, CorruptEntryError):
            continue
        if recorded not in expected:
            counts[recorded] = counts.get(recorded, 0) + 1
    return counts
