"""LangChain components over sac_rag: compress what is retrieved, answer from it.

The public names are those below; `sac_rag` itself does not depend on LangChain.
"""

from __future__ import annotations

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "langchain_sac needs the 'langchain' extra: pip install 'sac-rag[langchain]'"
    ) from error

from langchain_sac.chat import ChatSAC
from langchain_sac.compressor import SACCompressor
from langchain_sac.documents import sync, unmark
from langchain_sac.embeddings import SACEmbeddings
from langchain_sac.prompts import format_docs, prompt_template
from langchain_sac.retriever import SACRetriever

__all__ = [
    "ChatSAC",
    "SACCompressor",
    "SACEmbeddings",
    "SACRetriever",
    "format_docs",
    "prompt_template",
    "sync",
    "unmark",
]
