"""With the extra "langchain" alone a chain answers from anchors."""

import importlib.util

from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_sac import ChatSAC, SACCompressor, format_docs, prompt_template

assert importlib.util.find_spec("llama_index") is None

chat = ChatSAC.from_pretrained("smollm2-135m")
texts = ["Owls hunt at night.", "The kiosk at the pier sells blue paint."]
retriever = RunnableLambda(lambda question: [Document(text) for text in texts])
chain = (
    {
        "context": retriever | SACCompressor(chat.rag) | format_docs(chat.rag),
        "question": RunnablePassthrough(),
    }
    | prompt_template(chat.rag)
    | chat
)
said = chain.invoke("What does the kiosk sell?")
assert said.text == chat.rag.answer("What does the kiosk sell?", texts).text
assert "paint" in said.text
assert said.usage_metadata["input_token_details"]["cache_creation"] > 0
