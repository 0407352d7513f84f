"""500xCompressor (arXiv 2408.03094)."""

from __future__ import annotations

from typing import ClassVar

from sac_rag.compressors.memory import MemoryCompressor


class X500(MemoryCompressor):
    """Keeps the keys and values of memory slots, of all layers.

    Exact to move: slots attend to their segment alone.
    """

    method: ClassVar[str] = "x500"
