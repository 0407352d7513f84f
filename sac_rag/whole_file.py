"""Files that appear whole or not at all, and one writer at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Of drafts that a killed process may leave behind.
DRAFT_SUFFIX = ".part"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft beside a file, to be written, that takes the file's place when the block ends.

    If the block raises, the file is as it was and the draft is removed. A process that is killed
    leaves a draft, which a later one of the same number replaces.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}{DRAFT_SUFFIX}")
    draft.unlink(missing_ok=True)
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def one_writer(lock: Path) -> Iterator[None]:
    """Waits until no other thread or process is in such a block with the same lock file.

    The lock ends with its process; the file stays. Where files cannot be locked (Windows, some
    network file systems), nothing is waited for.
    """
    with open(lock, "ab", opener=owner_only) as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def owner_only(path: str, flags: int) -> int:
    """Opener of new owner-only files (0600), for `open`."""
    return os.open(path, flags, 0o600)


def require_free(path: Path) -> None:
    """Raises FileExistsError if there is something at a path."""
    if path.exists():
        raise FileExistsError(errno.EEXIST, "there is something already; give another name", path)
