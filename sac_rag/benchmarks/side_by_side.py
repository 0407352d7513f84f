"""First token and whole answer from the same chunks, of us and of what users would pick instead.

All ways of a number of chunks are timed in turn, so that whatever else the machine does meets all
of them alike.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sac_rag.benchmarks import contestants
from sac_rag.benchmarks.contestants import Moments, Way
from sac_rag.benchmarks.first_token import FORMAT, QUESTION, cut, full, untrained
from sac_rag.benchmarks.store import drop_from_memory
from sac_rag.benchmarks.timing import Times, in_turn, seconds_of
from sac_rag.cached import CachedCompressor
from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.stores.disk import DiskStore
from sac_rag.stores.memory import MemoryStore
from sac_rag.whole_file import whole_file

# "cold": on disk, and not in the system's memory.
STORES = ("disk", "memory", "cold")
FLOOR, TEXT, BEHIND_PREFIX = "question alone", "HF, text", "HF, text, prefix cached"
LLAMA_COLD, LLAMA_RESTORED = "llama.cpp, text", "llama.cpp, state restored"


@dataclass(frozen=True)
class SpeedRow:
    """Times of one way to answer, for one length of the answer.

    Attributes:
        system: The way: one of the names above, or the compression method.
        k: Chunks in the prompt.
        ratio: Source tokens per KV entry; None where the text is read.
        budget: How entries are distributed over heads; None where the text is read.
        store: One of `STORES`; None without a store.
        dtype: Dtype that the model computes in; None for llama.cpp, whose GGUF says it.
        device: What it ran on.
        threads: CPU threads.
        source_tokens: Tokens of the chunks.
        kv_bytes: Bytes read from the store.
        compress_s: Seconds that compressing and storing the chunks took, once.
        answer_tokens: Length of the answer; no answer ends before it.
        first_token: Seconds to the first token, everything included.
        answer: Seconds to the last token.
        skipped: Why it was not measured; None if it was.
    """

    system: str
    k: int
    ratio: int | None
    budget: str | None
    store: str | None
    dtype: str | None
    device: str
    threads: int
    source_tokens: int
    kv_bytes: int
    compress_s: float
    answer_tokens: int
    first_token: Times | None
    answer: Times | None
    skipped: str | None = None

    @property
    def name(self) -> str:
        """The way in words."""
        if self.ratio is None:
            return self.system
        entries = "every token's KV" if self.ratio == 1 else f"{self.ratio}x"
        heads = ", equal heads" if self.budget == "uniform" and self.ratio > 1 else ""
        return f"{self.system}, {entries}{heads}, {self.store}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, and the name; times with their median and spread."""
        return (
            {"name": self.name}
            | asdict(self)
            | {
                name: None if times is None else times.to_dict()
                for name, times in (("first_token", self.first_token), ("answer", self.answer))
            }
        )


@dataclass(frozen=True)
class Settings:
    """Axes of a run.

    Attributes:
        ks: Numbers of chunks.
        ratios: Source tokens per KV entry; at 1 every token is kept, by `full`.
        stores: Of `STORES`.
        answer_tokens: Lengths of answers; each is a part of the longest one.
        chunk_tokens: Tokens of every chunk.
        repeats: Measurements of each way.
        gguf: The same model for llama.cpp. Default: llama.cpp is left out.

    Raises:
        ValueError: for an unknown store, or no number of an axis.
    """

    ks: Sequence[int] = (1, 4, 8)
    ratios: Sequence[int] = (1, 5, 15)
    stores: Sequence[str] = ("disk", "memory")
    answer_tokens: Sequence[int] = (1, 32)
    chunk_tokens: int = 510
    repeats: int = 3
    gguf: Path | None = None

    def __post_init__(self) -> None:
        unknown = set(self.stores) - set(STORES)
        if unknown:
            raise ValueError(f"stores must be of {', '.join(STORES)}, were: {sorted(unknown)}")
        if not (self.ks and self.answer_tokens):
            raise ValueError("at least one number of chunks and one length of answers is needed")


@dataclass(frozen=True)
class _Filled:
    """A pipeline with the chunks in its store; seconds per chunk that this took."""

    rag: SacRAG
    store: str
    folder: Path
    chunk_s: float


@dataclass(frozen=True)
class _Entrant:
    """A way with what its rows say of it."""

    way: Way | None
    fields: dict[str, Any]


def measure(
    generator: Generator,
    texts: Iterable[str],
    settings: Settings,
    *,
    compressor: Compressor | None = None,
    plain: Generator | None = None,
) -> Iterator[SpeedRow]:
    """Times all ways to answer in this process.

    Args:
        generator: Model, dtype, device and threads of our ways.
        texts: Prose to cut the chunks from.
        settings: The axes.
        compressor: For the ratios above 1. Default: SAC without trained weights, which is as fast.
        plain: The same model for HF's ways, if `generator` has the compressor's LoRA beside it.

    Raises:
        ValueError: if the texts are too short for the largest k.
    """
    chunks = cut(generator, texts, max(settings.ks), settings.chunk_tokens)
    with contextlib.ExitStack() as stack:
        filled = list(_pipelines(generator, compressor, chunks, settings, stack))
        text = SacRAG(CachedCompressor(full(plain or generator), {}), prompt_format=FORMAT)
        why, llama = contestants.why_no_llama_cpp(settings.gguf), None
        if settings.gguf is not None and why is None:
            positions = len(text.prompt_ids(QUESTION, chunks)) + max(settings.answer_tokens) + 1
            llama = contestants.LlamaCpp(settings.gguf, positions, torch.get_num_threads())
        for k in settings.ks:
            entrants = [
                *_ours(filled, chunks[:k], settings),
                *_others(text, chunks[:k], settings, llama, why),
            ]
            yield from _rows(entrants, k, settings, generator)


def _pipelines(
    generator: Generator,
    compressor: Compressor | None,
    chunks: Sequence[str],
    settings: Settings,
    stack: contextlib.ExitStack,
) -> Iterator[_Filled]:
    """A pipeline per ratio, budget and store, with the chunks in the store."""
    keeping = full(generator)
    sac = compressor or untrained(generator)
    for ratio in settings.ratios:
        for method in [keeping] if ratio == 1 else _budgets(sac.at_ratio(ratio)):
            for store in settings.stores:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                anchors = MemoryStore() if store == "memory" else DiskStore(folder)
                stack.callback(anchors.close)
                # Loading is measured here, however slow it is, so no guard.
                cached = CachedCompressor(method, anchors, guard=False)
                rag = SacRAG(cached, prompt_format=FORMAT)
                seconds = seconds_of(partial(rag.precompress, chunks))
                yield _Filled(rag, store, folder, seconds / len(chunks))


def _budgets(compressor: Compressor) -> list[Compressor]:
    """The compressor, and the same with equal heads if it has others."""
    equal = compressor.with_budget("uniform")
    return [compressor] if equal is compressor else [compressor, equal]


def _ours(
    filled: Sequence[_Filled], chunks: Sequence[str], settings: Settings
) -> Iterator[_Entrant]:
    longest = max(settings.answer_tokens)
    for one in filled:
        rag = one.rag
        way = partial(contestants.from_anchors, rag, [(QUESTION, chunks)], longest)
        config = rag.compressor.config
        fetched = rag.compressor.fetch(chunks)
        yield _Entrant(
            partial(_cold, one.folder, way) if one.store == "cold" else way,
            {
                "system": config.method,
                "ratio": config.ratio,
                "budget": config.budget,
                "store": one.store,
                "dtype": rag.generator.dtype_name,
                "kv_bytes": fetched.load_bytes,
                "compress_s": len(chunks) * one.chunk_s,
            },
        )
    rag = filled[0].rag
    yield _Entrant(
        partial(contestants.from_anchors, rag, [(QUESTION, [])], longest),
        {"system": FLOOR, "dtype": rag.generator.dtype_name},
    )


def _others(
    text: SacRAG,
    chunks: Sequence[str],
    settings: Settings,
    llama: contestants.LlamaCpp | None,
    why: str | None,
) -> Iterator[_Entrant]:
    longest = max(settings.answer_tokens)
    ids = text.prompt_ids(QUESTION, chunks)
    dtype = text.generator.dtype_name
    yield _Entrant(
        partial(contestants.from_text, text.generator, ids, longest),
        {"system": TEXT, "dtype": dtype},
    )
    yield _Entrant(
        partial(contestants.from_text_behind_prefix, text, QUESTION, chunks, longest),
        {"system": BEHIND_PREFIX, "dtype": dtype},
    )
    if llama is None:
        yield _Entrant(None, {"system": LLAMA_COLD, "skipped": why})
        yield _Entrant(None, {"system": LLAMA_RESTORED, "skipped": why})
        return
    question = len(text.prompt_ids(QUESTION, [])) - len(text.beginning_ids())
    yield _Entrant(partial(llama.cold, ids, longest), {"system": LLAMA_COLD})
    yield _Entrant(partial(llama.restored, ids, question, longest), {"system": LLAMA_RESTORED})


def _rows(
    entrants: Sequence[_Entrant], k: int, settings: Settings, generator: Generator
) -> Iterator[SpeedRow]:
    running = [entrant.way for entrant in entrants if entrant.way is not None]
    results = iter(in_turn(running, settings.repeats, warm_up=True))
    common = {
        "k": k,
        "device": str(generator.device),
        "threads": torch.get_num_threads(),
        "source_tokens": k * settings.chunk_tokens,
        **dict.fromkeys(("ratio", "budget", "store", "dtype")),
        "kv_bytes": 0,
        "compress_s": 0.0,
    }
    for entrant in entrants:
        moments: list[Moments] = [] if entrant.way is None else next(results)
        for tokens in settings.answer_tokens:
            times = [Times(tuple(m[at - 1] for m in moments)) for at in (1, tokens)]
            first, answer = times if moments else (None, None)
            yield SpeedRow(
                **{**common, **entrant.fields},
                answer_tokens=tokens,
                first_token=first,
                answer=answer,
            )


def _cold(folder: Path, way: Way) -> Moments:
    """Answers with a store's files dropped from the system's memory."""
    drop_from_memory(folder)
    return way()


def break_even(row: SpeedRow, rows: Sequence[SpeedRow]) -> float | None:
    """Questions over the same chunks after which compressing them has paid.

    That is the time of compressing over what an answer takes less than HF's, its prefix cached.
    None without such a row beside it, or where an answer takes as long.
    """
    (text,) = [other.answer for other in _beside(row, rows, BEHIND_PREFIX)] or [None]
    if not row.compress_s or row.answer is None or text is None:
        return None
    saved = text.median - row.answer.median
    return row.compress_s / saved if saved > 0 else None


def _beside(row: SpeedRow, rows: Sequence[SpeedRow], system: str) -> list[SpeedRow]:
    """The row of another way with as many chunks and tokens, in a list that is empty without it."""
    same = (system, row.k, row.answer_tokens)
    return [other for other in rows if (other.system, other.k, other.answer_tokens) == same]


def to_markdown(rows: Sequence[SpeedRow]) -> str:
    """A table per number of chunks: medians, and from the fastest to the slowest."""
    lines = [f"{rows[0].dtype}, {rows[0].threads} threads of {rows[0].device}\n"]
    for k in sorted({row.k for row in rows}):
        of_k = [row for row in rows if row.k == k]
        columns = ("answer from", "read", "tokens", "first token", "x floor", "whole answer")
        lines += [
            f"{k} x {of_k[0].source_tokens // k} tokens\n",
            f"| {' | '.join(columns)} | pays after |",
            "| --- " * (len(columns) + 1) + "|",
            *(f"| {' | '.join(_cells(row, of_k))} |" for row in of_k),
            "",
        ]
    return "\n".join(lines)


def _cells(row: SpeedRow, rows: Sequence[SpeedRow]) -> list[str]:
    read = f"{row.kv_bytes / 2**20:.1f} MiB" if row.kv_bytes else ""
    cells = [row.name, read, str(row.answer_tokens)]
    if row.first_token is None or row.answer is None:
        return [*cells, row.skipped or "", "", "", ""]
    floors = [other.first_token.median for other in _beside(row, rows, FLOOR) if other.first_token]
    paid = break_even(row, rows)
    return [
        *cells,
        _shown(row.first_token),
        *(f"{row.first_token.median / floor:.2f}" for floor in floors),
        _shown(row.answer),
        f"{paid:.1f} questions" if paid else "",
    ]


def _shown(times: Times) -> str:
    return f"{times.median:.3f} s ({times.best:.3f} to {max(times.seconds):.3f})"


def write_files(rows: Sequence[SpeedRow], folder: Path) -> None:
    """Writes speed.json and speed.md, and with matplotlib (extra "eval") speed.png."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json = json.dumps([row.to_dict() for row in rows], indent=2)
    for name, text in (("speed.json", as_json + "\n"), ("speed.md", to_markdown(rows))):
        with whole_file(folder / name) as draft:
            draft.write_text(text, encoding="utf-8")
    if find_spec("matplotlib") is not None:
        from sac_rag.benchmarks.speed_plot import draw

        draw(rows, folder / "speed.png")
