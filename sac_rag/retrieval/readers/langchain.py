"""LangChain's serialised documents, read as plain data.

Written by langchain-core's `dumpd`, `dumps`, `Document.model_dump` and `InMemoryVectorStore.dump`.
`load` would construct any classes and secrets that the text names; nothing is constructed here.
"""

from __future__ import annotations

from typing import Any

# Wraps a user's dict that could be taken for a serialised object.
_ESCAPE = "__lc_escaped__"


def is_document(record: dict[str, Any]) -> bool:
    """Whether a record is a serialised object, or a document's fields."""
    return _is_object(record) or ("page_content" in record and "text" not in record)


def is_store(value: Any) -> bool:
    """Whether a JSON value is a dump of an InMemoryVectorStore: records with their vectors."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(record, dict) and {"id", "vector", "text", "metadata"} <= record.keys()
            for record in value.values()
        )
    )


def plain_record(record: dict[str, Any]) -> dict[str, Any]:
    """A plain record of a serialised document; its id is the document's source, if it has one.

    LangChain has the file that a text was cut from in metadata["source"], and an id per piece,
    which goes into the metadata.

    Raises:
        ValueError: if another kind of object is serialised.
    """
    if _is_object(record):
        record = _fields(record)
    text = record.get("page_content", record.get("text"))
    name, metadata = record.get("id"), _unescaped(record.get("metadata"))
    if not isinstance(metadata, dict):
        return {"text": text, "id": name, "metadata": metadata}
    source, title = _named(metadata, "source"), _named(metadata, "title")
    if source is not None and name is not None:
        metadata = {"id": name, **metadata}
    document = name if source is None else source
    return {"text": text, "id": document, "title": title, "metadata": metadata}


def _named(metadata: dict[str, Any], field: str) -> str | None:
    """A field as a str, as langchain_sac reads it: a number too; null, NaN and "" are none."""
    value = metadata.get(field)
    return None if value is None or value != value else str(value) or None


def _is_object(record: dict[str, Any]) -> bool:
    return record.get("lc") == 1 and "type" in record and "text" not in record


def _fields(serialised: dict[str, Any]) -> dict[str, Any]:
    what, fields = serialised.get("id"), serialised.get("kwargs")
    is_document = isinstance(what, list) and what[-1:] == ["Document"]
    if serialised["type"] != "constructor" or not is_document or not isinstance(fields, dict):
        raise ValueError(
            'an object that LangChain serialised must be a "Document" with its "kwargs", '
            f"was: {serialised['type']!r:.40} {what!r:.80}"
        )
    return fields


def _unescaped(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_ESCAPE}:
            return value[_ESCAPE]
        return {name: _unescaped(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_unescaped(inner) for inner in value]
    return value
