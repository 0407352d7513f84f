"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def owner_only(path: str, flags: int) -> int:
    """Opener of new owner-only files (0600), for `open`."""
    return os.open(path, flags, 0o600)
