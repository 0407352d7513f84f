"""parquet: a document per row. Needs the extra "parquet"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sac_rag.chunk import Chunk
from sac_rag.retrieval.readers.content import too_long
from sac_rag.retrieval.readers.records import to_document

_TEXTS = ("text", "id", "title")
_ROWS = 1024  # turned into Python objects at a time, fewer if they are large


def require_pyarrow(path: Path) -> None:
    """Raises ImportError, naming the extra, where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ImportError(
            f"reading {path} needs the 'parquet' extra: pip install 'sac-rag[parquet]'"
        ) from None


def read_parquet(
    path: Path, name: str, on_bad: Callable[[str, str], None], most: int
) -> Iterator[Chunk]:
    """The documents in a file, read by row group.

    Columns "text", "id" and "title" are the document's, the fields of a column "metadata" and all
    other columns go into its metadata. Where these three are bytes, they are read as UTF-8; an id
    of other bytes, such as a UUID, becomes their hexadecimal digits.

    Args:
        path: The file.
        name: Its path; a row's place is the path and its number, from 1.
        on_bad: As for `read_documents`.
        most: Bytes of the longest document.
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
            for batch in file.iter_batches(batch_size=_rows_at_a_time(file.metadata, most)):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{name}:{number}"
                    try:
                        document = to_document(_plain(row, most), place)
                    except ValueError as error:
                        on_bad(place, str(error))
                    else:
                        yield document
    except (pyarrow.ArrowException, OSError) as error:
        on_bad(name, f"the file must be Parquet that can be read, but: {error}")


def _rows_at_a_time(metadata: Any, most: int) -> int:
    """Rows of about the bytes of one longest document, by the mean of the file."""
    nbytes: int = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    rows: int = metadata.num_rows
    return max(1, min(_ROWS, most * rows // max(1, nbytes)))


def _plain(row: dict[str, Any], most: int) -> dict[str, Any]:
    """A row as a record; raises ValueError for a text that is too long or no UTF-8."""
    texts = {name: _as_text(name, row[name]) for name in _TEXTS if isinstance(row.get(name), bytes)}
    text = texts.get("text", row["text"])
    if isinstance(text, str) and len(text) > most:
        raise ValueError(too_long(most))
    return {**_as_json(row), **texts}


def _as_text(name: str, value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        if name == "id":
            return value.hex()
        raise ValueError(
            f'"{name}" must be text, its bytes are no UTF-8: {error}; cast the column to string'
        ) from None
    return text if name != "id" or text.isprintable() else value.hex()


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
