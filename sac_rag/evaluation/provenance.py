"""Provenance of figures: which code measured them, when, and on what data."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]


def provenance(
    model: str | os.PathLike[str], data: Iterable[str | os.PathLike[str]]
) -> dict[str, Any]:
    """Where figures come from, as JSON values.

    Args:
        model: Name of the model; of a folder, its last part.
        data: Files that were measured on.

    Returns:
        `commit` of this package (None outside of a checkout; "-dirty" behind it if files have been
        changed), `date` (UTC), `model`, and `data`, the SHA-256 of each file by its name.

    Raises:
        OSError: if a file cannot be read.
    """
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "model": Path(model).name if Path(model).is_dir() else os.fspath(model),
        "data": {Path(path).name: _sha256(path) for path in data},
    }


def _commit() -> str | None:
    """The commit that the package's folder is checked out at."""
    if not (_PACKAGE.parent / ".git").exists():
        return None  # installed, perhaps inside of another project's repository
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        described = subprocess.run(  # noqa: S603 (nothing but words of our own)
            command, cwd=_PACKAGE, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _sha256(path: str | os.PathLike[str]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
