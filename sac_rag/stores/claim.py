"""What a DiskStore's folder says of itself, in store.json. Knows nothing of what else is in it."""

from __future__ import annotations

import json
from pathlib import Path

from sac_rag.stores.files import make_folder, write_whole

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
