"""With the extra "llama-index" alone a query engine answers from anchors."""

import importlib.util

from llama_index.core import SummaryIndex
from llama_index.core.schema import TextNode
from llama_index_sac import SACLLM, SACPostprocessor, text_qa_template

assert importlib.util.find_spec("langchain_core") is None

llm = SACLLM.from_pretrained("smollm2-135m")
texts = ["Owls hunt at night.", "The kiosk at the pier sells blue paint."]
engine = SummaryIndex([TextNode(text=text) for text in texts]).as_query_engine(
    llm=llm,
    node_postprocessors=[SACPostprocessor(llm.rag)],
    text_qa_template=text_qa_template(llm.rag),
)
response = engine.query("What does the kiosk sell?")
assert response.response == llm.rag.answer("What does the kiosk sell?", texts).text
assert "paint" in response.response
assert [scored.node.text for scored in response.source_nodes] == texts
