"""Marks chunks, and compresses those that the store does not have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import ref

from llama_index_sac.markers import Marked, is_stored

if TYPE_CHECKING:
    from sac_rag import Chunk, SacRAG

log = logging.getLogger(__name__)

# Tokens that a prompt needs besides one chunk and the answer: instructions and question.
_PROMPT_TOKENS = 256


def mark(rag: SacRAG, chunks: Sequence[Chunk]) -> list[Marked]:
    """Issues markers for chunks of nodes; one that is too long for a prompt is left as text.

    Raises:
        ChunkMissError: with on_miss="raise", if a text is not in the store.
    """
    fits = [_fits(rag, chunk) for chunk in chunks]
    if not all(fits):
        log.warning(
            "%d retrieved texts do not fit into the model's context of %d tokens with a question "
            "and an answer, and are read as text; use smaller chunks",
            fits.count(False),
            rag.generator.max_positions,
        )
    reasons = iter(_compressed(rag, [c for c, fit in zip(chunks, fits, strict=True) if fit]))
    return [
        Marked.of(rag, _reported(chunk, next(reasons)))
        if fit
        else Marked(ref(rag), _reported(chunk, "too long", "text"), "", was_stored=False)
        for chunk, fit in zip(chunks, fits, strict=True)
    ]


def _fits(rag: SacRAG, chunk: Chunk) -> bool:
    compressor = rag.compressor
    limit = rag.generator.max_positions - rag.decoding.max_new_tokens - _PROMPT_TOKENS
    # A token is at least one byte, so most texts need not be tokenized.
    num_bytes = len(chunk.text.encode("utf-8", "surrogatepass"))
    at_most = num_bytes + len(compressor.heading_ids)
    return at_most <= limit or len(compressor.tokenize(chunk.text)) <= limit


def _compressed(rag: SacRAG, chunks: Sequence[Chunk]) -> list[str | None]:
    """Compresses and stores what is missing, if it may; miss reasons of what was compressed."""
    missing = [i for i, c in enumerate(chunks) if not c.is_empty and not is_stored(rag, c)]
    reasons: list[str | None] = [None] * len(chunks)
    if not missing or rag.on_miss == "text":
        return reasons
    fetched = rag.compressor.fetch(
        [chunks[i].text for i in missing],
        ratios=[chunks[i].ratio for i in missing],
        on_miss=rag.on_miss,
        documents=[chunks[i].id for i in missing],
    )
    for i, reason in zip(missing, fetched.misses, strict=True):
        reasons[i] = reason
    return reasons


def _reported(chunk: Chunk, miss: str | None, read_as: str = "nothing") -> Chunk:
    """The chunk with a report, which the answers that read it will update."""
    report = {
        "node_id": chunk.metadata["node_id"],
        "status": miss or "unread",
        "read_as": read_as,
    }
    return replace(chunk, metadata={**chunk.metadata, "miss": miss, "report": report})
