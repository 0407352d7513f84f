"""Marks chunks in a text, and finds them again. Knows nothing of LangChain, stores or models.

A marker is `<sac:chunk key="…">the text</sac:chunk>`, or `<sac:chunk key="…" ratio="15">` with the
ratio to attend to it at. It proves itself: the text is hashed again,
and where that does not give the key, it is no marker but text like any other. So a marker says no
more than "read this text as a chunk", whoever wrote it, and cannot stand for another text's KV.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Callable
from typing import TypeAlias

from sac_rag.chunk import Chunk

log = logging.getLogger(__name__)

# The key of a text: `CachedCompressor.key`.
KeyOf: TypeAlias = Callable[[str], str]

# No text within a marker has a tag in it: `mark` puts a backslash into every one.
_PLAIN = (
    r'<sac:chunk key="([0-9a-f]{64})"(?: ratio="([1-9][0-9]{0,8})")?>'
    r"([^<]*(?:<(?!/?sac:chunk)[^<]*)*)</sac:chunk>"
)
# The same as {{context}} of a mustache template writes it.
_HTML = (
    r"&lt;sac:chunk key=&quot;([0-9a-f]{64})&quot;(?: ratio=&quot;([1-9][0-9]{0,8})&quot;)?&gt;"
    r'((?:(?!&lt;/?sac:chunk)[^<>"])*)&lt;/sac:chunk&gt;'
)
_MARKER = re.compile(f"{_PLAIN}|{_HTML}")


def mark(text: str, key: str, ratio: int | None = None) -> str:
    """Writes a chunk's text between tags; tags in it lose their meaning, and get it back in `find`.

    Args:
        text: Any text.
        key: Its key.
        ratio: Source tokens per KV entry to attend to it at. Default: that of the question.
    """
    inside = re.sub(r"<(\\*/?sac:chunk)", r"<\\\1", text)
    at_ratio = "" if ratio is None else f' ratio="{ratio}"'
    return f'<sac:chunk key="{key}"{at_ratio}>{inside}</sac:chunk>'


def find(text: str, key_of: KeyOf) -> list[str | Chunk]:
    """Takes a text apart where chunks are marked in it.

    Args:
        text: As a prompt template left it.
        key_of: Gives the key that a text must have.

    Returns:
        Text and chunks in reading order, each chunk with its key in the metadata. What is marked
        with another key than its own is text, tags and all.
    """
    pieces: list[str | Chunk] = []
    end = ignored = 0
    for found in _MARKER.finditer(text):
        key, ratio = found[1] or found[4], found[2] or found[5]
        inside = _raw(found[3] if found[1] else _from_html(found[6]))
        if not fits(inside, key, key_of):
            ignored += 1
            continue
        chunk = Chunk(inside, metadata={"key": key}, ratio=int(ratio) if ratio else None)
        pieces += [text[end : found.start()], chunk]
        end = found.end()
    pieces.append(text[end:])
    if ignored:
        log.warning(
            "%d marked chunks do not have the keys of their texts and are read as plain text; "
            "were they compressed for another model or namespace, or changed on the way?",
            ignored,
        )
    return [piece for piece in pieces if piece != ""]


def fits(text: str, key: str, key_of: KeyOf) -> bool:
    """Whether this is the key of the text; takes as long for a wrong one as for the right one."""
    return hmac.compare_digest(key_of(text).encode(), key.encode())


def _raw(inside: str) -> str:
    return re.sub(r"<\\(\\*/?sac:chunk)", r"<\1", inside)


def _from_html(text: str) -> str:
    for code, character in ("&quot;", '"'), ("&gt;", ">"), ("&lt;", "<"), ("&amp;", "&"):
        text = text.replace(code, character)
    return text
