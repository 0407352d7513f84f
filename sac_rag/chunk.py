"""Chunk: a passage from a retriever, with the document it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Chunk:
    """A passage of text with its origin.

    Only the text is compressed; the other fields are returned unchanged, for citations.

    Attributes:
        text: The passage.
        id: Id of the document it belongs to, if it has one.
        title: Shown before the passage, as plain text, where the prompt format has a place for it.
        metadata: Any JSON values.
        ratio: Source tokens per KV entry of this chunk. Default: that of the question, or else the
            compressor's.

    Raises:
        TypeError: for a text that is no str, or an id or title that is neither a str nor None.
        ValueError: if the ratio is not an integer of at least 1.
    """

    text: str
    id: str | None = None
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    ratio: int | None = None

    def __post_init__(self) -> None:
        for name, types in (("text", str), ("id", str | None), ("title", str | None)):
            if not isinstance(value := getattr(self, name), types):
                raise TypeError(f"a chunk's {name} must be a str, was: {value!r:.100}")
        require_ratio(self.ratio)

    @property
    def is_empty(self) -> bool:
        """Whether the text is empty or only white space."""
        return not self.text.strip()

    @classmethod
    def of(cls, value: ChunkLike) -> Chunk:
        """Makes a Chunk of any form that the public functions accept.

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
    """Raises ValueError unless the ratio is None or an integer of at least 1."""
    if ratio is not None and (type(ratio) is not int or ratio < 1):
        raise ValueError(f"ratio must be an integer of at least 1, was: {ratio!r}")
