"""Markers of chunks in a text: written by `mark`, read by `find`, taken off by `without_tags`.

A marker is `<sac:chunk key="…">the text</sac:chunk>`. It may have a ratio of its own, and the id of
the document that its anchors belong to: `<sac:chunk key="…" ratio="15" source="tower.md">`. Its key
is checked: the text is hashed again, and if the digest is not the key, the marker is read as plain
text. A marker therefore means no more than "read this text as a chunk", whoever wrote it; it cannot
refer to the KV of another text. docs/markers.md compares it with the markers of llama_index_sac.

What happens to a string on its way is undone: the escapes of HTML (mustache and jinja2 templates),
of JSON (a tool that returns a dict), of JSON in JSON, and of a Python repr. Since the key decides,
nothing else can be read into a marker.
"""

from __future__ import annotations

import hmac
import html
import logging
import re
from collections.abc import Callable, Iterator
from typing import TypeAlias
from urllib.parse import quote, unquote

from sac_rag import Chunk

log = logging.getLogger(__name__)

# The key of a text: `CachedCompressor.key`.
KeyOf: TypeAlias = Callable[[str], str]

# How a tag begins: as it is written, in HTML, and in the JSON of templates.
_BEGIN = r"<|&lt;|\\+u003[cC]"
# The text within a marker contains no tag in the marker's own spelling: `mark` escapes each with a
# backslash.
_MARKER = re.compile(
    rf"(?P<begin>{_BEGIN})sac:chunk"
    r' key=(?P<quote>\\*"|&quot;|&\#34;)(?P<key>[0-9a-f]{64})(?P=quote)'
    r"(?: ratio=(?P=quote)(?P<ratio>[1-9][0-9]{0,8})(?P=quote))?"
    r"(?: source=(?P=quote)(?P<source>[\w.~%-]{1,4096})(?P=quote))?"
    r"(?P<end>>|&gt;|\\+u003[eE])"
    r"(?P<text>[^<&\\]*(?:(?!(?P=begin)/?sac:chunk)[<&\\][^<&\\]*)*)"
    r"(?P=begin)/sac:chunk(?P=end)"
)
_TAG = re.compile(rf"(?:{_BEGIN})/?sac:chunk")
_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(rf"\\(?:x({_HEX}{{2}})|u({_HEX}{{4}})|U({_HEX}{{8}})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def mark(text: str, key: str, ratio: int | None = None, source: str | None = None) -> str:
    """Writes the text of a chunk between tags; tags in it are escaped, and restored by `find`.

    Args:
        text: Any text.
        key: Its key.
        ratio: Source tokens per KV entry of this chunk. Default: that of the question.
        source: Id of its document, percent-encoded in the marker so that no template escapes it.
    """
    inside = re.sub(r"<(\\*/?sac:chunk)", r"<\\\1", text)
    fields = "" if ratio is None else f' ratio="{ratio}"'
    fields += f' source="{quote(source, safe="", errors="surrogatepass")}"' if source else ""
    return f'<sac:chunk key="{key}"{fields}>{inside}</sac:chunk>'


def find(text: str, key_of: KeyOf) -> list[str | Chunk]:
    """Splits a text at the chunks that are marked in it.

    Args:
        text: A prompt with markers.
        key_of: Computes the key of a text.

    Returns:
        Text and chunks in reading order, each chunk with its key in the metadata. A marker whose
        key is not that of its text, or that is cut off, is text, tags included; a warning is
        logged.
    """
    pieces: list[str | Chunk] = []
    end = 0
    for match in _MARKER.finditer(text):
        if (chunk := _chunk(match, key_of)) is not None:
            pieces += [text[end : match.start()], chunk]
            end = match.end()
    pieces = [piece for piece in [*pieces, text[end:]] if piece != ""]
    if any(_TAG.search(piece) for piece in pieces if isinstance(piece, str)):
        log.warning(
            "a marked chunk is read as plain text, tags included: its marker must be whole and "
            "have the key of its text; was it cut or changed on the way, or marked for another "
            "model or namespace?"
        )
    return pieces


def whole(text: str, key_of: KeyOf) -> Chunk | None:
    """The chunk of a text that is one marker and nothing else."""
    match = _MARKER.fullmatch(text)
    return None if match is None else _chunk(match, key_of)


def without_tags(text: str) -> str:
    """The text with each marker replaced by what it encloses, whatever its key.

    Where the text around a marker is HTML or JSON, what it encloses stays escaped as that is.
    """

    def enclosed(match: re.Match[str]) -> str:
        # In JSON each backslash is escaped, by as many as the quotes have.
        backslash = "\\" * (match["quote"].count("\\") + 1)
        return _unescape_tags(match["text"], match["begin"], backslash)

    return _MARKER.sub(enclosed, text)


def fits(text: str, key: str, key_of: KeyOf) -> bool:
    """Whether a key is that of a text; compared in constant time."""
    return hmac.compare_digest(key_of(text).encode(), key.encode())


def _chunk(marker: re.Match[str], key_of: KeyOf) -> Chunk | None:
    """The chunk of a marker whose key is that of its text."""
    key, ratio, source = marker["key"], marker["ratio"], marker["source"]
    for reading in _readings(marker["text"]):
        text = _unescape_tags(reading, "<", "\\")
        if fits(text, key, key_of):
            return Chunk(
                text,
                id=unquote(source, errors="surrogatepass") if source else None,
                metadata={"key": key},
                ratio=int(ratio) if ratio else None,
            )
    return None


def _readings(text: str) -> Iterator[str]:
    """The text as it is; with HTML's escapes undone; with JSON's or Python's, once and twice."""
    yield text
    yield html.unescape(text)
    for _ in range(2):
        text = _unescape(text)
        yield text


def _unescape(text: str) -> str:
    def character(escape: re.Match[str]) -> str:
        code = escape[1] or escape[2] or escape[3]
        return chr(int(code, 16)) if code else _ESCAPED.get(escape[4], escape[4])

    try:
        # Through UTF-16, which joins the two halves of a surrogate pair.
        encoded = _ESCAPE.sub(character, text).encode("utf-16", "surrogatepass")
        return encoded.decode("utf-16", "surrogatepass")
    except (ValueError, OverflowError):  # a number that is no character
        return text


def _unescape_tags(text: str, begin: str, escape: str) -> str:
    """Undoes what `mark` does to tags in a text, where their first characters look like this."""
    escaped = rf"{re.escape(begin + escape)}(\\*/?sac:chunk)"
    return re.sub(escaped, lambda tag: begin + tag[1], text)
