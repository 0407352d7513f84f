"""The job on a Ray cluster; needs the extra "ray"."""

from __future__ import annotations

import os

# Before Ray is imported: nothing about its use leaves the machine unasked.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    import ray  # noqa: F401
except ImportError as error:
    raise ImportError(
        "sac_rag.precompress.on_ray needs the 'ray' extra: pip install 'sac-rag[ray]'"
    ) from error
