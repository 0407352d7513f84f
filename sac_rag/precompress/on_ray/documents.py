"""Documents as rows of a Ray Dataset. Light to import: tasks that read need no model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import ray.data

from sac_rag.chunk import Chunk
from sac_rag.reports import BadRecord
from sac_rag.retrieval.readers.files import files_to_read, read_documents

Split: TypeAlias = Callable[[Chunk], Sequence[Chunk]]


@dataclass(frozen=True)
class Read:
    """What a row holds, as its "read".

    Attributes:
        chunk: A document or a chunk of one; None where there are only bad records.
        documents: How many documents begin with it.
        bad: Records that were found beside it. They take no place in a window: windows are those
            of a local job.
    """

    chunk: Chunk | None
    documents: int = 0
    bad: tuple[BadRecord, ...] = ()


def read_with_ray(paths: Iterable[str | Path]) -> ray.data.Dataset:
    """The documents of `read_documents`, each file read by a task of the cluster.

    The paths must mean the same on every machine of the cluster.

    Raises:
        ValueError: as `read_documents`, or for "-".
        FileNotFoundError: as `read_documents`.
    """
    files = [str(file) for file in files_to_read(paths)]
    if "-" in files:
        raise ValueError("standard input cannot be read by a cluster; write it to a file")
    return ray.data.from_items(files).flat_map(partial(_read, folder=Path.cwd()))


def _read(row: dict[str, str], *, folder: Path) -> Iterator[dict[str, Read]]:
    """The documents of a file; its bad records come with the last one."""
    enter(folder)
    bad: list[BadRecord] = []
    last: Chunk | None = None
    for document in read_documents([row["item"]], on_bad=lambda *why: bad.append(BadRecord(*why))):
        if last is not None:
            yield {"read": Read(last, documents=1)}
        last = document
    if last is not None or bad:
        yield {"read": Read(last, documents=int(last is not None), bad=tuple(bad))}


def chunks_of(row: dict[str, Any], *, split: Split | None) -> list[dict[str, Read]]:
    """The chunks of a document; the first has what is counted of it."""
    read = _of_row(row)
    if read.chunk is None or split is None:
        return [{"read": read}]
    # A document without text is one empty chunk: counted, and its former version deleted.
    first, *others = split(read.chunk) or [read.chunk]
    return [{"read": replace(read, chunk=first)}, *({"read": Read(chunk)} for chunk in others)]


def read_here(
    documents: ray.data.Dataset, *, on_bad: Callable[[str, str], None]
) -> Iterator[Chunk]:
    """A Reader of a Dataset: its documents, in this process."""
    for row in documents.iter_rows():
        read = _of_row(row)
        for record in read.bad:
            on_bad(record.place, record.problem)
        if read.chunk is not None:
            yield read.chunk


def _of_row(row: dict[str, Any]) -> Read:
    """A row of `read_with_ray`, or one with the column "text", as a document."""
    if isinstance(read := row.get("read"), Read):
        return read
    if "text" not in row:
        raise ValueError(f"documents must have a column 'text', have: {', '.join(row)}")
    try:
        return Read(Chunk(row["text"], id=row.get("id"), title=row.get("title")), documents=1)
    except TypeError as error:
        return Read(None, bad=(BadRecord(f"a row with the id {row.get('id')!r:.100}", str(error)),))


def enter(folder: Path) -> None:
    """Relative names mean what they do to whoever started the job, where there is its folder."""
    with suppress(OSError):
        os.chdir(folder)
