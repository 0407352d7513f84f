"""What a retriever hands over: a text, and whose it is. Knows nothing of tokens or models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Chunk:
    """A passage of text with its origin.

    Only the text is compressed; everything else is carried along untouched, for citations.

    Attributes:
        text: The passage.
        id: The document it belongs to, if the caller has a name for that.
        title: Shown before the passage, as plain text, where the prompt format asks for it.
        metadata: Anything JSON can hold.
        ratio: Source tokens per KV entry, for this chunk alone. Default: that of the question, or
            else the compressor's own.

    Raises:
        ValueError: if the ratio is not an integer of at least 1.
    """

    text: str
    id: str | None = None
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    ratio: int | None = None

    def __post_init__(self) -> None:
        require_ratio(self.ratio)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read: no text, or only white space."""
        return not self.text.strip()

    @classmethod
    def of(cls, value: ChunkLike) -> Chunk:
        """Accepts what the public functions accept for a chunk.

        Raises:
            TypeError: if it is not a str, an (id, text) pair or a Chunk.
        """
        if isinstance(value, Chunk):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, str) for v in value):
            return cls(text=value[1], id=value[0])
        raise TypeError(
            f"a chunk must be a str, an (id, text) pair or a Chunk, was: {value!r:.200}"
        )


ChunkLike: TypeAlias = str | tuple[str, str] | Chunk


def require_ratio(ratio: object) -> None:
    """Raises ValueError for what is neither None nor an integer of at least 1."""
    if ratio is not None and (type(ratio) is not int or ratio < 1):
        raise ValueError(f"ratio must be an integer of at least 1, was: {ratio!r}")
