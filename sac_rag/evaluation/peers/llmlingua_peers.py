"""Peers of LLMLingua: tokens of the text that a small LM finds unlikely, read as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any, ClassVar

from transformers import DynamicCache

from sac_rag.chunk import Chunk
from sac_rag.evaluation.peers.base import Blocked, TextPeer, with_text
from sac_rag.lm.generator import Generator

# Its result may have more tokens than asked for: as often it is asked for fewer.
_TRIES = 4


class LLMLingua(TextPeer):
    """LLMLingua-1, with the generator as scorer; each chunk is shortened before any question."""

    name: ClassVar[str] = "llmlingua"
    title: ClassVar[str] = "LLMLingua"
    does: ClassVar[str] = "deletes the tokens that the model itself finds most likely"
    package: ClassVar[str | None] = "llmlingua"
    modules: ClassVar[dict[str, str]] = {
        "llmlingua": "llmlingua",
        "tiktoken": "tiktoken",
        "nltk": "nltk",
        "accelerate": "accelerate",
    }

    def shorten(
        self, question: str, chunks: Sequence[Chunk], budgets: Sequence[int]
    ) -> list[Chunk]:
        """Each chunk within its budget, whatever the question."""
        return [
            with_text(chunk, self._within([chunk], budget, rank_method="llmlingua"))
            for chunk, budget in zip(chunks, budgets, strict=True)
            if not chunk.is_empty
        ]

    def _within(self, chunks: Sequence[Chunk], budget: int, **options: Any) -> str:
        """The result within a budget; longer than that if it is too long however few are asked."""
        target = budget
        texts = [chunk.text for chunk in chunks]
        for _ in range(_TRIES):
            with self.rag.generator.running():
                text: str = self._compressor.compress_prompt(
                    texts, target_token=target, concate_question=False, **options
                )["compressed_prompt"]
            excess = self.count(text) - budget
            if excess <= 0 or target == 1:
                break
            target = max(1, min(target - excess, target * 3 // 4))
        return text

    @cached_property
    def _compressor(self) -> Any:
        return _make_compressor(self.rag.generator)


class LongLLMLingua(LLMLingua):
    """LongLLMLingua: tokens are compared with and without the question; all chunks together."""

    name: ClassVar[str] = "longllmlingua"
    title: ClassVar[str] = "LongLLMLingua"
    does: ClassVar[str] = "deletes the tokens that the question makes no more likely"

    def shorten(
        self, question: str, chunks: Sequence[Chunk], budgets: Sequence[int]
    ) -> list[Chunk]:
        """One chunk with what is left of all of them, in the order that the package gives them."""
        read = [chunk for chunk in chunks if not chunk.is_empty]
        text = self._within(
            read,
            sum(budgets),
            question=question,
            rank_method="longllmlingua",
            condition_in_question="after_condition",
            condition_compare=True,
            reorder_context="sort",
            dynamic_context_compression_ratio=0.3 if len(read) > 1 else 0.0,
        )
        return [with_text(read[0], text)]


class LLMLingua2(Blocked):
    """LLMLingua-2, a token classifier with a checkpoint of its own."""

    name: ClassVar[str] = "llmlingua-2"
    title: ClassVar[str] = "LLMLingua-2"
    does: ClassVar[str] = "deletes the tokens that a trained classifier finds dispensable"
    package: ClassVar[str | None] = "llmlingua"
    blocked: ClassVar[str] = "needs a checkpoint of its own, which no package index has"


class LMCache(Blocked):
    """LMCache with CacheBlend: the whole KV of each chunk, reused."""

    name: ClassVar[str] = "lmcache"
    title: ClassVar[str] = "LMCache"
    does: ClassVar[str] = "stores the whole KV of chunks and blends it (CacheBlend)"
    package: ClassVar[str | None] = "lmcache"
    blocked: ClassVar[str] = "needs CUDA packages, and compresses nothing: its ratio is 1"


class _PairCaches:
    """A causal LM that takes and returns the HF KV cache as (keys, values) pairs."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, past_key_values: Any = None, **options: Any) -> Any:
        if past_key_values is not None:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(past_key_values):
                cache.update(keys, values, layer)
            past_key_values = cache
        output = self._model(*args, past_key_values=past_key_values, **options)
        if output.past_key_values is not None:
            layers = output.past_key_values.layers
            output.past_key_values = [(layer.keys, layer.values) for layer in layers]
        return output


class _Words:
    """Counts words where the package counts tokens of an online model, for its statistics."""

    def encode(self, text: str) -> list[str]:
        return text.split()


def _make_compressor(generator: Generator) -> Any:
    """The package's compressor over a loaded model and a tokenizer of its own."""
    from llmlingua import PromptCompressor

    class Loaded(PromptCompressor):  # type: ignore[misc, no-any-unimported, unused-ignore]
        """A PromptCompressor that loads no model."""

        def load_model(self, *_: Any) -> None:
            tokenizer = deepcopy(generator.tokenizer)
            tokenizer.padding_side = "left"
            self.tokenizer = tokenizer
            self.device = str(generator.device)
            self.model = _PairCaches(generator.model)
            self.context_idxs: list[Any] = []
            self.max_position_embeddings = generator.max_positions

    with _without_download():
        return Loaded(device_map=str(generator.device))


@contextmanager
def _without_download() -> Iterator[None]:
    """The package asks for the encoding of an online model, which is downloaded."""
    import tiktoken

    usual = tiktoken.encoding_for_model
    tiktoken.encoding_for_model = lambda name: _Words()
    try:
        yield
    finally:
        tiktoken.encoding_for_model = usual
