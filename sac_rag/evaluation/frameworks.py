"""Answers through LangChain's and LlamaIndex's own prompts and adapters.

Each system is the one that its users have: a chain with SACCompressor and ChatSAC, an index's
engine with SACPostprocessor and SACLLM, every setting of the adapters at its default. LlamaIndex's
prompts are those of the installed version. langchain-core ships none: LangChain's prompts here have
the shapes of those in its guides and its hub, in wording in which no compressor is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sac_rag.evaluation.sample import Trial
from sac_rag.pipeline import SacRAG

if TYPE_CHECKING:
    from langchain_core.documents import Document
    from langchain_core.messages import AIMessage
    from langchain_core.prompts import ChatPromptTemplate

Framework = Literal["langchain", "llama-index"]

# The pipeline's own prompt format, in either framework.
OWN = "own"

# Shapes, in this order: RetrievalQA's "stuff" prompt, rlm/rag-prompt, the RAG tutorial's.
_LANGCHAIN = MappingProxyType(
    {
        "retrieval-qa": (
            (
                "human",
                "The passages below are context for the question that follows them. Should they "
                "not hold the answer, reply that you do not know and make nothing up.\n\n"
                "{context}\n\nQuestion: {question}\nHelpful Answer:",
            ),
        ),
        "rag-prompt": (
            (
                "human",
                "Your task is answering questions. Retrieved context is given to answer from. If "
                "the answer is unknown to you, just say so. Be concise, with at most three "
                "sentences.\nQuestion: {question} \nContext: {context} \nAnswer:",
            ),
        ),
        "tutorial": (
            (
                "system",
                "Your task is answering questions from what was retrieved. If the context below "
                "does not have the answer, say that you do not know. Be concise, with at most "
                "three sentences.\n\n{context}",
            ),
            ("human", "{question}"),
        ),
    }
)
_OPEN = (("human", "{question}\n\n{context}"),)

# Prompts that ask a question, by framework.
PROMPTS: MappingProxyType[Framework, tuple[str, ...]] = MappingProxyType(
    {
        "langchain": (*_LANGCHAIN, OWN),
        "llama-index": ("compact", "refine", "tree-summarize", "context-chat", OWN),
    }
)

# Open instructions in place of the question: in LlamaIndex's "compact" prompt, and in front of the
# text in LangChain.
INSTRUCTIONS = MappingProxyType(
    {
        "summarise": "Summarise this in two or three sentences.",
        "list-facts": "List the most important facts that are stated here.",
        "explain": "Explain in simple words what this is about.",
    }
)

# LlamaIndex's answer where its LLM writes nothing.
_NO_TEXT = "Empty Response"


@dataclass(frozen=True)
class Reply:
    """An answer as the framework returns it.

    Attributes:
        text: "" where the model wrote nothing.
        ended: Whether the model ended it before the limit of new tokens.
        attended: Number of chunks whose anchors were attended to, over all calls of the LLM.
    """

    text: str
    ended: bool
    attended: int


Ask: TypeAlias = Callable[[Sequence[Trial]], list[Reply]]


def asker(
    framework: Framework, prompt: str, rag: SacRAG, *, compressed: bool = True, batch_size: int = 8
) -> Ask:
    """Returns a function that answers trials through a framework.

    Args:
        framework: The framework whose chain or engine answers.
        prompt: One of the framework's PROMPTS, or of the INSTRUCTIONS.
        rag: The pipeline behind the adapters.
        compressed: Whether chunks are marked, and attended to as anchors; else they are text.
        batch_size: Trials of a padded batch; LlamaIndex asks one at a time.

    Raises:
        ValueError: for a prompt that the framework does not have.
        ImportError: if the framework is not installed, naming the extra.
    """
    known = (*PROMPTS[framework], *INSTRUCTIONS)
    if prompt not in known:
        raise ValueError(
            f"prompt must be one of {framework}'s, {', '.join(known)}, was: {prompt!r}"
        )
    require(framework)
    if framework == "langchain":
        return _langchain(prompt, rag, compressed, batch_size)
    return _llama_index(prompt, rag, compressed)


def require(framework: Framework) -> None:
    """Raises ImportError, naming the extra, if a framework is not installed."""
    if framework == "langchain":
        import langchain_sac  # noqa: F401
    else:
        import llama_index_sac  # noqa: F401


def _langchain(prompt: str, rag: SacRAG, compressed: bool, batch_size: int) -> Ask:
    from langchain_core.documents import Document
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnableLambda
    from langchain_sac import ChatSAC, SACCompressor, format_docs, prompt_template

    def retrieved(trial: Trial) -> list[Document]:
        return [Document(chunk.text, metadata={"title": chunk.title}) for chunk in trial.chunks]

    def question(trial: Trial) -> str:
        return trial.question.text

    template: ChatPromptTemplate = (
        prompt_template(rag)
        if prompt == OWN
        else ChatPromptTemplate(list(_LANGCHAIN.get(prompt, _OPEN)))
    )
    retriever: Any = RunnableLambda(retrieved)
    retrieval = retriever | SACCompressor(rag) if compressed else retriever
    joined = format_docs(rag) if prompt == OWN else _joined
    chain = (
        {"context": retrieval | joined, "question": RunnableLambda(question)}
        | template
        | ChatSAC(rag, batch_size=batch_size)
    )

    def ask(trials: Sequence[Trial]) -> list[Reply]:
        return [_reply(message) for message in chain.batch(list(trials))]

    return ask


def _joined(documents: Sequence[Document]) -> str:
    """Documents as LangChain's guides join them."""
    return "\n\n".join(document.page_content for document in documents)


def _reply(message: AIMessage) -> Reply:
    metadata = message.response_metadata
    return Reply(
        str(message.text), metadata["finish_reason"] != "length", _attended(metadata["sac"])
    )


def _llama_index(prompt: str, rag: SacRAG, compressed: bool) -> Ask:
    from llama_index.core import SummaryIndex
    from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
    from llama_index.core.chat_engine.types import ChatMode
    from llama_index.core.memory import ChatMemoryBuffer
    from llama_index.core.schema import TextNode
    from llama_index_sac import SACLLM, SACPostprocessor, text_qa_template

    responses: list[ChatResponse | CompletionResponse] = []

    class Recorded(SACLLM):
        """Records its responses: an engine returns their text and not how they ended.

        Engines replace an LLM's callback manager, so that callbacks do not get them either.
        """

        def chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponse:
            response: ChatResponse = super().chat(messages, **options)
            responses.append(response)
            return response

        def complete(
            self, prompt: str, formatted: bool = False, **options: Any
        ) -> CompletionResponse:
            response: CompletionResponse = super().complete(prompt, formatted, **options)
            responses.append(response)
            return response

    options: dict[str, Any] = {
        "llm": Recorded(rag),  # type: ignore[call-arg, arg-type]  # its parent's own __init__
        "node_postprocessors": [SACPostprocessor(rag)] if compressed else [],
    }
    if prompt in ("refine", "tree-summarize"):
        options["response_mode"] = prompt.replace("-", "_")
    elif prompt == OWN:
        options["text_qa_template"] = text_qa_template(rag)

    def answered(trial: Trial) -> Reply:
        responses.clear()
        # Retrieves all of its nodes, in their order.
        index = SummaryIndex([TextNode(text=chunk.text) for chunk in trial.chunks])
        question = trial.question.text
        if prompt == "context-chat":
            # The default memory is a database that an engine leaves open; both are empty here.
            memory = ChatMemoryBuffer.from_defaults()
            engine = index.as_chat_engine(chat_mode=ChatMode.CONTEXT, memory=memory, **options)
            text = engine.chat(question).response
        else:
            text = str(index.as_query_engine(**options).query(question))
        attended = sum(_attended(r.additional_kwargs["sac"]["chunks"]) for r in responses)
        last: Any = responses[-1].raw
        return Reply("" if text == _NO_TEXT else text, last["finish_reason"] != "length", attended)

    return lambda trials: [answered(trial) for trial in trials]


def _attended(chunks: Sequence[dict[str, Any]]) -> int:
    return sum(chunk["read_as"] == "anchors" for chunk in chunks)
