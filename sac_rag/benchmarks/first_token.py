"""Time to the first token of a text, and the chunks, question and compressors of measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sac_rag.benchmarks.contestants import from_text_behind_prefix
from sac_rag.chunk import ChunkLike
from sac_rag.compressors.full import Full
from sac_rag.compressors.sac import SAC
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.chat import opening
from sac_rag.prompts.format import PromptFormat

QUESTION = "What is the most important thing that these passages say?"
# Without titles, so that the floor is the question alone.
FORMAT = PromptFormat(chunk="{chunk}")


def full_text_seconds(rag: SacRAG, question: str, chunks: Sequence[ChunkLike]) -> float:
    """Seconds until HF `generate` has the first token of the same prompt, chunks read as text.

    The KV of the prefix that all questions share is handed to it: both sides read that only once.
    """
    return from_text_behind_prefix(rag, question, chunks, tokens=1)[0]


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


def full(generator: Generator) -> Full:
    """Keeps every token, in the dtype that the model computes in."""
    return Full(
        generator,
        Full.default_config(sink=opening(generator.tokenizer), stored_dtype=generator.dtype_name),
    )


def untrained(generator: Generator) -> SAC:
    """SAC without trained weights, which is as fast."""
    return SAC(generator, replace(full(generator).config, method=SAC.method, cue=True))
