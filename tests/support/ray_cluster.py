"""A Ray cluster on this machine for the tests of a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sac_rag.chunk import Chunk

# Starting takes long where the machine is busy. No dashboard, and no token in the home folder.
_ENVIRONMENT = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 by default: workers would get no time on a busy machine
    # Modules of tests/support are named in what is sent to workers.
    "PYTHONPATH": os.pathsep.join(
        [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[1])]
    ),
}
# Ray warns of its own settings, and leaves sockets and files to the collector.
IGNORED = [
    pytest.mark.filterwarnings(f"ignore::{warning}")
    for warning in (
        "DeprecationWarning",
        "ResourceWarning",
        "pytest.PytestUnraisableExceptionWarning",
    )
]
_STARTS = 4  # Ray waits 30 s for a node, whatever the machine does


@contextmanager
def ray_cluster(cpus: int = 2) -> Iterator[str]:
    """Starts a cluster and connects this process to it; yields its address."""
    patch = pytest.MonkeyPatch()
    for name, value in _ENVIRONMENT.items():
        patch.setenv(name, value)
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    try:
        for number in range(1, _STARTS + 1):
            try:
                ray.init(
                    "local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
                break
            except Exception:
                ray.shutdown()
                if number == _STARTS:
                    raise
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        patch.undo()


def halves(document: Chunk) -> list[Chunk]:
    """Cuts a document in two."""
    middle = len(document.text) // 2
    return [
        Chunk(part, id=document.id) for part in (document.text[:middle], document.text[middle:])
    ]
