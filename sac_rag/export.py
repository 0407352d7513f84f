"""Picks a store's entries for an archive. Knows nothing of what an archive looks like."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass

from sac_rag.archive import Entry, write
from sac_rag.errors import CorruptEntry
from sac_rag.kv import AnchorKV
from sac_rag.origin import Origin
from sac_rag.stores.disk import DiskStore


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
                except CorruptEntry as error:
                    bad.append(f"{key}: {error}")
                except KeyError:
                    pass  # evicted or forgotten meanwhile
            if on_progress is not None:
                on_progress(1)

    written = write(path, origin, entries())
    return Exported(written, others, tuple(bad))
