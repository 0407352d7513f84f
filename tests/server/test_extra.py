"""Nothing of the server is loaded unasked, and its extra is named where it is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "prometheus_client"])
def test_the_extra_is_named_where_it_is_missing(module: str) -> None:
    block = f"import sys; sys.modules[{module!r}] = None; "
    done = run(block + "import sac_rag.server.app")
    assert "needs the 'serve' extra: pip install 'sac-rag[serve]'" in done.stderr
    done = run(block + "sys.argv = ['sac-rag', 'serve', 'x']; from sac_rag.cli import main; main()")
    assert done.returncode == 1
    assert "'sac-rag[serve]'" in done.stderr and "Traceback" not in done.stderr


def test_the_command_line_loads_nothing_of_it() -> None:
    done = run("import sac_rag, sac_rag.cli.commands, sys; print(*sys.modules)")
    assert not {"fastapi", "uvicorn", "prometheus_client"} & set(done.stdout.split())
