"""Chunks into a store ahead of any question. Knows nothing of prompts or answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.errors import PromptTooLong
from sac_rag.reports import PrecompressReport

# Chunks compressed and stored together: an interrupted run repeats at most these.
_WINDOW = 32


def precompress(
    compressor: CachedCompressor,
    chunks: Iterable[ChunkLike],
    on_progress: Callable[[int], None] | None = None,
) -> PrecompressReport:
    """Compresses and stores what the store does not have.

    Args:
        compressor: With the store to fill.
        chunks: Texts, (document id, text) pairs or Chunks; streamed, never all in memory.
        on_progress: Called with the number of chunks done since the last call.

    Raises:
        PromptTooLong: for a chunk longer than the model's context; those before it are stored.
        OSError: if the store cannot be written.
    """
    started = time.perf_counter()
    computed = hits = empty = tokens = anchors = nbytes = 0
    stream = map(Chunk.of, chunks)
    while window := list(islice(stream, _WINDOW)):
        todo = []
        for chunk in window:
            if chunk.is_empty:
                empty += 1
            elif chunk.text in compressor and (
                chunk.id is None or compressor.claim(chunk.text, chunk.id)
            ):
                hits += 1
            else:
                todo.append(chunk)
        texts, owners = [chunk.text for chunk in todo], [chunk.id for chunk in todo]
        failures = compressor.store_failures
        try:
            fetched = compressor.fetch(texts, documents=owners)
        except PromptTooLong:
            # Nothing of this window is stored yet: store what stands before the one too long.
            for text, owner in zip(texts, owners, strict=True):
                compressor.fetch([text], documents=[owner])
            raise
        if compressor.store_failures > failures:
            raise OSError(
                "the store could not keep the compressed chunks (see the log); "
                "free some space or check the folder's permissions, then run it again"
            )
        distinct = dict(zip(texts, fetched.kvs, strict=True))
        hits += len(texts) - len(distinct)
        for kv in distinct.values():
            if kv is not None:
                computed += 1
                tokens += kv.num_tokens
                anchors += kv.num_anchors
                nbytes += kv.nbytes
        if on_progress is not None:
            on_progress(len(window))
    return PrecompressReport(
        computed, hits, empty, tokens, anchors, nbytes, time.perf_counter() - started
    )
