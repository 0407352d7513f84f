"""The files of a DiskStore: one an entry, written once. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

import numpy as np

from sac_rag.errors import CorruptEntry
from sac_rag.stores.index import Row


class Files:
    """The files of the entries. Follows no name out of the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "entries"
        self.quarantine = folder / "quarantine"
        for path in (self.folder, self.quarantine):
            make_folder(path)

    def write(self, key: str, data: bytes) -> str:
        """Writes a new file, whole or not at all, and returns its name."""
        make_folder(self.folder / key[:2])
        name = f"{key[:2]}/{key}-{secrets.token_hex(8)}.kv"
        try:
            with open(self.folder / name, "xb", opener=owner_only) as file:
                file.write(data)
        except BaseException:
            self.unlink(name)
            raise
        return name

    def read(self, row: Row) -> memoryview:
        """The bytes of an entry, in memory of their own.

        Raises:
            CorruptEntry: if the row or the file is not as we write them.
            FileNotFoundError: if there is no file.
        """
        if row.name is None:
            raise CorruptEntry(
                f"its row is not one of a DiskStore (mode {row.mode}, file {row.filename!r:.200}); "
                "nothing was unpickled or opened"
            )
        path = self._path(row.name)
        size = path.stat().st_size
        if size != row.size:
            raise CorruptEntry(f"its file has {size} bytes, {row.size} were written")
        data = np.empty(size, dtype=np.uint8)  # unlike a bytearray, not filled with zeros first
        with path.open("rb") as file:
            return data.data[: file.readinto(data.data)]

    def remove(self, row: Row) -> None:
        """Deletes the file of a row that is no longer there, if the row was one of ours."""
        if row.name is not None:
            self.unlink(row.name)

    def unlink(self, name: str) -> None:
        """Deletes a file of this folder, if it is there and no link."""
        with contextlib.suppress(OSError, CorruptEntry):
            self._path(name).unlink()

    def set_aside(self, row: Row, inline: bytes | None) -> None:
        """Keeps the bytes of a bad entry in quarantine, as far as they are ours to move."""
        target = self.quarantine / row.key
        if inline is not None:
            path = target.with_suffix(".row")
            path.unlink(missing_ok=True)
            with open(path, "xb", opener=owner_only) as file:
                file.write(inline)
        if row.name is not None:
            with contextlib.suppress(FileNotFoundError, CorruptEntry):
                self._path(row.name).replace(target)

    def _path(self, name: str) -> Path:
        path = self.folder / name
        if not stat.S_ISDIR(path.parent.lstat().st_mode) or not stat.S_ISREG(path.lstat().st_mode):
            raise CorruptEntry(f"{path} is not a plain file in a folder; it was not followed")
        return path


def make_folder(path: Path) -> None:
    """Makes a folder for its owner alone, unless it is there.

    Raises:
        NotADirectoryError: if something else is there, or a link.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700, parents=True)
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise NotADirectoryError(f"a store needs a folder, {path} is something else")


def owner_only(path: str, flags: int) -> int:
    """Opens a new file that only its owner can read."""
    return os.open(path, flags, 0o600)
