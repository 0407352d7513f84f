"""Ways to answer from the same chunks, each timed token by token: ours, HF's, llama.cpp's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers.generation.streamers import BaseStreamer

from sac_rag.answering import Answerer, Request
from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.assemble import assemble
from sac_rag.prompts.decode import Decoder
from sac_rag.prompts.generate import Decoding
from sac_rag.telemetry import Meter

# Seconds from the question to each token of the answer.
Moments: TypeAlias = list[float]
# Answers once; none of them ends before its last token.
Way: TypeAlias = Callable[[], Moments]


def from_anchors(
    rag: SacRAG, questions: Sequence[tuple[str, Sequence[ChunkLike]]], tokens: int
) -> Moments:
    """Chunks out of the pipeline's store, everything included but turning tokens into text.

    Several questions, each with its chunks, are answered in one batch: each moment has a token of
    every answer.
    """
    clock = _Clock()
    decoding = Decoding(max_new_tokens=tokens)
    answerer = Answerer(rag.compressor, rag.on_miss, rag.prefixes, Meter())
    requests = [
        Request(
            rag.prompt_format.pieces(rag.generator.tokenizer, question, list(map(Chunk.of, chunks)))
        )
        for question, chunks in questions
    ]
    with answerer.call() as trace:
        run = answerer.start(requests, rag.beginning_ids(), decoding, ratio=None, trace=trace)
    with run.accounted():
        decoder = Decoder(rag.generator)
        run.begin(decoder)
        clock.token()
        for _ in range(tokens - 1):
            decoder.step()
            clock.token()
    return clock.moments


def from_text(generator: Generator, ids: Sequence[int], tokens: int) -> Moments:
    """HF's `generate`, which reads the whole prompt."""
    return _generate(generator, ids, None, tokens)


def from_text_behind_prefix(
    rag: SacRAG, question: str, chunks: Sequence[ChunkLike], tokens: int
) -> Moments:
    """HF's `generate`, handed the KV of the prefix that all prompts of the pipeline share."""
    ids = rag.prompt_ids(question, chunks)
    split = rag.prefixes.split(rag.beginning_ids(), [[ids]])
    # The last token stands for the rest, which `generate` embeds itself.
    cache = assemble([[ids[-1:]]], rag.generator, prefix=split.prefix).cache
    return _generate(rag.generator, ids, cache, tokens)


def _generate(generator: Generator, ids: Sequence[int], cache: Any, tokens: int) -> Moments:
    row = torch.tensor([ids], device=generator.device)
    clock = _Clock()
    with generator.running() as model, torch.inference_mode():
        model.generate(
            row,
            attention_mask=torch.ones_like(row),
            past_key_values=cache,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=min(generator.eos_ids, default=0),
            streamer=clock,
        )
    return clock.moments


class LlamaCpp:
    """llama.cpp on a GGUF, through llama-cpp-python.

    Args:
        gguf: The model's file.
        positions: Longest prompt and answer, in tokens.
        threads: Threads of its passes.

    Raises:
        ImportError: without llama-cpp-python.
    """

    def __init__(self, gguf: Path, positions: int, threads: int) -> None:
        from llama_cpp import Llama

        self._llama = Llama(
            str(gguf), n_ctx=positions, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._states: dict[tuple[int, ...], Any] = {}

    def cold(self, ids: Sequence[int], tokens: int) -> Moments:
        """Reads the whole prompt."""
        clock = _Clock()
        self._llama.reset()
        self._answer(ids, tokens, clock)
        return clock.moments

    def restored(self, ids: Sequence[int], question: int, tokens: int) -> Moments:
        """Restores the state in which it had read the prompt except its last tokens.

        Args:
            ids: Of the prompt.
            question: Number of its last tokens, which are read.
            tokens: Of the answer.
        """
        before = tuple(ids[:-question])
        if before not in self._states:
            self._llama.reset()
            self._llama.eval(before)
            self._states = {before: self._llama.save_state()}  # one: each is as large as its KV
        clock = _Clock()
        self._llama.load_state(self._states[before])
        self._answer(ids, tokens, clock)
        return clock.moments

    def _answer(self, ids: Sequence[int], tokens: int, clock: _Clock) -> None:
        # It reads what its state does not have, and does not stop by itself.
        written = self._llama.generate(list(ids), temp=0.0)
        for _ in range(tokens):
            next(written)
            clock.token()
        written.close()


def why_no_llama_cpp(gguf: Path | None) -> str | None:
    """Why llama.cpp cannot run here; None if it can."""
    if find_spec("llama_cpp") is None:
        return "not installed (extra 'peers')"
    if gguf is None:
        return "no GGUF given (--gguf)"
    return None if gguf.is_file() else f"no file {gguf}"


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Records when each token came; HF's `generate` hands it the prompt first."""

    def __init__(self) -> None:
        self.moments: Moments = []
        self._started = time.perf_counter()
        self._is_prompt = True

    def token(self) -> None:
        self.moments.append(time.perf_counter() - self._started)

    def put(self, value: Any) -> None:
        """Called by `generate` with the prompt, then with each token."""
        if self._is_prompt:
            self._is_prompt = False
        else:
            self.token()

    def end(self) -> None:
        """Called by `generate` behind the last token."""
