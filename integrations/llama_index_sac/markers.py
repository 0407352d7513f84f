"""Markers: what stands in a prompt for a chunk, and which chunk. Knows nothing of LlamaIndex."""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from sac_rag.chunk import Chunk

if TYPE_CHECKING:
    from sac_rag.pipeline import SacRAG

# Chunks a pipeline remembers; a few kilobytes of text each.
REMEMBERED = 10_000

_OPENING = "<|sac:"
MARKER = re.compile(r"(<\|sac:[0-9a-f]{32}\|>)")


class UnanswerableError(RuntimeError):
    """A prompt cannot be answered as it stands: it is too long, or a marker in it is unknown.

    No ValueError: LlamaIndex's Refine takes one for an answer that could not be parsed, logs it
    and says "Empty Response".
    """


def escape(text: str) -> str:
    """A text in which nothing can be taken for a marker; nearly every text as it is.

    An escaped beginning of a text is the beginning of the escaped text, so that an answer can be
    escaped while it is written.

    >>> escape("What does <|sac:1|> mean?")
    'What does <|sac :1|> mean?'
    """
    return text.replace(_OPENING, "<|sac :")


def require_no_marker(question: str) -> None:
    """Raises UnanswerableError for a question in which something could be taken for a marker."""
    if _OPENING in question:
        raise UnanswerableError(
            f"a question must not contain {_OPENING!r}, which stands for a chunk; "
            "llama_index_sac.escape takes it out"
        )


class Markers:
    """Markers that were issued for chunks, and the chunks they stand for. Safe between threads.

    A marker is a digest of the chunk under a secret that is drawn with this object: nobody can
    write one that he was not shown, and none is known to another pipeline or process.

    Args:
        limit: Chunks to remember; beyond it those used longest ago are forgotten.
    """

    def __init__(self, limit: int = REMEMBERED) -> None:
        self.limit = limit
        self._secret = secrets.token_bytes(32)
        self._chunks: OrderedDict[str, Chunk] = OrderedDict()
        self._lock = threading.Lock()

    def issue(self, chunk: Chunk) -> str:
        """The marker of a chunk: the same for the same text, id, node and ratio."""
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
        """A text with the markers that were issued here replaced by their chunks."""
        parts: list[str | Chunk] = list(MARKER.split(text))
        with self._lock:
            for i in range(1, len(parts), 2):
                marker = str(parts[i])
                if marker in self._chunks:
                    self._chunks.move_to_end(marker)
                    parts[i] = self._chunks[marker]
        return parts

    def pieces(self, text: str) -> tuple[str | Chunk, ...]:
        """The same, for a prompt: nothing that looks like a marker is left in it.

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
    """The markers of a pipeline, shared by everything that is made over it.

    Raises:
        TypeError: for what is no SacRAG.
    """
    from sac_rag.pipeline import SacRAG

    if not isinstance(rag, SacRAG):
        raise TypeError(
            f"expected a SacRAG, got: {type(rag).__name__}; SacRAG.from_pretrained makes one"
        )
    with _MAKING:
        return _OF_PIPELINES.setdefault(rag, Markers())
