"""json: lists of records, and stores that frameworks persist as one object."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sac_rag.chunk import Chunk
from sac_rag.retrieval.readers import langchain, llama_index
from sac_rag.retrieval.readers.records import parse_json, to_document


def read_json(content: bytes, name: str, on_bad: Callable[[str, str], None]) -> Iterator[Chunk]:
    """The documents in a JSON file.

    Args:
        content: The whole file.
        name: Its path; a record's place is the path and its number, from 1, or its key.
        on_bad: As for `read_documents`.
    """
    try:
        records = _records(parse_json(content.removeprefix(codecs.BOM_UTF8)))
    except ValueError as error:
        on_bad(name, str(error))
        return
    for key, record in records:
        place = f"{name}:{key}"
        try:
            document = to_document(record, place)
        except ValueError as error:
            on_bad(place, str(error))
        else:
            yield document


def _records(value: Any) -> Iterable[tuple[Any, Any]]:
    if llama_index.is_store(value):
        return llama_index.nodes(value)
    if langchain.is_store(value):
        # Plain records, except that LangChain escapes metadata.
        return [(key, langchain.plain_record(record)) for key, record in value.items()]
    if isinstance(value, list):
        return enumerate(value, 1)
    if isinstance(value, dict) and (
        "text" in value or langchain.is_document(value) or llama_index.is_node(value)
    ):
        return [(1, value)]
    raise ValueError(
        "a .json file must be a list of records, LlamaIndex's docstore.json or what LangChain's "
        f"InMemoryVectorStore dumps, was: {value!s:.80}"
    )
