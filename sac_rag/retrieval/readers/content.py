"""Bytes of files: read up to a limit, so that none fills the memory, and checked to be UTF-8."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Protocol

MAX_DOCUMENT_BYTES = 16 * 2**20  # a thousand pages are about 2 MiB
# A .json file is one value, so all of its documents are read at once.
_JSON_DOCUMENTS = 16

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # begins as UTF-16 does
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class ByteFile(Protocol):
    """A file of bytes, gzipped or not."""

    def read(self, size: int, /) -> bytes:
        """Up to that many bytes."""

    def readline(self, size: int, /) -> bytes:
        """Up to that many bytes of a line, with its end."""


def read_whole(file: ByteFile, kind: str, most: int) -> bytes:
    """All bytes of a file.

    Args:
        file: Open for reading.
        kind: Its ending.
        most: Bytes of the longest document.

    Raises:
        ValueError: if it has more than that, unpacked; it is read up to there.
    """
    limit = _JSON_DOCUMENTS * most if kind == "json" else most
    content = file.read(limit + 1)
    if len(content) <= limit:
        return content
    if kind == "json":
        raise ValueError(f"{_limit('a .json file', limit)}; write a record per line, as .jsonl")
    raise ValueError(too_long(most))


def lines_of(file: ByteFile, most: int) -> Iterator[bytes | None]:
    """The lines of a file with their ends; None for one of more than `most` bytes."""
    while line := file.readline(most + 1):
        is_whole = len(line) <= most
        yield line if is_whole else None
        while line and not is_whole and not line.endswith(b"\n"):
            line = file.readline(most + 1)


def too_long(most: int) -> str:
    """What is wrong with a line of more than `most` bytes, or a text as long."""
    return (
        f"{_limit('a document', most)}; split it into several, or give read_documents a higher "
        "max_document_bytes"
    )


def _limit(what: str, most: int) -> str:
    return f"{what} must have at most {most:,} bytes, unpacked"


def other_encoding(content: bytes) -> str | None:
    """What is wrong with bytes whose byte-order mark is not that of UTF-8; None if it is none."""
    name = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    if name is None:
        return None
    return f"must be UTF-8, is {name} by its byte-order mark; convert the file: {_convert(name)}"


def not_utf8(content: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no UTF-8, and the command that converts them."""
    return other_encoding(content) or (
        f"must be UTF-8, but: {error}; if it is of Windows, convert the file: {_convert('CP1252')}"
    )


def _convert(encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 OLD > NEW"
