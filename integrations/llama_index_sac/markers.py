"""Markers: texts that stand for chunks in a prompt, issued and resolved by one process.

docs/markers.md compares them with the markers of langchain_sac.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from sac_rag import Chunk

if TYPE_CHECKING:
    from sac_rag import SacRAG

# Chunks a pipeline remembers; a few kilobytes of text each.
REMEMBERED = 10_000

_OPENING = "<|sac:"
MARKER = re.compile(r"(<\|sac:[0-9a-f]{32}\|>)")


class UnanswerableError(RuntimeError):
    """A prompt cannot be answered: it is too long, or has an unknown marker.

    Not a ValueError: LlamaIndex's Refine takes one for an answer that cannot be parsed, logs it and
    returns "Empty Response".
    """


def escape(text: str) -> str:
    """Escapes everything in a text that could be taken for a marker; most texts do not change.

    An escaped prefix of a text is a prefix of the escaped text, so that an answer can be escaped
    while it is generated.

    >>> escape("What does <|sac:1|> mean?")
    'What does <|sac :1|> mean?'
    """
    return text.replace(_OPENING, "<|sac :")


def require_no_marker(question: str) -> None:
    """Raises UnanswerableError for a question with a text that could be taken for a marker."""
    if _OPENING in question:
        raise UnanswerableError(
            f"a question must not contain {_OPENING!r}, which stands for a chunk; "
            "llama_index_sac.escape takes it out"
        )


class Markers:
    """Issued markers and the chunks that they stand for; thread-safe.

    A marker is a digest of the chunk under a secret that each instance draws: it cannot be guessed,
    and is unknown to other pipelines and processes.

    Args:
        limit: Number of chunks remembered; the least recently used are forgotten.
    """

    def __init__(self, limit: int = REMEMBERED) -> None:
        self.limit = limit
        self._secret = secrets.token_bytes(32)
        self._chunks: OrderedDict[str, Chunk] = OrderedDict()
        self._lock = threading.Lock()

    def issue(self, chunk: Chunk) -> str:
        """The marker of a chunk; equal for equal text, id, node and ratio."""
        node_id = chunk.metadata.get("node_id")
        named = repr((chunk.text, chunk.id, node_id, chunk.ratio)).encode()
        key = hashlib.blake2b(named, key=self._secret, digest_size=16).hexdigest()
        marker = f"{_OPENING}{key}|>"
        with self._lock:
            self._chunks[marker] = chunk
            self._chunks.move_to_end(marker)
            while len(self._chunks) > self.limit:
                self._chunks.popitem(last=False)
        return marker

    def known(self, text: str) -> list[str | Chunk]:
        """Splits a text at known markers, which are replaced by their chunks."""
        parts: list[str | Chunk] = list(MARKER.split(text))
        with self._lock:
            for i in range(1, len(parts), 2):
                marker = str(parts[i])
                if marker in self._chunks:
                    self._chunks.move_to_end(marker)
                    parts[i] = self._chunks[marker]
        return parts

    def pieces(self, text: str) -> tuple[str | Chunk, ...]:
        """The same for a prompt, in which unknown markers are refused.

        Raises:
            UnanswerableError: for a marker that was not issued here, was forgotten, or is damaged.
        """
        pieces = self.known(text)
        for piece in pieces:
            if isinstance(piece, str) and _OPENING in piece:
                at = piece.index(_OPENING)
                raise UnanswerableError(
                    f"every {_OPENING!r} in a prompt must begin a marker that a SACPostprocessor "
                    f"over this LLM's SacRAG issued in this process, for one of the last "
                    f"{self.limit} chunks, was: {piece[at : at + 14]!r}…; retrieve and answer with "
                    "one SacRAG, and use llama_index_sac.escape on text of others"
                )
        return tuple(pieces)


_OF_PIPELINES: WeakKeyDictionary[SacRAG, Markers] = WeakKeyDictionary()
_MAKING = threading.Lock()


def markers_of(rag: SacRAG) -> Markers:
    """The markers of a pipeline, shared by all components over it.

    Raises:
        TypeError: if it is not a SacRAG.
    """
    from sac_rag import SacRAG

    if not isinstance(rag, SacRAG):
        raise TypeError(
            f"expected a SacRAG, got: {type(rag).__name__}; SacRAG.from_pretrained makes one"
        )
    with _MAKING:
        return _OF_PIPELINES.setdefault(rag, Markers())
