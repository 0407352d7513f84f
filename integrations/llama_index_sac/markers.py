"""Markers: texts that stand for chunks in the prompts of one request.

docs/markers.md compares them with the markers of langchain_sac.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import ref

from sac_rag import Chunk
from sac_rag.errors import name_of

if TYPE_CHECKING:
    from sac_rag import SacRAG

log = logging.getLogger(__name__)

OPENING = "<|sac:"
MARKER = re.compile(r"(<\|sac:[0-9a-f]{32}\|>)")

# Markers that a context remembers; each holds the text of its chunk.
REMEMBERED = 10_000

_SECRET = secrets.token_bytes(32)


class UnanswerableError(Exception):
    """A prompt cannot be answered: it is too long, or has content that is not text.

    Neither a ValueError, which LlamaIndex's Refine takes for an answer that cannot be parsed, logs,
    and turns into "Empty Response"; nor a RuntimeError, which its `asyncio_run` takes for nested
    event loops.
    """


@dataclass(frozen=True)
class Marked:
    """A chunk and what stands for it in a prompt.

    Attributes:
        pipeline: That the marker was issued for; not kept alive.
        chunk: Its metadata has the "report" of the latest answer, a dict.
        marker: "" if the chunk is read as text.
        was_stored: Whether the store had the chunk when it was marked.
    """

    pipeline: ref[SacRAG] = field(compare=False)
    chunk: Chunk = field(compare=False)
    marker: str
    was_stored: bool = field(compare=False)

    @classmethod
    def of(cls, rag: SacRAG, chunk: Chunk) -> Marked:
        """Issues a marker, equal for equal text, id, node and ratio.

        It is a digest under a secret that each process draws: it cannot be guessed, and that of
        another pipeline or process is unknown.
        """
        named = repr(
            (id(rag), chunk.text, chunk.id, chunk.metadata.get("node_id"), chunk.ratio)
        ).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(named, key=_SECRET, digest_size=16).hexdigest()
        return cls(ref(rag), chunk, f"{OPENING}{digest}|>", is_stored(rag, chunk))

    @property
    def is_void(self) -> bool:
        """Whether its document was forgotten since it was marked, or the pipeline is gone."""
        rag = self.pipeline()
        if rag is None:
            return True
        if not self.was_stored or is_stored(rag, self.chunk):
            return False
        compressor, text = rag.compressor, self.chunk.text
        try:
            reason = compressor.store.why_absent(
                compressor.key(text),
                text_id=compressor.text_id(text),
                fingerprint=compressor.fingerprint,
            )
        except OSError:
            return False
        return name_of(reason) == "forgotten"

    def __deepcopy__(self, memo: dict[int, Any]) -> Marked:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # A node in another process, where the marker is unknown, shows its text.
        return type(None), ()


def is_stored(rag: SacRAG, chunk: Chunk) -> bool:
    """Whether the store has a chunk at its ratio; not if the store cannot be asked."""
    try:
        return not chunk.is_empty and rag.compressor.is_stored(chunk.text, chunk.ratio)
    except OSError:
        return False  # `fetch` meets the same error, logs it, and computes without the store


# What prompts of the current request may attend to. Never changed in place: a context that was
# copied for another request does not learn what is shown in this one.
_readable: ContextVar[Mapping[str, Marked]] = ContextVar(
    "sac_readable", default=MappingProxyType({})
)


# Markers shown to one call of simple_summarize, by its span: it cuts what one prompt cannot hold.
_in_one_prompt: ContextVar[tuple[str, frozenset[str]]] = ContextVar(
    "sac_in_one_prompt", default=("", frozenset())
)


def show(marked: Marked, one_prompt: str = "") -> str:
    """The marker, which prompts of this context, and of those started from it, may now contain.

    Args:
        marked: The chunk.
        one_prompt: Span of LlamaIndex that makes a single prompt of all it is shown; "" for others.
    """
    readable = {**_readable.get(), marked.marker: marked}
    while len(readable) > REMEMBERED:
        del readable[next(iter(readable))]
    _readable.set(readable)
    span, shown = _in_one_prompt.get()
    earlier = shown if one_prompt and span == one_prompt else frozenset()
    _in_one_prompt.set((one_prompt, earlier | {marked.marker} if one_prompt else earlier))
    return marked.marker


def withdraw(text: str) -> None:
    """Makes the markers in a text unreadable in this context until they are shown again."""
    issued = set(MARKER.findall(text))
    if issued:
        _readable.set({m: marked for m, marked in _readable.get().items() if m not in issued})


def pieces(text: str, rag: SacRAG) -> tuple[str | Chunk, ...]:
    """Splits a text at the markers that this context may read for a pipeline.

    All else is text; what looks like a marker is logged.
    """
    split = _split(text, rag)
    parts = [
        part if isinstance(part, str) else part.marker if part.is_void else part.chunk
        for part in split
    ]
    _, expected = _in_one_prompt.get()
    missing = expected.difference(part.marker for part in split if isinstance(part, Marked))
    if missing and missing != expected:
        log.warning(
            "simple_summarize left out %d of %d retrieved texts, which do not fit into one prompt; "
            "the others are answered from, see source.node.sac; use another response mode",
            len(missing),
            len(expected),
        )
    unread = sum(part.count(OPENING) for part in parts if isinstance(part, str))
    if unread:
        log.warning(
            "%d times %r in a prompt is read as text: it begins no marker that a node of this "
            "request showed for this SacRAG, or the marker was cut, or its document was forgotten",
            unread,
            OPENING,
        )
    return tuple(parts)


def tokenize(text: str, rag: SacRAG) -> list[int]:
    """Token ids of a text; those of a marker are those of its chunk."""
    compressor, generator = rag.compressor, rag.generator
    return [
        token
        for part in _split(text, rag)
        for token in (
            generator.tokenize(part)
            if isinstance(part, str)
            else compressor.tokenize(part.chunk.text)
        )
    ]


def _split(text: str, rag: SacRAG) -> list[str | Marked]:
    readable = _readable.get()
    parts: list[str | Marked] = list(MARKER.split(text))
    for i in range(1, len(parts), 2):
        marked = readable.get(str(parts[i]))
        if marked is not None and marked.pipeline() is rag:
            parts[i] = marked
    return parts


def is_readable(text: str) -> bool:
    """Whether a text contains a marker that this context may read."""
    return any(marker in _readable.get() for marker in MARKER.findall(text))


def unmark(text: str, nodes: Iterable[Any] = ()) -> str:
    """Replaces markers by the texts that they stand for, to show a prompt or context to a person.

    >>> from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
    >>> from llama_index_sac import SACPostprocessor
    >>> node = NodeWithScore(node=TextNode(text="The keeper counted seven ships."))
    >>> (marked,) = SACPostprocessor(rag).postprocess_nodes([node])
    >>> unmark(marked.get_content(MetadataMode.LLM))
    'The keeper counted seven ships.'

    Args:
        text: Any text.
        nodes: Nodes whose markers are replaced, with or without scores. Markers that nodes have
            shown in the current context are replaced anyway.

    Raises:
        TypeError: if nodes is a str.
    """
    require_several(nodes, "nodes")
    known = dict(_readable.get())
    for scored in nodes:
        marked = getattr(getattr(scored, "node", scored), "marked", None)
        if isinstance(marked, Marked):  # only nodes that are marked have one
            known[marked.marker] = marked
    return MARKER.sub(lambda m: known[m[1]].chunk.text if m[1] in known else m[1], text)


def escape(text: str) -> str:
    """Escapes everything in a text that could be taken for a marker; most texts do not change.

    An escaped prefix of a text is a prefix of the escaped text, so that an answer can be escaped
    while it is generated.

    >>> escape("What does <|sac:1|> mean?")
    'What does <|sac :1|> mean?'
    """
    return text.replace(OPENING, "<|sac :")


def require_rag(rag: object) -> None:
    """Raises TypeError for what is no SacRAG."""
    from sac_rag import SacRAG

    if not isinstance(rag, SacRAG):
        raise TypeError(
            f"expected a SacRAG, got: {type(rag).__name__}; SacRAG.from_pretrained makes one"
        )


def require_several(values: object, name: str) -> None:
    """Raises TypeError for one str where several values are due."""
    if isinstance(values, str):
        raise TypeError(f"{name} must be a list, was one str: {values!r:.100}; put it in a list")


def require_known(settings: Iterable[str], known: Iterable[str], owner: str, remedy: str) -> None:
    """Raises TypeError for settings that a class does not have; pydantic would ignore them."""
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(
            f"{owner} has no argument {', '.join(unknown)}; {remedy}its arguments are "
            f"{', '.join(sorted(known))}"
        )
