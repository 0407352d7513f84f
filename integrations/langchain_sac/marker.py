"""Markers of chunks in a text: written by `mark`, read by `find`.

A marker is `<sac:chunk key="…">the text</sac:chunk>`, or `<sac:chunk key="…" ratio="15">` with a
ratio of its own. Its key is checked: the text is hashed again, and if the digest is not the key,
the marker is read as plain text. A marker therefore means no more than "read this text as a chunk",
whoever wrote it, and cannot refer to the KV of another text. docs/markers.md compares it with the
markers of llama_index_sac.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Callable
from typing import TypeAlias

from sac_rag import Chunk

log = logging.getLogger(__name__)

# The key of a text: `CachedCompressor.key`.
KeyOf: TypeAlias = Callable[[str], str]

# The text within a marker contains no tag: `mark` escapes each with a backslash.
_PLAIN = (
    r'<sac:chunk key="([0-9a-f]{64})"(?: ratio="([1-9][0-9]{0,8})")?>'
    r"([^<]*(?:<(?!/?sac:chunk)[^<]*)*)</sac:chunk>"
)
# The same, as {{context}} of a mustache template escapes it.
_HTML = (
    r"&lt;sac:chunk key=&quot;([0-9a-f]{64})&quot;(?: ratio=&quot;([1-9][0-9]{0,8})&quot;)?&gt;"
    r'((?:(?!&lt;/?sac:chunk)[^<>"])*)&lt;/sac:chunk&gt;'
)
_MARKER = re.compile(f"{_PLAIN}|{_HTML}")


def mark(text: str, key: str, ratio: int | None = None) -> str:
    """Writes the text of a chunk between tags; tags in it are escaped, and restored by `find`.

    Args:
        text: Any text.
        key: Its key.
        ratio: Source tokens per KV entry of this chunk. Default: that of the question.
    """
    inside = re.sub(r"<(\\*/?sac:chunk)", r"<\\\1", text)
    at_ratio = "" if ratio is None else f' ratio="{ratio}"'
    return f'<sac:chunk key="{key}"{at_ratio}>{inside}</sac:chunk>'


def find(text: str, key_of: KeyOf) -> list[str | Chunk]:
    """Splits a text at the chunks that are marked in it.

    Args:
        text: A prompt with markers.
        key_of: Computes the key of a text.

    Returns:
        Text and chunks in reading order, each chunk with its key in the metadata. A marker whose
        key is not that of its text is text, tags included.
    """
    pieces: list[str | Chunk] = []
    end = ignored = 0
    for match in _MARKER.finditer(text):
        key, ratio = match[1] or match[4], match[2] or match[5]
        inside = _raw(match[3] if match[1] else _from_html(match[6]))
        if not fits(inside, key, key_of):
            ignored += 1
            continue
        chunk = Chunk(inside, metadata={"key": key}, ratio=int(ratio) if ratio else None)
        pieces += [text[end : match.start()], chunk]
        end = match.end()
    pieces.append(text[end:])
    if ignored:
        log.warning(
            "%d marked chunks do not have the keys of their texts and are read as plain text; "
            "were they compressed for another model or namespace, or changed on the way?",
            ignored,
        )
    return [piece for piece in pieces if piece != ""]


def fits(text: str, key: str, key_of: KeyOf) -> bool:
    """Whether a key is that of a text; compared in constant time."""
    return hmac.compare_digest(key_of(text).encode(), key.encode())


def _raw(inside: str) -> str:
    return re.sub(r"<\\(\\*/?sac:chunk)", r"<\1", inside)


def _from_html(text: str) -> str:
    for code, character in ("&quot;", '"'), ("&gt;", ">"), ("&lt;", "<"), ("&amp;", "&"):
        text = text.replace(code, character)
    return text
