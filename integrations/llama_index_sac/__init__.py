"""LlamaIndex over sac_rag: nodes whose text the LLM attends to as anchors instead of reading it.

Two arguments change in a query engine; `docs/llama_index.md` has the rest.

    index.as_query_engine(llm=SACLLM(rag), node_postprocessors=[SACPostprocessor(rag)])
"""

from __future__ import annotations

try:
    import llama_index.core  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("llama_index", "llama_index.core"):
        raise  # it is there, and misses something itself
    raise ImportError(
        "llama_index_sac needs the 'llama-index' extra: pip install 'sac-rag[llama-index]'"
    ) from error

from llama_index_sac.llm import SACLLM
from llama_index_sac.markers import UnanswerableError, escape
from llama_index_sac.node import SACNode
from llama_index_sac.postprocessor import SACPostprocessor
from llama_index_sac.precompress import SACPrecompress
from llama_index_sac.prompts import text_qa_template

__all__ = [
    "SACLLM",
    "SACNode",
    "SACPostprocessor",
    "SACPrecompress",
    "UnanswerableError",
    "escape",
    "text_qa_template",
]
