"""The prompt format of a pipeline as a prompt template of LangChain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate

from langchain_sac.documents import chunk_of, require_documents, require_pipeline
from sac_rag import SacRAG


def prompt_template(rag: SacRAG) -> ChatPromptTemplate:
    """The prompt of `rag.answer`, with the variables {context} and {question}.

    With `format_docs(rag)` for the context, ChatSAC answers as `rag.answer` does from the same
    documents, of which there must be at least one: it recognizes a plain prompt
    (`rag.prompt_format.chat` is False) by the first and last words of the format. ChatSAC needs
    `plain=True` for a plain format whose prompts have neither in common, and `stop` for a chat
    format with stop texts, which it does not apply to chats.

    Example:
        >>> rag = SacRAG.from_pretrained("smollm2-135m")
        >>> sorted(prompt_template(rag).input_variables)
        ['context', 'question']

    Raises:
        ValueError: for a raw format: its special tokens would be plain text in a message.
        TypeError: for anything else than a SacRAG.
    """
    form = require_pipeline(rag, "prompt_template").prompt_format
    if form.raw:
        raise ValueError(
            "a raw prompt format cannot be a message, whose special tokens are plain text; use "
            "rag.answer, or a format with raw=False"
        )
    user = _literal(form.user).replace("{{chunks}}", "{context}")
    user = user.replace("{{question}}", "{question}")
    turns = [("system", _literal(form.system))] if form.system else []
    return ChatPromptTemplate([*turns, ("human", _literal(form.prefix) + user)])


def format_docs(rag: SacRAG) -> Callable[[Sequence[Document]], str]:
    """Returns a function that joins documents as `rag.answer` does, with headings and separators.

    Example:
        >>> rag = SacRAG.from_pretrained("smollm2-135m")
        >>> documents = [Document("Built in 1889."), Document("Painted red.")]
        >>> print(format_docs(rag)(documents))
        Text:
        Built in 1889.
        <BLANKLINE>
        Text:
        Painted red.

    Raises:
        TypeError: for anything else than a SacRAG, such as the documents that a chain hands to
            `format_docs` where `format_docs(rag)` is meant.
    """
    key_of = require_pipeline(rag, "format_docs").compressor.key

    def joined(documents: Sequence[Document]) -> str:
        # The page content as it is: marked, if the documents are.
        chunks = [
            replace(chunk_of(document, key_of), text=document.page_content, ratio=None)
            for document in require_documents(documents)
        ]
        pieces = rag.prompt_format.passages(chunks)
        return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)

    return joined


def _literal(text: str) -> str:
    """The text with braces escaped for an f-string template."""
    return text.replace("{", "{{").replace("}", "}}")
