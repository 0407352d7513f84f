"""What a DiskStore's folder says of itself, in store.json. Knows nothing of what else is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sac_rag.stores.disk.files import make_folder, write_whole
from sac_rag.stores.entry import is_key

MAGIC = "sac_rag.DiskStore"
FORMAT = 3
_UPGRADABLE = (1, 2)


def claim(folder: Path, read_only: bool = False) -> int:
    """Makes a folder a store, or sees that it is one that we can read; returns its format.

    Raises:
        ValueError: if it holds something else, or a store of a format that cannot be used.
        FileNotFoundError: if it is not there and may only be read.
    """
    path = folder / "store.json"
    if read_only:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no store at {folder}")
    else:
        make_folder(folder)
    if not path.exists():
        names = {other.name for other in folder.iterdir()}
        strange = sorted(name for name in names if not name.startswith(path.name))
        if read_only or (strange and not path.exists()):  # another may have claimed it just now
            raise ValueError(
                f"{folder} is {_described(strange)}; give the folder of a store"
                f"{'' if read_only else ', or an empty one'}"
            )
        state(folder)
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(4096))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not that of a store: {error}") from error
    if not isinstance(found, dict) or found.get("magic") != MAGIC:
        raise ValueError(f"{path} does not say {MAGIC!r}, was: {found!r:.100}")
    version = found.get("format")
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


def state(folder: Path) -> None:
    """Writes down that a folder is a store of the current format."""
    write_whole(folder / "store.json", json.dumps({"magic": MAGIC, "format": FORMAT}).encode())


def _described(strange: list[str]) -> str:
    if not strange:
        return "an empty folder and not a store"
    return f"not empty and not a store (it has {strange[0]!r}, but no store.json)"


_LIMIT = 2**20  # bytes; a manifest of ours has two or three thousand
_SHOWN = 24  # characters of a value: enough of a digest to tell two apart


class Manifests:
    """Fields of fingerprints, in a folder that is made when the first is noted.

    Args:
        folder: The store's.
        read_only: What is noted is remembered by this object and not written.
    """

    def __init__(self, folder: Path, read_only: bool) -> None:
        self.folder = folder / "fingerprints"
        self._read_only = read_only
        self._remembered: dict[str, dict[str, str]] = {}

    def note(self, fingerprint: str, fields: Mapping[str, str]) -> None:
        """Writes a manifest, unless it is there.

        Raises:
            ValueError: if the fingerprint is not a hex digest.
            TypeError: if a field is not a str.
        """
        if not is_key(fingerprint):
            raise ValueError(
                f"a fingerprint must be a lower-case hex digest, was: {fingerprint!r:.100}"
            )
        for name, value in fields.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"a fingerprint's fields must be str, {name!r} was: {value!r:.100}")
        self._remembered[fingerprint] = dict(fields)
        if not self._read_only and self._read(fingerprint) != dict(fields):
            make_folder(self.folder)
            text = json.dumps(dict(fields), indent=1, sort_keys=True)
            write_whole(self.folder / f"{fingerprint}.json", text.encode())

    def fields(self, fingerprint: str) -> dict[str, str] | None:
        """The fields noted for a fingerprint; None if there are none that can be read."""
        return self._remembered.get(fingerprint) or self._read(fingerprint)

    def nearest(self, olds: Sequence[str], new: str) -> str:
        """In what a fingerprint differs from the most similar of others, as "name was …, is …"."""
        known = [fields for old in olds if (fields := self._difference(old, new))]
        if not known:
            return f"was {olds[0]:.12}, is {new:.12}"
        fewest = min(len(fields) for fields in known)
        return "; ".join(next(fields for fields in known if len(fields) == fewest))

    def _difference(self, old: str, new: str) -> list[str]:
        before, after = self.fields(old), self.fields(new)
        if before is None or after is None:
            return []
        names = sorted(before.keys() | after.keys())
        return [
            f"{name} was {_shown(name, before)}, is {_shown(name, after)}"
            for name in names
            if before.get(name) != after.get(name)
        ]

    def _read(self, fingerprint: str) -> dict[str, str] | None:
        if not is_key(fingerprint):
            return None
        try:
            with (self.folder / f"{fingerprint}.json").open("rb") as file:
                found = json.loads(file.read(_LIMIT))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            return None
        return found


def _shown(name: str, fields: Mapping[str, str]) -> str:
    value = fields.get(name)
    if value is None:
        # A compressor's fingerprint covers only those of its config that are not at their default.
        return "its default" if name.startswith("config.") else "not there"
    return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
