"""Files to documents: reads txt, md and jsonl. Knows nothing of tokens, models or chunks' sizes."""

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
from typing import Any

from sac_rag.chunk import Chunk

_FILE = re.compile(r"(?P<stem>.+)\.(?P<kind>txt|md|jsonl)(?P<zipped>\.gz)?", re.I | re.S)
_HEADING = re.compile(r"\s*#{1,6}[ \t]+(?P<title>[^\n]+)")
_STDIN = Path("-")


def read_documents(
    paths: Iterable[str | Path], *, on_bad: Callable[[str, str], None] | None = None
) -> Iterator[Chunk]:
    """Reads each document of some files as one uncut Chunk.

    A .txt or .md file is a document, named by its path. A .jsonl file has one on each line:
    `{"text": str, "id": str, "title": str, "metadata": object}`, where only the text is needed, the
    id is else "path:line", and all other keys go into the metadata. Any of them may be gzipped
    (.gz). All text is UTF-8.

    Args:
        paths: Files; folders, which are searched in sorted order for such files, leaving out
            hidden ones and folders that are links; and "-" for standard input, which is read as
            .jsonl if its first line is a JSON object, else as .txt.
        on_bad: Called with the place ("path:line") and what is wrong with it, for each record or
            file that is then left out. Default: raise ValueError at the first.

    Returns:
        The documents, read as they are asked for. What is in the folders is listed at once.

    Raises:
        FileNotFoundError: at once, if a path is not there.
        ValueError: at once, if a file named here is of no kind that can be read.
        TypeError: if `paths` is one path.
    """
    if isinstance(paths, str | Path):
        raise TypeError(f"paths must be several paths, was one: {paths!r}; put it in a list")
    files = [file for path in paths for file in _files(path)]
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
        found = []
        for folder, folders, names in os.walk(path, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [
                Path(folder, name)
                for name in names
                if _FILE.fullmatch(name) and not name.startswith(".")
            ]
        # A pipe or a dangling link may have such a name too.
        return sorted(file for file in found if file.is_file())
    if not _FILE.fullmatch(path.name):
        raise ValueError(
            f"a file must end in .txt, .md or .jsonl, or one of these and .gz, was: '{named}'; "
            "convert it to one of them"
        )
    return [path]


def _raise(error: OSError) -> None:
    raise error


def _documents(files: list[Path], on_bad: Callable[[str, str], None]) -> Iterator[Chunk]:
    for path in files:
        name = path.as_posix()
        parts = _FILE.fullmatch(path.name)
        if parts is None:  # only "-" has no such name
            first = sys.stdin.buffer.readline()
            lines = chain([first], sys.stdin.buffer)
            yield from _parse(lines, name, None, "jsonl" if _is_object(first) else "txt", on_bad)
            continue
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
    lines: Iterable[bytes],
    name: str,
    stem: str | None,
    kind: str,
    on_bad: Callable[[str, str], None],
) -> Iterator[Chunk]:
    """The documents of one file.

    Args:
        lines: Its lines, with their ends.
        name: Its path, for ids and places.
        stem: The title of a file that has no better one.
        kind: "txt", "md" or "jsonl".
        on_bad: As for `read_documents`.
    """
    if kind == "jsonl":
        for number, line in enumerate(lines, 1):
            place = f"{name}:{number}"
            if line.strip():
                try:
                    document = _record(line.removeprefix(codecs.BOM_UTF8), place)
                except ValueError as error:
                    on_bad(place, str(error))
                else:
                    yield document
        return
    content = b"".join(lines)
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        on_bad(f"{name}:{line_number}", f"a text must be UTF-8, but: {error}")
        return
    title = stem
    if kind == "md" and (heading := _HEADING.match(text)):
        # "## Title ##" is a heading closed on the right.
        title = re.sub(r"\s#+$", "", heading["title"].rstrip()).strip() or stem
    try:
        document = _checked(Chunk(text, id=name, title=title))
    except ValueError as error:
        on_bad(name, str(error))
    else:
        yield document


def _record(line: bytes, place: str) -> Chunk:
    try:
        record = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"a record must be JSON, but: {error.msg}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"a record must be UTF-8, but: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a record must be JSON that can be read, but: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f'a record must be an object, {{"text": …}}, was: {record!r:.80}')
    text = _take(record, "text", str)
    if text is None:
        raise ValueError(f'a record must have a "text", has: {", ".join(record) or "nothing"}')
    # Numbers are ids in many data sets.
    name = _take(record, "id", str, int)
    title = _take(record, "title", str)
    metadata = _take(record, "metadata", dict) or {}
    return _checked(
        Chunk(
            text=text,
            id=place if name is None else str(name),
            title=title,
            metadata={**record, **metadata},
        )
    )


def _take(record: dict[str, Any], key: str, *kinds: type) -> Any:
    """Takes a value out of a record; null is as good as absent."""
    value = record.pop(key, None)
    if value is not None and type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f'"{key}" must be {expected}, was: {value!r:.80}')
    return value


def _checked(document: Chunk) -> Chunk:
    for part in (document.text, document.id or "", document.title or ""):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            # Half a surrogate pair, from a JSON escape or an old file name: no tokenizer takes it.
            raise ValueError(f"text, id and title must be valid Unicode, but: {error}") from None
    return document
