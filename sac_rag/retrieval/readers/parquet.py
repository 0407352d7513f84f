"""parquet: a document per row. Needs the extra "parquet"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sac_rag.chunk import Chunk
from sac_rag.retrieval.readers.records import to_document

_ROWS = 1024  # turned into Python objects at a time


def require_pyarrow(path: Path) -> None:
    """Raises ImportError, naming the extra, where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ImportError(
            f"reading {path} needs the 'parquet' extra: pip install 'sac-rag[parquet]'"
        ) from None


def read_parquet(path: Path, name: str, on_bad: Callable[[str, str], None]) -> Iterator[Chunk]:
    """The documents in a file, read by row group.

    Columns "text", "id" and "title" are the document's, the fields of a column "metadata" and all
    other columns go into its metadata.

    Args:
        path: The file.
        name: Its path; a row's place is the path and its number, from 1.
        on_bad: As for `read_documents`.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                on_bad(name, f'there must be a column "text", there are: {", ".join(columns)}')
                return
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{name}:{number}"
                    try:
                        document = to_document(_as_json(row), place)
                    except ValueError as error:
                        on_bad(place, str(error))
                    else:
                        yield document
    except (pyarrow.ArrowException, OSError) as error:
        on_bad(name, f"the file must be Parquet that can be read, but: {error}")


def _as_json(value: Any) -> Any:
    """A value as JSON can hold it: dates and the like as text, bytes as null."""
    if isinstance(value, dict):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, bytes):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
