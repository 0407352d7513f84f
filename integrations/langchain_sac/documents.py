"""LangChain documents as chunks."""

from __future__ import annotations

from collections.abc import Iterable

from langchain_core.documents import Document

from sac_rag import Chunk


def chunk_of(document: Document) -> Chunk:
    """The chunk of a document, with the id that the command line gives LangChain's exports.

    Its id is `metadata["source"]`, the file that it was cut from, or else the id of the document;
    its title is `metadata["title"]`.
    """
    source, title = document.metadata.get("source"), document.metadata.get("title")
    return Chunk(
        text=document.page_content,
        id=source if isinstance(source, str) else document.id,
        title=title if isinstance(title, str) else None,
    )


def require_documents(documents: Iterable[object]) -> list[Document]:
    """The documents as a list.

    Raises:
        TypeError: if one is not a Document, or a single document is given.
    """
    if isinstance(documents, (Document, str)):
        raise TypeError(
            f"expected a sequence of Documents, got one {type(documents).__name__}; put it in a "
            "list of Documents"
        )
    checked: list[Document] = []
    for document in documents:
        if not isinstance(document, Document):
            raise TypeError(f"expected Documents, got a {type(document).__name__} among them")
        checked.append(document)
    return checked
