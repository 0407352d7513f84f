"""read_documents: finds files and reads each by its ending."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from sac_rag.chunk import Chunk
from sac_rag.retrieval.readers import parquet
from sac_rag.retrieval.readers.content import (
    MAX_DOCUMENT_BYTES,
    ByteFile,
    lines_of,
    read_whole,
    too_long,
)
from sac_rag.retrieval.readers.json_files import read_json
from sac_rag.retrieval.readers.records import read_jsonl, text_as_id
from sac_rag.retrieval.readers.text import read_text

OnBad: TypeAlias = Callable[[str, str], None]

_FILE = re.compile(
    r"(?P<stem>.+)\.(?:(?P<kind>txt|md|jsonl|json)(?P<zipped>\.gz)?|(?P<columns>parquet))",
    re.I | re.S,
)
# The one .json file that is read from a folder: other ones may hold anything.
_DOCSTORE = re.compile(r"docstore\.json(\.gz)?", re.I)
_STDIN = Path("-")
_ENDINGS = ".txt, .md, .jsonl or .json, or one of these and .gz, or in .parquet"


def read_documents(
    paths: Iterable[str | Path],
    *,
    on_bad: OnBad | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[Chunk]:
    """Reads each document of some files as one uncut Chunk.

    A .txt or .md file is a document, named by its path. A .jsonl file has one on each line:
    `{"text": str, "id": str, "title": str, "metadata": object}`, where only the text is required,
    the default id is "path:line", and all other keys go into the metadata. A .parquet file has one
    in each row, with columns named as these keys. A .json file is a list of such records, a
    document store that LlamaIndex persisted, or a vector store that LangChain dumped; records may
    also be documents as LangChain or nodes as LlamaIndex serialise them. All except .parquet may be
    gzipped (.gz). All text is UTF-8.

    Args:
        paths: Files, each read once; folders, which are searched in sorted order for such files (of
            .json files only for docstore.json), except hidden ones and folders that are links; and
            "-" for standard input, read as .jsonl if its first line is a JSON object, else as
            .txt. A document from there that has no id gets a digest of its text.
        on_bad: Called with the place ("path:line") and the problem of each record or file that is
            left out. Default: raise ValueError at the first.
        max_document_bytes: Longest .txt or .md file, line of a .jsonl file and text of a .parquet
            row, unpacked; 16 times that is the longest .json file. Longer ones are left out, and
            never all in memory.

    Returns:
        The documents, read as they are consumed: .jsonl line by line, .parquet by row group, any
        other file whole. Folders are listed at once.

    Raises:
        FileNotFoundError: at once, if a path does not exist.
        ValueError: at once, if one of the paths is a file of another kind, or if all of them are
            folders without a file to read.
        ImportError: at once, if there is a .parquet file and pyarrow is not installed.
        TypeError: if `paths` is one path.
    """
    if isinstance(paths, str | Path):
        raise TypeError(f"paths must be several paths, was one: {paths!r}; put it in a list")
    if max_document_bytes < 1:
        raise ValueError(f"max_document_bytes must be at least 1, was: {max_document_bytes}")
    return _documents(files_to_read(paths), on_bad or _refuse, max_document_bytes)


def files_to_read(paths: Iterable[str | Path]) -> list[Path]:
    """The files that `read_documents` reads, in its order; raises as it does."""
    named = list(paths)
    by_place: dict[Path, Path] = {}
    for file in (file for path in named for file in _files(path)):
        by_place.setdefault(file.absolute(), file)
    files = list(by_place.values())
    if named and not files:
        raise ValueError(_nothing_in(named))
    for file in files:
        if file.suffix.lower() == ".parquet":
            parquet.require_pyarrow(file)
            break
    return files


def left_out(paths: Iterable[str | Path]) -> dict[str, int]:
    """Files in folders that `read_documents` does not read: their number by ending, most first."""
    counts = Counter(
        file.suffix.lower() or "without an ending"
        for path in map(Path, paths)
        if path.is_dir()
        for file in _files_in(path)
        if not _is_read_unnamed(file.name)
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _nothing_in(folders: list[str | Path]) -> str:
    others = ", ".join(f"{count} {ending}" for ending, count in left_out(folders).items())
    names = ", ".join(f"'{folder}'" for folder in folders)
    return (
        f"there must be a file to read, one that ends in {_ENDINGS}; in {names} there are: "
        f"{others or 'none'}; convert them, or name another folder"
    )


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
        return sorted(file for file in _files_in(path) if _is_read_unnamed(file.name))
    if not _FILE.fullmatch(path.name):
        raise ValueError(
            f"a file must end in {_ENDINGS}, was: '{named}'; convert it to one of them"
        )
    return [path]


def _files_in(path: Path) -> Iterator[Path]:
    """The files in a folder and the folders in it, except hidden ones."""
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            # A pipe or a dangling link is no file.
            if not name.startswith(".") and (file := Path(folder, name)).is_file():
                yield file


def _is_read_unnamed(name: str) -> bool:
    parts = _FILE.fullmatch(name)
    if parts is None:
        return False
    return (parts["kind"] or "").lower() != "json" or _DOCSTORE.fullmatch(name) is not None


def _raise(error: OSError) -> None:
    raise error


def _documents(files: list[Path], on_bad: OnBad, most: int) -> Iterator[Chunk]:
    for path in files:
        name = path.as_posix()
        parts = _FILE.fullmatch(path.name)
        try:
            if parts is None:  # only "-" has no such name
                yield from _of_stdin(sys.stdin.buffer, on_bad, most)
            elif parts["columns"]:
                yield from parquet.read_parquet(path, name, on_bad, most)
            else:
                with gzip.open(path) if parts["zipped"] else path.open("rb") as file:
                    yield from _parse(
                        file, name, parts["stem"], parts["kind"].lower(), on_bad, most
                    )
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            on_bad(name, f"the file must be whole gzip, but: {error}")
        except OSError as error:
            on_bad(name, f"the file must be one that can be read, but: {error}")


def _of_stdin(file: ByteFile, on_bad: OnBad, most: int) -> Iterator[Chunk]:
    """The documents of standard input, whose kind its first line shows."""
    first = file.readline(most + 1)
    if len(first) <= most and _is_object(first):
        lines = chain([first], lines_of(file, most))
        yield from read_jsonl(lines, "-", on_bad, too_long=too_long(most), id_of=text_as_id)
        return
    content = first + (file.read(most + 1) if len(first) <= most else b"")
    if len(content) > most:
        on_bad("-", too_long(most))
    else:
        yield from read_text(content, "-", None, False, on_bad, text_as_id)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.removeprefix(codecs.BOM_UTF8).decode()), dict)
    except (ValueError, RecursionError):
        return False


def _parse(
    file: ByteFile, name: str, stem: str, kind: str, on_bad: OnBad, most: int
) -> Iterator[Chunk]:
    """The documents of one file.

    Args:
        file: Open for reading.
        name: Its path, for ids and places.
        stem: The title of a text that has no heading.
        kind: "txt", "md", "jsonl" or "json".
        on_bad: As for `read_documents`.
        most: Bytes of the longest document.
    """
    if kind == "jsonl":
        yield from read_jsonl(lines_of(file, most), name, on_bad, too_long=too_long(most))
        return
    try:
        content = read_whole(file, kind, most)
    except ValueError as error:
        on_bad(name, str(error))
        return
    if kind == "json":
        yield from read_json(content, name, on_bad)
    else:
        yield from read_text(content, name, stem, kind == "md", on_bad)
