"""LlamaIndex components over sac_rag: the LLM attends to anchors of nodes instead of their text.

Two arguments of a query engine change; see `docs/llama_index.md`.

    index.as_query_engine(llm=SACLLM(rag), node_postprocessors=[SACPostprocessor(rag)])
"""

from __future__ import annotations

try:
    import llama_index.core  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("llama_index", "llama_index.core"):
        raise  # it is installed, and one of its own imports fails
    raise ImportError(
        "llama_index_sac needs the 'llama-index' extra: pip install 'sac-rag[llama-index]'"
    ) from error

from llama_index_sac.citation import SACCitationQueryEngine
from llama_index_sac.llm import SACLLM
from llama_index_sac.markers import UnanswerableError, escape, unmark
from llama_index_sac.node import SACNode
from llama_index_sac.postprocessor import SACPostprocessor
from llama_index_sac.precompress import SACPrecompress
from llama_index_sac.prompts import context_template, refine_template, text_qa_template
from llama_index_sac.sync import sync

__all__ = [
    "SACCitationQueryEngine",
    "SACLLM",
    "SACNode",
    "SACPostprocessor",
    "SACPrecompress",
    "UnanswerableError",
    "context_template",
    "escape",
    "refine_template",
    "sync",
    "text_qa_template",
    "unmark",
]
