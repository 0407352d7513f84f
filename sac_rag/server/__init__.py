"""An OpenAI-compatible endpoint over a collection or an archive; needs the extra "serve"."""

from __future__ import annotations

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "sac_rag.server needs the 'serve' extra: pip install 'sac-rag[serve]'"
    ) from error
