"""Windows of chunks: each sorted by length, compressed in batches and written to the store."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.errors import PromptTooLongError
from sac_rag.kv import AnchorKV
from sac_rag.reports import BadRecord, PrecompressReport

# Chunks sorted by length together: enough for batches of similar length, few enough that their
# texts and tokens are small beside a model.
WINDOW = 256


def windows(chunks: Iterable[Chunk], size: int = WINDOW) -> Iterator[list[Chunk]]:
    """Lists of up to `size` chunks, each read when it is asked for."""
    stream = iter(chunks)
    while window := list(islice(stream, size)):
        yield window


@dataclass
class _Window:
    """The texts of a window that must be computed, and counts of its other chunks."""

    token_ids: dict[str, list[int]] = field(default_factory=dict)
    ratios: dict[str, int] = field(default_factory=dict)
    documents: dict[str, set[str]] = field(default_factory=dict)
    hits: int = 0
    empty: int = 0
    bad: list[BadRecord] = field(default_factory=list)


def compress_window(
    compressor: CachedCompressor, window: Sequence[Chunk], *, skip_bad: bool
) -> Iterator[PrecompressReport]:
    """Compresses chunks in batches of similar length and stores each as soon as it is computed.

    Args:
        compressor: With the store to fill.
        window: Chunks to sort by length.
        skip_bad: Whether to count a chunk that cannot be compressed, or raise once the chunks
            before it are stored.

    Yields:
        A report per stored chunk, then one with the counts of hits, empty and bad chunks.

    Raises:
        PromptTooLongError: for a chunk longer than the model's context, unless it is skipped.
        OSError: if the store cannot be written; chunks reported before are in it.
    """
    plan = _plan(compressor, window, skip_bad=skip_bad)
    ids = list(plan.token_ids.values())
    tokens_read = compressor.tokens_read([len(row) for row in ids])
    yield from _compute(compressor, plan)
    if plan.bad and not skip_bad:
        raise PromptTooLongError(
            f"{plan.bad[0].place}: {plan.bad[0].problem} (sac_rag.retrieval.splitter.split)"
        )
    yield PrecompressReport(
        hits=plan.hits, empty=plan.empty, bad=tuple(plan.bad), tokens_read=tokens_read
    )


def _plan(compressor: CachedCompressor, window: Sequence[Chunk], *, skip_bad: bool) -> _Window:
    """Looks chunks up and tokenizes the missing ones; ends at a bad chunk that is not skipped."""
    limit = compressor.generator.max_positions
    plan = _Window()
    for chunk in window:
        text = chunk.text
        if chunk.is_empty:
            plan.empty += 1
        elif text in plan.token_ids or _is_stored(compressor, chunk):
            plan.hits += 1
        elif len(ids := compressor.tokenize(text)) > limit:
            plan.bad.append(
                BadRecord(
                    place_of(chunk),
                    f"a chunk must have at most {limit} tokens, the model's positions, has: "
                    f"{len(ids)}; split it",
                )
            )
            if not skip_bad:
                break
        else:
            plan.token_ids[text] = ids
        if text in plan.token_ids:
            ratio = compressor.kept_ratio(chunk.ratio)
            plan.ratios[text] = min(ratio, plan.ratios.get(text, ratio))
            if chunk.id is not None:
                plan.documents.setdefault(text, set()).add(chunk.id)
    return plan


def _compute(compressor: CachedCompressor, plan: _Window) -> Iterator[PrecompressReport]:
    """Compresses and stores the texts of a window; a report per chunk."""
    texts, ids = list(plan.token_ids), list(plan.token_ids.values())
    if not texts:
        return
    inner = compressor.at_ratio(min(plan.ratios.values()))
    seconds, started = 0.0, compressor.clock()
    writes: deque[tuple[AnchorKV, Future[None]]] = deque()
    waiting = 0
    # One pass is written while the next is computed; no more, or a slow disk would fill the memory.
    with ThreadPoolExecutor(max_workers=1) as writer:
        for number, whole in inner.compress_each(ids):
            seconds += compressor.clock() - started
            text = texts[number]
            kv = compressor.cut(whole, plan.ratios[text])
            documents = plan.documents.get(text, ())
            writes.append((kv, writer.submit(compressor.keep, text, kv, documents)))
            waiting += kv.num_tokens
            while waiting > compressor.batch_tokens:
                report = _written(*writes.popleft())
                waiting -= report.source_tokens
                yield report
            started = compressor.clock()
        while writes:
            yield _written(*writes.popleft())
    if compressor.guard is not None:
        compressor.guard.computed(sum(map(len, ids)), seconds)


def _written(kv: AnchorKV, write: Future[None]) -> PrecompressReport:
    """The report of a chunk, once it is stored."""
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
    """A chunk's document and part. Nothing of its text: places are written into logs."""
    name = f"a chunk of {len(chunk.text):,} characters without id" if chunk.id is None else chunk.id
    part = chunk.metadata.get("part")
    return name if part is None else f"{name}, part {part}"


def _is_stored(compressor: CachedCompressor, chunk: Chunk) -> bool:
    text, document = chunk.text, chunk.id
    if not compressor.is_stored(text, compressor.kept_ratio(chunk.ratio)):
        return False
    return document is None or compressor.claim(text, document)
