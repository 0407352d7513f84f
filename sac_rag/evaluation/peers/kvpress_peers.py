"""Peers of kvpress: the KV of all passages, compressed before the question is known.

A press scores the KV of the passages as the model reads them behind the prompt's beginning, which
stays whole, as for anchors. Which entries it keeps comes from kvpress; they are then really
removed, into an AnchorKV, where kvpress masks them. So the question is read, and the answer
generated, as for anchors.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sac_rag.answering import Run
from sac_rag.chunk import Chunk
from sac_rag.compressors.full import read_plain
from sac_rag.evaluation.peers.base import Peer
from sac_rag.evaluation.sample import Trial
from sac_rag.kv import AnchorKV
from sac_rag.lm import rope
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.assemble import Part, assemble, require_room
from sac_rag.prompts.chat import Markup
from sac_rag.prompts.generate import Decoding, Generation
from sac_rag.reports import Answer
from sac_rag.telemetry import Meter, Trace


@dataclass(frozen=True)
class Passages:
    """A prompt in three parts, as token ids.

    Attributes:
        before: What stands before the first passage.
        ids: From the first passage to the last, with the text between them.
        after: The rest, with the question.
        budget: KV entries per head that may stand for `ids`; text between passages counts as it is.
    """

    before: tuple[int, ...]
    ids: tuple[int, ...]
    after: tuple[int, ...]
    budget: int


class PressPeer(Peer):
    """A press of kvpress over all passages of a question, one question at a time."""

    package: ClassVar[str | None] = "kvpress"
    modules: ClassVar[dict[str, str]] = {
        "kvpress": "kvpress",
        "cachetools": "cachetools",
        "datasets": "datasets",
        "fire": "fire",
    }

    def __init__(self, rag: SacRAG, ratio: int) -> None:
        super().__init__(rag, ratio)
        self._kvpress = _import_kvpress()
        self._read: dict[tuple[int, ...], AnchorKV] = {}

    @abstractmethod
    def choose(self, before: AnchorKV, passages: Passages) -> tuple[Tensor, Tensor, Tensor]:
        """Reads passages and chooses entries.

        Args:
            before: KV of the text before the passages, read at position 0.
            passages: The prompt.

        Returns:
            Keys of the passages, rotated for positions from 0, and values, Shape: (layers,
            kv_heads, tokens, head_dim); which entries are kept, bool, Shape: (layers, kv_heads,
            tokens).
        """

    def compress(self, passages: Passages) -> AnchorKV:
        """KV of the passages of a prompt, within its budget."""
        keys, values, is_kept = self.choose(self._before(passages.before), passages)
        layers, kv_heads, tokens, _ = keys.shape
        entries = is_kept.flatten().nonzero()[:, 0]
        return AnchorKV(
            keys=keys.flatten(0, 2)[entries],
            values=values.flatten(0, 2)[entries],
            positions=(entries % tokens).int(),
            heads=(entries // tokens).short(),
            num_layers=layers,
            num_kv_heads=kv_heads,
            num_tokens=tokens,
        )

    def answer(self, trials: Sequence[Trial], decoding: Decoding) -> Sequence[Answer]:
        """Answers trials from the compressed KV of their passages."""
        trace, generator = Trace("answer"), self.rag.generator
        prompts = [self.passages(trial) for trial in trials]
        for number, p in enumerate(prompts):
            positions = len(p.before) + len(p.ids) + len(p.after)
            require_room(number, positions, decoding.max_new_tokens, generator)
        rows: list[list[Part]] = [
            [self._before(p.before), self.compress(p), p.after] if p.ids else [p.after]
            for p in prompts
        ]
        prompt = assemble(rows, generator)
        stops = [self.rag.prompt_format.stop] * len(rows)
        run = Run(
            generation=Generation(generator, prompt, decoding, stops),
            prompt=prompt,
            reports=[[] for _ in rows],
            meter=Meter(),
            trace=trace,
            prefix_tokens=0,
            prefix_reused=0,
            load_s=0.0,
            compress_s=time.perf_counter() - trace.started,
            relocate_s=0.0,
            prefix_s=0.0,
        )
        return run.finish()

    def passages(self, trial: Trial) -> Passages:
        """The parts of a trial's prompt, tokenized as for every other system."""
        rag = self.rag
        pieces = rag.prompt_format.pieces(
            rag.generator.tokenizer,
            trial.question.text,
            [c for c in trial.chunks if c.text.strip()],
        )
        chunks = [n for n, piece in enumerate(pieces) if isinstance(piece, Chunk)]
        first, last = (chunks[0], chunks[-1] + 1) if chunks else (0, 0)
        ids = [self._ids(piece) for piece in pieces]
        budget = sum(
            self.budget(piece) if isinstance(piece, Chunk) else len(tokens)
            for piece, tokens in zip(pieces[first:last], ids[first:last], strict=True)
        )
        before, inside, after = (
            tuple(token for tokens in part for token in tokens)
            for part in (ids[:first], ids[first:last], ids[last:])
        )
        return Passages(before, inside, after, budget)

    def _ids(self, piece: str | Markup | Chunk) -> list[int]:
        generator = self.rag.generator
        if isinstance(piece, Chunk):
            return self.rag.compressor.tokenize(piece.text)
        if isinstance(piece, Markup):
            return generator.tokenize(piece.text, special=True)
        return generator.tokenize(piece)

    def _before(self, ids: tuple[int, ...]) -> AnchorKV:
        if not ids:
            raise ValueError(
                "a press needs text before the first passage, for attention sinks; give a prompt "
                "format with a prefix or a system prompt"
            )
        if ids not in self._read:
            self._read[ids] = read_plain(self.rag.generator, ids)
        return self._read[ids]


class ScorePress(PressPeer):
    """A press that scores each layer's entries while the passages are read."""

    @abstractmethod
    def press(self, share: float, tokens: int) -> Any:
        """The press.

        Args:
            share: Of the entries that it drops, from 0 to less than 1.
            tokens: Of the passages.
        """

    @torch.no_grad()
    def choose(self, before: AnchorKV, passages: Passages) -> tuple[Tensor, Tensor, Tensor]:
        """Entries that the press keeps, of each layer as it is read."""
        tokens, generator = len(passages.ids), self.rag.generator
        press = self.press(_share(passages.budget, tokens), tokens)
        is_kept: dict[int, Tensor] = {}
        cache = _behind(before, generator.frequencies)
        ids = torch.tensor([passages.ids], device=generator.device)
        positions = torch.arange(tokens, device=generator.device)[None]
        with generator.running() as model:
            press.post_init_from_model(model)
            hook = partial(_press, press, before.num_tokens, is_kept)
            layers = [layer.self_attn for layer in model.base_model.layers]
            for module in layers:
                module.rotary_emb = model.base_model.rotary_emb  # as kvpress does
            handles = [m.register_forward_hook(hook, with_kwargs=True) for m in layers]
            try:
                model.base_model(
                    input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
                )
            finally:
                for handle in handles:
                    handle.remove()
                for module in layers:
                    del module.rotary_emb
        keys, values = _of_cache(cache, before.num_tokens)
        return keys, values, torch.stack([is_kept[layer] for layer in range(len(layers))])


class KVzip(PressPeer):
    """KVzip: keeps what is attended to when the text is read again, over all heads together."""

    name: ClassVar[str] = "kvzip"
    title: ClassVar[str] = "KVzip (kvpress)"
    does: ClassVar[str] = "keeps the KV entries attended to most when the text is repeated"

    @torch.no_grad()
    def choose(self, before: AnchorKV, passages: Passages) -> tuple[Tensor, Tensor, Tensor]:
        """Entries that the press keeps, once all layers are read again."""
        generator, start = self.rag.generator, before.num_tokens
        ids = torch.tensor([passages.before + passages.ids], device=generator.device)
        dropped = len(passages.ids) - passages.budget
        cache = DynamicCache()
        with generator.running() as model:
            # Of all entries, those of the text before the passages are always kept. The press
            # rounds the number of dropped entries down.
            press = self._kvpress.KVzipPress(
                compression_ratio=dropped / ids.shape[1] + 1e-9 if dropped > 0 else 0.0,
                n_sink=start,
            )
            with press(model):
                press.prefix_length = start  # else that of the chat template
                model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
            model.base_model.__dict__.pop("forward", None)  # the press leaves the usual one there
            is_kept = torch.stack(
                [_unmasked(layer.self_attn, cache) for layer in model.base_model.layers]
            )
        keys, values = _of_cache(cache, start)
        return rope.move(keys, -start, generator.frequencies), values, is_kept[..., start:]


class Knorm(ScorePress):
    """Keeps the keys of the smallest norm."""

    name: ClassVar[str] = "knorm"
    title: ClassVar[str] = "Knorm (kvpress)"
    does: ClassVar[str] = "keeps the KV entries whose keys have the smallest norm"

    def press(self, share: float, tokens: int) -> Any:
        """KnormPress."""
        return self._kvpress.KnormPress(compression_ratio=share)


class SnapKV(ScorePress):
    """Keeps what the last eight tokens of the passages attend to."""

    name: ClassVar[str] = "snapkv"
    title: ClassVar[str] = "SnapKV, window 8 (kvpress)"
    does: ClassVar[str] = "keeps the KV entries that the text's last 8 tokens attend to"

    def press(self, share: float, tokens: int) -> Any:
        """SnapKVPress with a window that leaves something to choose from."""
        window = max(1, min(8, tokens - 1))
        return self._kvpress.SnapKVPress(compression_ratio=share, window_size=window)


class AdaKV(ScorePress):
    """AdaKV over expected attention: budgets of the heads of a layer are shared."""

    name: ClassVar[str] = "adakv"
    title: ClassVar[str] = "AdaKV, expected attention (kvpress)"
    does: ClassVar[str] = "keeps the KV entries of most expected attention, over a layer's heads"

    def press(self, share: float, tokens: int) -> Any:
        """AdaKVPress."""
        return self._kvpress.AdaKVPress(self._expected_attention(share))

    def _expected_attention(self, share: float, **options: Any) -> Any:
        # The sink is in front of the passages: none of their tokens is kept for being first.
        return self._kvpress.ExpectedAttentionPress(compression_ratio=share, n_sink=0, **options)


class CriticalAdaKV(AdaKV):
    """AdaKV with scores weighted by the output of each value."""

    name: ClassVar[str] = "criticalkv"
    title: ClassVar[str] = "CriticalAdaKV, expected attention (kvpress)"
    does: ClassVar[str] = "AdaKV that also weighs how much each value adds to the output"

    def press(self, share: float, tokens: int) -> Any:
        """CriticalAdaKVPress; it weighs values itself."""
        return self._kvpress.CriticalAdaKVPress(self._expected_attention(share, use_vnorm=False))


def _import_kvpress() -> Any:
    """The package, without what its import does to attention: here entries are really removed."""
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # warns of each press's cost
    module = import_module("kvpress")
    for name, function in functions.items():
        ALL_ATTENTION_FUNCTIONS[name] = function
    return module


def _press(
    press: Any,
    start: int,
    is_kept: dict[int, Tensor],
    module: Any,
    _: Any,
    kwargs: Any,
    output: Any,
) -> None:
    """Forward hook of an attention layer: which entries behind `start` the press keeps."""
    layer = kwargs["past_key_values"].layers[module.layer_idx]
    keys, values = layer.keys[:, :, start:], layer.values[:, :, start:]
    shorter, _ = press.compress(module, kwargs["hidden_states"], keys, values, None, kwargs)
    if shorter.shape[2] == keys.shape[2]:
        is_kept[module.layer_idx] = _unmasked(module, keys=keys)
    else:
        # Keys of different positions differ.
        same = (keys[0, :, :, None] == shorter[0, :, None]).all(dim=-1)
        is_kept[module.layer_idx] = same.any(dim=-1)


def _unmasked(module: Any, cache: Any = None, *, keys: Tensor | None = None) -> Tensor:
    """Entries of a layer that a press has not masked, bool; takes the mask off its module.

    Returns:
        Shape: (kv_heads, entries)
    """
    keys = cache.layers[module.layer_idx].keys if keys is None else keys
    is_kept = torch.ones(keys.shape[1:3], dtype=torch.bool, device=keys.device)
    masked = module.__dict__.pop("masked_key_indices", None)
    if masked is not None:
        _, heads, entries = masked
        is_kept[heads.to(keys.device), entries.to(keys.device)] = False
    return is_kept


def _behind(before: AnchorKV, frequencies: Tensor) -> DynamicCache:
    """A cache of text that ends right before position 0."""
    keys, values, _ = before.by_head()
    cache = DynamicCache()
    for layer, (of_keys, of_values) in enumerate(
        zip(rope.move(keys, -before.num_tokens, frequencies), values, strict=True)
    ):
        cache.update(of_keys[None], of_values[None], layer)
    return cache


def _of_cache(cache: DynamicCache, start: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one row behind some entries. Shape: (layers, kv_heads, …, head_dim)."""
    return (
        torch.stack([layer.keys[0, :, start:] for layer in cache.layers]),
        torch.stack([layer.values[0, :, start:] for layer in cache.layers]),
    )


def _share(budget: int, tokens: int) -> float:
    """The share of entries to drop for a budget; kvpress rounds the number that it keeps down."""
    return 0.0 if budget >= tokens else 1 - (budget + 0.5) / tokens
