"""The command line parses arguments, calls the library and prints; one file per command family.

Nothing is imported here, so that Ctrl-C is no traceback even while the rest is. Heavy libraries are
imported inside the commands, so that --help is fast. A command's signature is the list of its
options, which may make it longer than other functions.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sac_rag.cli.commands import app

__all__ = ["app", "main"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'sac_rag.cli' has no attribute {name!r}")
    from sac_rag.cli import commands

    return commands.app


def main() -> None:
    """Runs the command line; an error or Ctrl-C is a sentence, not a traceback."""
    # Threads that wait for each other spin. Where another process has a core, they spin through
    # their whole time slice: 0.6 to 1.6 s per token on two cores, in place of 0.05 s. With brief
    # spinning it is 0.07 s, and 0.06 s on free cores. GNU OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        from sac_rag.cli.commands import run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("sac-rag: interrupted; what was finished is kept\n")
        sys.exit(130)
