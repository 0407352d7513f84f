"""What the fingerprints in a store are made of, one JSON file each. Knows nothing of entries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sac_rag.stores.entry import is_key
from sac_rag.stores.files import make_folder, write_whole

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
