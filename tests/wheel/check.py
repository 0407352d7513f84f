"""Builds the wheel and uses it in clean environments, where the source tree is not: `make wheel`.

    python tests/wheel/check.py [EXTRA …]

One environment has the bare package; those of the extras see what is installed there and add what
the extra asks for, so that torch is installed once. What each must be able to do is in the script
that bears its name, which runs in isolated mode, in an empty folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
EXTRAS = (
    *("langchain", "llama-index", "train", "eval", "parquet", "otel", "encrypt", "serve"),
    *("mcp", "redis", "ray"),
)


def main(extras: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
        (wheel,) = folder.glob("*.whl")
        bare = make(folder / "bare", str(wheel))
        use("bare", bare)
        packages = next((folder / "bare").rglob("site-packages"))
        for extra in extras:
            use(extra, make(folder / extra, f"sac-rag[{extra}] @ {wheel.as_uri()}", packages))


def make(folder: Path, requirement: str, seen: Path | None = None) -> Path:
    """An environment with a requirement; says which Python it is."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if seen is not None:
        (next(folder.rglob("site-packages")) / "seen.pth").write_text(f"{seen}\n")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement)
    return python


def use(name: str, python: Path) -> None:
    print(f"--- {name}", flush=True)
    with tempfile.TemporaryDirectory() as empty:
        run(python, "-I", HERE / f"{name.replace('-', '_')}.py", cwd=empty)


def run(*command: str | Path, cwd: str | None = None) -> None:
    constraints = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    subprocess.run(list(map(str, command)), check=True, cwd=cwd, env={**os.environ, **constraints})


if __name__ == "__main__":
    main(sys.argv[1:] or EXTRAS)
