"""Readers of documents, one file per family of formats.

Nothing that is read is executed, and no framework whose exports are read is imported.
"""

from __future__ import annotations

from sac_rag.retrieval.readers.files import read_documents

__all__ = ["read_documents"]
