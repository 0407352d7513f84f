"""Time to the first token from cached anchors, beside that of reading the text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sac_rag.benchmarks.timing import in_turn, seconds_of, time_repeated
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import ChunkLike
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import Budget
from sac_rag.compressors.full import Full
from sac_rag.compressors.sac import SAC
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.assemble import assemble
from sac_rag.prompts.chat import opening
from sac_rag.prompts.format import PromptFormat
from sac_rag.prompts.generate import Decoding
from sac_rag.reports import Answer
from sac_rag.stores.disk import DiskStore
from sac_rag.stores.memory import MemoryStore

_QUESTION = "What is the most important thing that these passages say?"
# Without titles, so that the floor is the question alone.
_FORMAT = PromptFormat(chunk="{chunk}")
_ONE_TOKEN = Decoding(max_new_tokens=1)
_FEW_TOKENS = Decoding(max_new_tokens=17)


@dataclass(frozen=True)
class SpeedRow:
    """Times of one setting.

    Attributes:
        k: Chunks in the prompt.
        ratio: Source tokens per anchor; 1 keeps every token (`full`).
        budget: How entries are distributed over heads.
        store: Where the anchors are: "disk" or "memory".
        dtype: Dtype that the model computes in and the anchors are stored in.
        source_tokens: Tokens of the chunks.
        kv_entries: Their anchors.
        kv_bytes: Bytes of those.
        ttft_s: Seconds to the first token with anchors from the store, everything included.
        token_s: Seconds per token after the first.
        floor_s: Seconds to the first token for the question without any chunk.
        full_text_s: Seconds to the first token of HF `generate`, which reads the same prompt as
            text, behind the prefix that both have read before.
    """

    k: int
    ratio: int
    budget: Budget
    store: str
    dtype: str
    source_tokens: int
    kv_entries: int
    kv_bytes: int
    ttft_s: float
    token_s: float
    floor_s: float
    full_text_s: float


def full_text_seconds(rag: SacRAG, question: str, chunks: Sequence[ChunkLike]) -> float:
    """Seconds until HF `generate` has the first token of the same prompt, chunks read as text.

    The KV of the prefix that all questions share is handed to it: both sides read that only once.
    """
    return seconds_of(partial(_generate_from_text, rag, question, chunks))


def _generate_from_text(rag: SacRAG, question: str, chunks: Sequence[ChunkLike]) -> None:
    ids = rag.prompt_ids(question, chunks)
    split = rag.prefixes.split(rag.beginning_ids(), [[ids]])
    # The last token stands for the rest, which `generate` embeds itself.
    cache = assemble([[ids[-1:]]], rag.generator, prefix=split.prefix).cache
    row = torch.tensor([ids], device=rag.generator.device)
    with rag.generator.running() as model, torch.inference_mode():
        model.generate(
            row,
            attention_mask=torch.ones_like(row),
            past_key_values=cache,
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=min(rag.generator.eos_ids, default=0),
        )


def measure(
    generator: Generator,
    texts: Iterable[str],
    *,
    ks: Sequence[int] = (1, 4, 8),
    ratios: Sequence[int] = (1, 5, 15),
    compressor: Compressor | None = None,
    stores: Sequence[str] = ("disk", "memory"),
    chunk_tokens: int = 510,
    repeats: int = 3,
) -> Iterator[SpeedRow]:
    """Times every combination in this process, the best of `repeats` each.

    Where heads have budgets of their own, equal heads are timed in turn with them.

    Args:
        generator: Model, dtype and threads that all rows share.
        texts: Prose to cut the chunks from.
        ks: Numbers of chunks.
        ratios: Source tokens per anchor; at 1 every token is kept, by `full`.
        compressor: For the ratios above 1. Default: SAC without trained weights, which is as fast.
        stores: "disk", "memory" or both.
        chunk_tokens: Tokens of every chunk.
        repeats: Measurements of each figure; the best counts.

    Raises:
        ValueError: if the texts are too short for the largest k, or a store is unknown.
    """
    unknown = set(stores) - {"disk", "memory"}
    if unknown:
        raise ValueError(f"stores must be 'disk' or 'memory', were: {sorted(unknown)}")
    chunks = cut(generator, texts, max(ks), chunk_tokens)
    full = _full(generator)
    sac = compressor or SAC(generator, replace(full.config, method=SAC.method, cue=True))
    plain = SacRAG(CachedCompressor(full, MemoryStore()), prompt_format=_FORMAT)
    floor_s = time_repeated(partial(plain.answer, _QUESTION, [], _ONE_TOKEN), repeats).best
    full_text = {
        k: time_repeated(partial(_generate_from_text, plain, _QUESTION, chunks[:k]), repeats).best
        for k in ks
    }
    for ratio in ratios:
        methods = [full] if ratio == 1 else _budgets(sac.at_ratio(ratio))
        for store in stores:
            with _filled(methods, store, chunks) as rags:
                for k in ks:
                    ways = [partial(rag.answer, _QUESTION, chunks[:k], _FEW_TOKENS) for rag in rags]
                    for method, answers in zip(
                        methods, in_turn(ways, repeats, warm_up=True), strict=True
                    ):
                        yield _row(method, answers, k, ratio, store, floor_s, full_text[k])


@contextmanager
def _filled(
    methods: Sequence[Compressor], store: str, chunks: Sequence[str]
) -> Iterator[list[SacRAG]]:
    """A pipeline per compressor, with the chunks in a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rags = []
        for method in methods:
            place = Path(folder) / method.config.budget
            anchors = DiskStore(place) if store == "disk" else MemoryStore()
            # Loading is measured here, however slow it is, so no guard.
            cached = CachedCompressor(method, anchors, guard=False)
            rags.append(SacRAG(cached, prompt_format=_FORMAT))
            rags[-1].precompress(chunks)
        yield rags


def _row(
    method: Compressor,
    answers: Sequence[Answer],
    k: int,
    ratio: int,
    store: str,
    floor_s: float,
    full_text_s: float,
) -> SpeedRow:
    usage = answers[0].usage  # the same of all
    return SpeedRow(
        k=k,
        ratio=ratio,
        budget=method.config.budget,
        store=store,
        dtype=method.generator.dtype_name,
        source_tokens=usage.source_tokens,
        kv_entries=usage.anchors_from_store,
        kv_bytes=usage.kv_bytes,
        ttft_s=min(answer.timings.time_to_first_token_s for answer in answers),
        token_s=min(map(_token_seconds, answers)),
        floor_s=floor_s,
        full_text_s=full_text_s,
    )


def _budgets(compressor: Compressor) -> list[Compressor]:
    """The compressor, and the same with equal heads if it has others."""
    equal = compressor.with_budget("uniform")
    return [compressor] if equal is compressor else [compressor, equal]


def _token_seconds(answer: Answer) -> float:
    return answer.timings.decode_s / max(1, answer.usage.generated_tokens - 1)


def cut(generator: Generator, texts: Iterable[str], count: int, chunk_tokens: int) -> list[str]:
    """Cuts prose into chunks of exactly `chunk_tokens` tokens, as the model will count them.

    Raises:
        ValueError: if there is too little prose.
    """
    chunks: list[str] = []
    ids: list[int] = []
    for text in texts:
        ids += generator.tokenize(" " + text)
        while len(ids) >= chunk_tokens and len(chunks) < count:
            candidate = generator.tokenizer.decode(ids[:chunk_tokens])
            # A cut inside a word can tokenize otherwise; such a passage is skipped.
            if len(generator.tokenize(candidate)) == chunk_tokens:
                chunks.append(candidate)
            ids = ids[chunk_tokens:]
        if len(chunks) == count:
            return chunks
    raise ValueError(
        f"{count} chunks of {chunk_tokens} tokens were asked for, the texts gave {len(chunks)}; "
        "give more text"
    )


def _full(generator: Generator) -> Full:
    return Full(
        generator,
        Full.default_config(sink=opening(generator.tokenizer), stored_dtype=generator.dtype_name),
    )
