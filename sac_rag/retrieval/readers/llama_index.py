"""LlamaIndex's serialised documents and nodes, read as plain data.

Written by llama-index-core's `SimpleDocumentStore.persist`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_DATA = "docstore/data"
_SOURCE = "1"  # NodeRelationship.SOURCE: the document that a node was cut from


def is_store(value: Any) -> bool:
    """Whether a JSON value is a persisted document store."""
    return isinstance(value, dict) and isinstance(value.get(_DATA), dict)


def nodes(store: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The records of a store with their names, those of one document together.

    A document whose nodes are in the store as well is left out: its text would be there twice.
    """
    together: dict[str, list[tuple[str, Any]]] = {}
    for name, record in store[_DATA].items():
        source = _source(record)
        if source is None:
            together.setdefault(name, []).insert(0, (name, record))
        else:
            together.setdefault(source, []).append((name, record))
    for source, records in together.items():
        has_document = records[0][0] == source and len(records) > 1
        yield from records[1:] if has_document else records


def is_node(record: dict[str, Any]) -> bool:
    """Whether a record is a serialised document or node."""
    return "__data__" in record and "__type__" in record


def plain_record(record: dict[str, Any]) -> dict[str, Any]:
    """A plain record of a serialised node; its id is that of the document it was cut from.

    Raises:
        ValueError: if it does not hold a node's fields.
    """
    data = record["__data__"]
    if not isinstance(data, dict):
        raise ValueError(f'"__data__" must be an object, was: {data!r:.80}')
    resource = data.get("text_resource")
    text = data.get("text")
    if text is None and isinstance(resource, dict):
        text = resource.get("text")
    name, source, metadata = data.get("id_"), _source(record), data.get("metadata")
    title = None
    if isinstance(metadata, dict):
        title = metadata.get("title")
        if source is not None:
            metadata = {**metadata, "node_id": name}
    return {
        "text": text,
        "id": name if source is None else source,
        "title": title if isinstance(title, str) else None,
        "metadata": metadata,
    }


def _source(record: Any) -> str | None:
    """The id of the document that a node was cut from."""
    value = record
    for key in ("__data__", "relationships", _SOURCE, "node_id"):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value if isinstance(value, str) else None
