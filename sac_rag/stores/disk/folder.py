"""What a DiskStore's folder says of itself: store.json and the fields of fingerprints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sac_rag.stores.disk.files import make_folder, read_plain, write_whole
from sac_rag.stores.entry import is_key
from sac_rag.stores.fingerprints import (
    Fields,
    fields_from_json,
    fields_to_json,
    nearest,
    require_fields,
)

MAGIC = "sac_rag.DiskStore"
FORMAT = 3
_UPGRADABLE = (1, 2)
_LIMIT = 2**20  # bytes of a manifest; ours have two or three thousand


def open_folder(folder: Path, read_only: bool = False) -> int:
    """Makes a folder a store, or checks that it is a readable one; returns its format.

    Raises:
        ValueError: if it holds something else, or a store of a format that cannot be used.
        FileNotFoundError: if there is none and it may only be read.
    """
    path = folder / "store.json"
    if read_only:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no store at {folder}")
    else:
        make_folder(folder)
    if not path.exists():
        names = {other.name for other in folder.iterdir()}
        foreign = sorted(name for name in names if not name.startswith(path.name))
        if read_only or (foreign and not path.exists()):  # another may have made it just now
            raise ValueError(
                f"{folder} is {_described(foreign)}; give the folder of a store"
                f"{'' if read_only else ', or an empty one'}"
            )
        write_format(folder)
    try:
        content = json.loads(read_plain(path, 4096))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not that of a store: {error}") from error
    if not isinstance(content, dict) or content.get("magic") != MAGIC:
        raise ValueError(f"{path} does not say {MAGIC!r}, was: {content!r:.100}")
    version = content.get("format")
    if type(version) is not int or version not in (*_UPGRADABLE, FORMAT):
        raise ValueError(
            f"{folder} is a store of format {version!r:.20}, this version of sac_rag "
            f"reads format {FORMAT}; upgrade sac_rag or give another folder"
        )
    if version != FORMAT and read_only:
        raise ValueError(
            f"{folder} is a store of format {version}, this version of sac_rag reads format "
            f"{FORMAT}; open it once with write permission to upgrade it"
        )
    return version


def write_format(folder: Path) -> None:
    """Records in store.json that a folder is a store of the current format."""
    write_whole(folder / "store.json", json.dumps({"magic": MAGIC, "format": FORMAT}).encode())


class Manifests:
    """Fields of fingerprints, one JSON file each.

    Args:
        folder: The store's.
        read_only: Fields are remembered by this object and not written.
    """

    def __init__(self, folder: Path, read_only: bool) -> None:
        self.folder = folder / "fingerprints"
        self._read_only = read_only
        self._remembered: dict[str, Fields] = {}

    def note(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        """Writes the fields of a fingerprint, unless they are there.

        Raises:
            ValueError: if the fingerprint is not a hex digest.
            TypeError: if a field is not a str.
        """
        require_fields(fingerprint, fields)
        self._remembered[fingerprint] = dict(fields)
        if not self._read_only and self._read(fingerprint) != dict(fields):
            make_folder(self.folder, parents=False)
            write_whole(self.folder / f"{fingerprint}.json", fields_to_json(fields))

    def fields(self, fingerprint: str) -> Fields | None:
        """The fields of a fingerprint; None if there are none that can be read."""
        return self._remembered.get(fingerprint) or self._read(fingerprint)

    def nearest(self, olds: Sequence[str], new: str) -> str:
        """How a fingerprint differs from the most similar of others, as "name was …, is …"."""
        return nearest(olds, new, self.fields)

    def _read(self, fingerprint: str) -> Fields | None:
        if not is_key(fingerprint):
            return None
        try:
            return fields_from_json(read_plain(self.folder / f"{fingerprint}.json", _LIMIT))
        except OSError:
            return None


def _described(foreign: list[str]) -> str:
    if not foreign:
        return "an empty folder and not a store"
    return f"not empty and not a store (it has {foreign[0]!r}, but no store.json)"
