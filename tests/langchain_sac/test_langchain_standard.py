"""LangChain's own suites for chat models and retrievers, as they are."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_sac import ChatSAC, SACCompressor, SACEmbeddings, SACRetriever
from langchain_sac.marker import mark
from langchain_scenes import (  # noqa: F401
    DOCUMENTS,
    QUESTION,
    Words,
    home_of_module,
    make_embedder,
    make_rag,
)
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests

from sac_rag import SacRAG
from sac_rag.lm.generator import Generator

Details = list[
    Literal[
        "audio_input",
        "audio_output",
        "reasoning_output",
        "cache_read_input",
        "cache_creation_input",
    ]
]


@pytest.fixture(scope="module")
def shared(llama: Generator) -> SacRAG:
    return make_rag(llama)


class Model:
    """What the suites are told of ChatSAC."""

    rag: SacRAG

    @pytest.fixture(autouse=True)
    def _rag(self, shared: SacRAG) -> None:
        self.rag = shared

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatSAC

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"rag": self.rag}

    @property
    def supports_model_override(self) -> bool:
        return False  # the weights are loaded

    @property
    def has_tool_calling(self) -> bool:
        return False  # bind_tools says what to do instead

    @property
    def has_structured_output(self) -> bool:
        return False


class TestChatSACUnit(Model, ChatModelUnitTests):
    pass


class TestChatSACIntegration(Model, ChatModelIntegrationTests):
    @property
    def supported_usage_metadata_details(self) -> dict[Literal["invoke", "stream"], Details]:
        both: Details = ["cache_read_input", "cache_creation_input"]
        return {"invoke": both, "stream": both}

    def invoke_with_cache_creation_input(self, *, stream: bool = False) -> AIMessage:
        self.rag.compressor.store.clear()
        return self.ask(stream)

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        self.rag.precompress(["Owls hear a mouse."])
        return self.ask(stream)

    def ask(self, stream: bool) -> AIMessage:
        marked = mark("Owls hear a mouse.", self.rag.compressor.key("Owls hear a mouse."))
        prompt = f"Answer from the passage in a few words.\n{marked}\n{QUESTION}"
        chat = ChatSAC(self.rag)
        if not stream:
            return chat.invoke(prompt)
        first, *rest = chat.stream(prompt)
        said = sum(rest, start=first)
        assert isinstance(said, AIMessageChunk)
        return said


class TestSACEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return SACEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"embedder": make_embedder()}


class TestSACRetriever(RetrieversIntegrationTests):
    compressor: SACCompressor

    @pytest.fixture(autouse=True)
    def _compressor(self, shared: SacRAG) -> None:
        self.compressor = SACCompressor(shared)

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return SACRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        found = InMemoryVectorStore(Words())
        found.add_documents(DOCUMENTS)
        return {"base_retriever": found.as_retriever(), "compressor": self.compressor}

    @property
    def retriever_query_example(self) -> str:
        return QUESTION
