"""LlamaIndex's serialised documents and nodes, read as plain data.

Written by llama-index-core's `SimpleDocumentStore.persist`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Collections of a document store: the namespace, by default "docstore", and the kind.
_DATA = "/data"
_KINDS = (_DATA, "/metadata", "/ref_doc_info")
_SOURCE = "1"  # NodeRelationship.SOURCE: the document that a node was cut from
# Written by SentenceWindowNodeParser, whose windows replace the sentences when they are retrieved.
_WINDOW = ("window", "original_text")


def is_store(value: Any) -> bool:
    """Whether a JSON value is a persisted document store, of any namespace."""
    return isinstance(value, dict) and all(
        name.endswith(_KINDS) and isinstance(records, dict) for name, records in value.items()
    )


def nodes(store: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The records of a store with their names, those of one document together.

    A document whose nodes are in the store as well is left out: its text would be there twice.

    Raises:
        ValueError: if it has no nodes.
    """
    data = [
        item for name, records in store.items() if name.endswith(_DATA) for item in records.items()
    ]
    if not data:
        raise ValueError(
            "a LlamaIndex docstore must have nodes, has none: a vector store that keeps the text "
            "itself, as Chroma does, leaves it empty; build the index with "
            "store_nodes_override=True, or compress at ingestion with "
            "llama_index_sac.SACPrecompress"
        )
    return _by_document(data)


def _by_document(data: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    together: dict[str, list[tuple[str, Any]]] = {}
    for name, record in data:
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

    The text of a sentence with a window is the window, which takes its place when it is retrieved.

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
        if all(isinstance(metadata.get(key), str) for key in _WINDOW):
            text = metadata[_WINDOW[0]]
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
