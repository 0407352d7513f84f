"""Chunks into a store ahead of any question. Knows nothing of files, processes or answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeAlias

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.errors import PromptTooLongError
from sac_rag.kv import AnchorKV
from sac_rag.reports import BadRecord, PrecompressReport
from sac_rag.stores.base import ReindexingStore

# Chunks sorted by length together: enough that those of a pass are of like length, few enough that
# their texts and tokens are nothing beside a model.
WINDOW = 256

Compress: TypeAlias = Callable[[Iterator[list[Chunk]]], Iterator[PrecompressReport]]


def precompress(
    compressor: CachedCompressor,
    chunks: Iterable[ChunkLike],
    *,
    on_progress: Callable[[int], None] | None = None,
    on_bad: Callable[[BadRecord], None] | None = None,
    whole_documents: bool = False,
) -> PrecompressReport:
    """Compresses and stores what the store does not have; see `SacRAG.precompress`."""
    started = time.perf_counter()
    done = PrecompressReport()
    for more in increments(
        compressor,
        map(Chunk.of, chunks),
        skip_bad=on_bad is not None,
        whole_documents=whole_documents,
    ):
        done += more
        for record in more.bad:
            on_bad(record)  # type: ignore[misc]  # none is skipped without it
        if on_progress is not None and more.chunks:
            on_progress(more.chunks)
    return done + PrecompressReport(seconds=time.perf_counter() - started)


def increments(
    compressor: CachedCompressor,
    chunks: Iterable[Chunk],
    *,
    skip_bad: bool,
    whole_documents: bool,
    compress: Compress | None = None,
) -> Iterator[PrecompressReport]:
    """Compresses and stores what the store does not have.

    Args:
        compressor: With the store to fill.
        chunks: Read as they are needed.
        skip_bad: Whether to count chunks that cannot be compressed, or raise.
        whole_documents: Whether to delete entries of former versions of documents in the end.
        compress: Compresses windows elsewhere, as `Workers.run` does, into the same store.
            Default: here, one after the other.

    Yields:
        What was done since the last time.
    """
    reindexing = Reindexing(compressor)
    stream = windows(reindexing.watch(chunks) if whole_documents else chunks)
    if compress is not None:
        yield from compress(stream)
    else:
        for window in stream:
            yield from compress_window(compressor, window, skip_bad=skip_bad)
    yield PrecompressReport(deleted=reindexing.finish())


def windows(chunks: Iterable[Chunk], size: int = WINDOW) -> Iterator[list[Chunk]]:
    """Chunks, so many at a time, read as they are asked for."""
    stream = iter(chunks)
    while window := list(islice(stream, size)):
        yield window


def compress_window(
    compressor: CachedCompressor, window: Sequence[Chunk], *, skip_bad: bool
) -> Iterator[PrecompressReport]:
    """Compresses some chunks in batches of like length and stores each as soon as it is done.

    Args:
        compressor: With the store to fill.
        window: Chunks to be sorted by length.
        skip_bad: Whether to count a chunk that cannot be compressed, or raise when those before it
            are stored.

    Yields:
        What was done since the last time: first what was computed, then what was found, empty or
        bad.

    Raises:
        PromptTooLongError: for a chunk longer than the model's context, unless it is skipped.
        OSError: if the store cannot be written; what was yielded before is in it.
    """
    plain = compressor.compressor
    limit = plain.generator.max_positions
    tokens: dict[str, list[int]] = {}
    ratios: dict[str, int] = {}
    owners: dict[str, set[str]] = {}
    hits = empty = 0
    bad: list[BadRecord] = []
    for chunk in window:
        text = chunk.text
        if chunk.is_empty:
            empty += 1
        elif text in tokens or _is_stored(compressor, chunk):
            hits += 1
        elif len(ids := plain.tokenize(text)) > limit:
            bad.append(
                BadRecord(
                    place_of(chunk),
                    f"a chunk must have at most {limit} tokens, the model's positions, has: "
                    f"{len(ids)}; split it",
                )
            )
            if not skip_bad:
                break
        else:
            tokens[text] = ids
        if text in tokens:
            ratio = compressor.kept_ratio(chunk.ratio)
            ratios[text] = min(ratio, ratios.get(text, ratio))
            if chunk.id is not None:
                owners.setdefault(text, set()).add(chunk.id)
    texts, ids_of_texts = list(tokens), list(tokens.values())
    computing = compressor.at_ratio(min(ratios.values(), default=plain.config.ratio))
    read = plain.tokens_read([len(ids) for ids in ids_of_texts])
    seconds, started = 0.0, time.perf_counter()
    writes: deque[tuple[AnchorKV, Future[None]]] = deque()
    waiting = 0
    # One pass is written while the next is computed; no more, or a slow disk would fill the memory.
    with ThreadPoolExecutor(max_workers=1) as writer:
        for number, whole in computing.compress_each(ids_of_texts):
            seconds += time.perf_counter() - started
            text = texts[number]
            kv = compressor.cut(whole, ratios[text])
            writes.append((kv, writer.submit(compressor.keep, text, kv, owners.get(text, ()))))
            waiting += kv.num_tokens
            while waiting > plain.batch_tokens:
                done = _written(*writes.popleft())
                waiting -= done.source_tokens
                yield done
            started = time.perf_counter()
        while writes:
            yield _written(*writes.popleft())
    if compressor.guard is not None and tokens:
        compressor.guard.computed(sum(map(len, ids_of_texts)), seconds)
    if bad and not skip_bad:
        raise PromptTooLongError(
            f"{bad[0].place}: {bad[0].problem} (sac_rag.retrieval.splitter.split)"
        )
    yield PrecompressReport(hits=hits, empty=empty, bad=tuple(bad), tokens_read=read)


def _written(kv: AnchorKV, write: Future[None]) -> PrecompressReport:
    """Waits until a chunk is stored."""
    try:
        write.result()
    except OSError as error:
        raise OSError(
            f"the store could not keep a compressed chunk: {error}; free some space or check the "
            "folder's permissions, then run it again"
        ) from error
    return PrecompressReport(
        computed=1, source_tokens=kv.num_tokens, anchors=kv.num_anchors, nbytes=kv.nbytes
    )


def place_of(chunk: Chunk) -> str:
    """Where a chunk is from, for whoever has to look for it."""
    name = repr(chunk.text[:40]) if chunk.id is None else chunk.id
    part = chunk.metadata.get("part")
    return name if part is None else f"{name}, part {part}"


def _is_stored(compressor: CachedCompressor, chunk: Chunk) -> bool:
    text, document = chunk.text, chunk.id
    if not compressor.is_stored(text, compressor.kept_ratio(chunk.ratio)):
        return False
    return document is None or compressor.claim(text, document)


class Reindexing:
    """Watches the chunks of whole documents go by and deletes what else the store has of them.

    Chunks of one document may come apart from each other. In memory are the ids of all documents,
    and the keys of those that have changed.
    """

    def __init__(self, compressor: CachedCompressor) -> None:
        self._compressor = compressor
        self._store = compressor.store if isinstance(compressor.store, ReindexingStore) else None
        self._seen: set[str] = set()
        # The keys that each document with something to delete still has.
        self._changed: dict[str, set[str]] = {}

    def watch(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Hands chunks on."""
        document: str | None = None
        keys: set[str] = set()
        for chunk in chunks:
            if chunk.id != document:
                self._end(document, keys)
                document, keys = chunk.id, set()
            if not chunk.is_empty:
                keys.add(self._compressor.key(chunk.text))
            yield chunk
        self._end(document, keys)

    def finish(self) -> int:
        """Deletes, once all chunks are stored; killed before, it is done by the next run.

        Returns:
            How many entries were deleted.
        """
        if self._store is None or not self._changed:
            return 0
        named = {self._compressor.document_id(name): keys for name, keys in self._changed.items()}
        deleted = self._store.replace_documents(named)
        self._changed.clear()
        return deleted

    def _end(self, document: str | None, keys: set[str]) -> None:
        if document is None or self._store is None:
            return
        if document in self._changed:
            self._changed[document] |= keys
        elif document not in self._seen:
            stored = self._store.keys_of(self._compressor.document_id(document))
            if not keys.issuperset(stored):
                self._changed[document] = keys
        # Else nothing was to be deleted, and what is there since is of this run.
        self._seen.add(document)
