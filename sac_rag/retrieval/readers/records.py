"""Records to documents; jsonl, a record per line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sac_rag.chunk import Chunk
from sac_rag.retrieval.readers import langchain, llama_index


def read_jsonl(
    lines: Iterable[bytes], name: str, on_bad: Callable[[str, str], None]
) -> Iterator[Chunk]:
    """A document per line that is not blank; see `read_documents`."""
    for number, line in enumerate(lines, 1):
        place = f"{name}:{number}"
        if line.strip():
            try:
                record = parse_json(line.removeprefix(codecs.BOM_UTF8))
                document = to_document(record, place)
            except ValueError as error:
                on_bad(place, str(error))
            else:
                yield document


def parse_json(data: bytes) -> Any:
    """JSON to a value.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return json.loads(data.decode())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"a record must be JSON, but: {error.msg}, line {error.lineno}, column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"a record must be UTF-8, but: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a record must be JSON that can be read, but: {error}") from None


def to_document(record: Any, place: str) -> Chunk:
    """The document of a record: a plain one, or one that LangChain or LlamaIndex serialised.

    Args:
        record: A JSON value.
        place: The id of a record that has none.

    Raises:
        ValueError: if it is not a document, with the reason.
    """
    if not isinstance(record, dict):
        raise ValueError(f'a record must be an object, {{"text": …}}, was: {record!r:.80}')
    if langchain.is_document(record):
        record = langchain.plain_record(record)
    elif llama_index.is_node(record):
        record = llama_index.plain_record(record)
    record = dict(record)
    text = _take(record, "text", str)
    if text is None:
        raise ValueError(f'a record must have a "text", has: {", ".join(record) or "nothing"}')
    # Numbers are ids in many data sets.
    name = _take(record, "id", str, int)
    title = _take(record, "title", str)
    metadata = _take(record, "metadata", dict) or {}
    return checked(
        Chunk(
            text=text,
            id=place if name is None else str(name),
            title=title,
            metadata={**record, **metadata},
        )
    )


def checked(document: Chunk) -> Chunk:
    """The document itself.

    Raises:
        ValueError: if it is not valid Unicode, which tokenizers refuse.
    """
    for part in (document.text, document.id or "", document.title or ""):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            # Half a surrogate pair, from a JSON escape or an old file name.
            raise ValueError(f"text, id and title must be valid Unicode, but: {error}") from None
    return document


def _take(record: dict[str, Any], key: str, *kinds: type) -> Any:
    """Removes a value from a record; null counts as absent."""
    value = record.pop(key, None)
    if value is not None and type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f'"{key}" must be {expected}, was: {value!r:.80}')
    return value
