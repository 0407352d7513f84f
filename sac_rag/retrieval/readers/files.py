"""read_documents: finds files and reads each by its ending."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from sac_rag.chunk import Chunk
from sac_rag.retrieval.readers import parquet
from sac_rag.retrieval.readers.json_files import read_json
from sac_rag.retrieval.readers.records import read_jsonl
from sac_rag.retrieval.readers.text import read_text

OnBad: TypeAlias = Callable[[str, str], None]

_FILE = re.compile(
    r"(?P<stem>.+)\.(?:(?P<kind>txt|md|jsonl|json)(?P<zipped>\.gz)?|(?P<columns>parquet))",
    re.I | re.S,
)
# The one .json file that is read from a folder: other ones may hold anything.
_DOCSTORE = re.compile(r"docstore\.json(\.gz)?", re.I)
_STDIN = Path("-")


def read_documents(paths: Iterable[str | Path], *, on_bad: OnBad | None = None) -> Iterator[Chunk]:
    """Reads each document of some files as one uncut Chunk.

    A .txt or .md file is a document, named by its path. A .jsonl file has one on each line:
    `{"text": str, "id": str, "title": str, "metadata": object}`, where only the text is required,
    the default id is "path:line", and all other keys go into the metadata. A .parquet file has one
    in each row, with columns named as these keys. A .json file is a list of such records, a
    document store that LlamaIndex persisted, or a vector store that LangChain dumped; records may
    also be documents as LangChain or nodes as LlamaIndex serialise them. All except .parquet may be
    gzipped (.gz). All text is UTF-8.

    Args:
        paths: Files; folders, which are searched in sorted order for such files (of .json files
            only for docstore.json), except hidden ones and folders that are links; and "-" for
            standard input, which is read as .jsonl if its first line is a JSON object, else as
            .txt.
        on_bad: Called with the place ("path:line") and the problem of each record or file that is
            left out. Default: raise ValueError at the first.

    Returns:
        The documents, read as they are consumed: .jsonl line by line, .parquet by row group, any
        other file whole. Folders are listed at once.

    Raises:
        FileNotFoundError: at once, if a path does not exist.
        ValueError: at once, if one of the paths is a file of another kind.
        ImportError: at once, if there is a .parquet file and pyarrow is not installed.
        TypeError: if `paths` is one path.
    """
    if isinstance(paths, str | Path):
        raise TypeError(f"paths must be several paths, was one: {paths!r}; put it in a list")
    files = [file for path in paths for file in _files(path)]
    for file in files:
        if file.suffix.lower() == ".parquet":
            parquet.require_pyarrow(file)
            break
    return _documents(files, on_bad or _refuse)


def _refuse(place: str, message: str) -> None:
    raise ValueError(f"{place}: {message}")


def _files(named: str | Path) -> list[Path]:
    path = Path(named)
    if path == _STDIN:
        return [path]
    if not os.fspath(named) or not path.exists():
        raise FileNotFoundError(
            f"a path must be a file or folder that exists, or '-', was: '{named}'"
        )
    if path.is_dir():
        files = []
        for folder, folders, names in os.walk(path, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            files += [Path(folder, name) for name in names if _is_read_unnamed(name)]
        # A pipe or a dangling link may have such a name too.
        return sorted(file for file in files if file.is_file())
    if not _FILE.fullmatch(path.name):
        raise ValueError(
            "a file must end in .txt, .md, .jsonl or .json, or one of these and .gz, or in "
            f".parquet, was: '{named}'; convert it to one of them"
        )
    return [path]


def _is_read_unnamed(name: str) -> bool:
    parts = _FILE.fullmatch(name)
    if parts is None or name.startswith("."):
        return False
    return (parts["kind"] or "").lower() != "json" or _DOCSTORE.fullmatch(name) is not None


def _raise(error: OSError) -> None:
    raise error


def _documents(files: list[Path], on_bad: OnBad) -> Iterator[Chunk]:
    for path in files:
        name = path.as_posix()
        parts = _FILE.fullmatch(path.name)
        if parts is None:  # only "-" has no such name
            first = sys.stdin.buffer.readline()
            lines = chain([first], sys.stdin.buffer)
            yield from _parse(lines, name, None, "jsonl" if _is_object(first) else "txt", on_bad)
        elif parts["columns"]:
            yield from parquet.read_parquet(path, name, on_bad)
        else:
            try:
                with gzip.open(path) if parts["zipped"] else path.open("rb") as file:
                    yield from _parse(file, name, parts["stem"], parts["kind"].lower(), on_bad)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                on_bad(name, f"the file must be whole gzip, but: {error}")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.removeprefix(codecs.BOM_UTF8).decode()), dict)
    except (ValueError, RecursionError):
        return False


def _parse(
    lines: Iterable[bytes], name: str, stem: str | None, kind: str, on_bad: OnBad
) -> Iterator[Chunk]:
    """The documents of one file.

    Args:
        lines: Its lines, with their ends.
        name: Its path, for ids and places.
        stem: The title of a text that has no heading.
        kind: "txt", "md", "jsonl" or "json".
        on_bad: As for `read_documents`.
    """
    if kind == "jsonl":
        yield from read_jsonl(lines, name, on_bad)
    elif kind == "json":
        yield from read_json(b"".join(lines), name, on_bad)
    else:
        yield from read_text(b"".join(lines), name, stem, kind == "md", on_bad)
