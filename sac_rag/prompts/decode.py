"""Decoder: rows that are generated together, a token each per step; rows join and leave between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sac_rag.lm.attention import as_inputs
from sac_rag.lm.cache import ROOM, RoomyCache
from sac_rag.lm.generator import Generator
from sac_rag.lm.step import Step
from sac_rag.prompts.assemble import Prompt
from sac_rag.prompts.decoding import Decoding

# Logits to tokens. Shapes: (rows, vocabulary), (rows,)
Choose: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class _Rows:
    """State of rows between two steps.

    Attributes:
        cache: KV of all that they have read.
        masks: Additive masks of the next tokens, one per layer or one for all, with `spare` columns
            more than the cache has entries.
            Shape of each: (rows, kv_heads, 1, entries + spare)
        spare: Columns for tokens to come.
        positions: Position of each row's next token. Shape: (rows,)
        tokens: Its last token, which is not in the cache yet. Shape: (rows,)
    """

    cache: RoomyCache
    masks: list[Tensor]
    spare: int
    positions: Tensor
    tokens: Tensor

    def select(self, rows: Tensor) -> _Rows:
        """Some of the rows, in the order given. Shape of `rows`: (rows,)."""
        cache = RoomyCache((layer.keys[rows], layer.values[rows]) for layer in self.cache.layers)
        masks = [mask[rows] for mask in self.masks]
        return _Rows(cache, masks, self.spare, self.positions[rows], self.tokens[rows])

    def joined(self, other: _Rows) -> _Rows:
        """The rows of both, without entries that none of them attends to."""
        ours, theirs = self._used(), other._used()
        count = len(self.cache.layers)
        if {len(ours), len(theirs)} != {1}:
            ours, theirs = (m * count if len(m) == 1 else m for m in (ours, theirs))
        layers, masks = [], []
        for number in range(count):
            if number < len(ours):
                mask = _stacked(ours[number], theirs[number])
                needed = (mask == 0).any(dim=2).any(dim=1).any(dim=0)
                masks.append(mask[..., needed])
            pairs = zip(_kv(self.cache, number), _kv(other.cache, number), strict=True)
            keys, values = (_padded(*pair)[:, :, needed] for pair in pairs)
            layers.append((keys, values))
        return _Rows(
            cache=RoomyCache(layers),
            masks=masks,
            spare=0,
            positions=torch.cat([self.positions, other.positions]),
            tokens=torch.cat([self.tokens, other.tokens]),
        )

    def _used(self) -> list[Tensor]:
        """The masks without spare columns."""
        return [mask[..., : mask.shape[-1] - self.spare] for mask in self.masks]


class Decoder:
    """Generates rows together. Rows may be of different prompts, lengths and decodings.

    A row's tokens are those that it has alone, up to the rounding of padded batches.

    Args:
        generator: The LM.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._rows: _Rows | None = None
        self._adapter: str | None = None
        # None where only transformers' forward pass will do.
        self._step: Step | None = None
        # Rows that are chosen for together, as they joined: a seed's random numbers are theirs.
        self._choosers: list[tuple[Choose, int]] = []

    def __len__(self) -> int:
        """Number of rows."""
        return sum(count for _, count in self._choosers)

    def join(self, prompt: Prompt, decoding: Decoding) -> Tensor:
        """Reads prompts in one pass, and adds their rows behind the others.

        Returns:
            The first token of each of its rows. Shape: (rows,)

        Raises:
            ValueError: for another adapter than that of the rows.
        """
        if self._rows is not None and prompt.adapter != self._adapter:
            raise ValueError(
                f"rows must have the adapter of the others ({self._adapter}), was: {prompt.adapter}"
            )
        choose = chooser(decoding, self._generator.device)
        # The model is locked for each pass only: a slow consumer must not block other threads.
        with self._generator.running(prompt.adapter) as model, torch.no_grad():
            logits: Tensor = model(**prompt.inputs(), logits_to_keep=1).logits[:, -1]
        tokens = choose(logits)
        masks = prompt.masks.of_next(ROOM)
        cache = prompt.cache
        if not isinstance(cache, RoomyCache):  # a prompt without chunks
            cache = RoomyCache((layer.keys, layer.values) for layer in cache.layers)
        rows = _Rows(cache, masks, ROOM, prompt.next_positions, tokens)
        self._rows = rows if self._rows is None else self._rows.joined(rows)
        self._adapter = prompt.adapter
        self._step = self._generator.step(prompt.adapter)
        self._choosers.append((choose, len(tokens)))
        return tokens

    def step(self) -> Tensor:
        """The next token of every row. Shape: (rows,).

        Raises:
            ValueError: if there are no rows.
        """
        rows = self._rows
        if rows is None:
            raise ValueError("a decoder needs rows to take a step, has none")
        if not rows.spare:
            rows.masks = [functional.pad(mask, (0, ROOM)) for mask in rows.masks]
            rows.spare = ROOM
        rows.spare -= 1
        with self._generator.running(self._adapter) as model, torch.no_grad():
            logits = self._logits(model, rows)
        of_choosers = torch.split(logits, [count for _, count in self._choosers])
        chosen = [
            choose(part) for (choose, _), part in zip(self._choosers, of_choosers, strict=True)
        ]
        rows.tokens = torch.cat(chosen) if len(chosen) > 1 else chosen[0]
        rows.positions = rows.positions + 1
        return rows.tokens

    def _logits(self, model: Any, rows: _Rows) -> Tensor:
        """Logits behind each row's last token. Shape: (rows, vocabulary)."""
        embeds = self._generator.embed(rows.tokens[:, None])
        positions, masks = rows.positions[:, None], rows._used()
        if self._step is not None:
            return self._step.logits(embeds, positions, masks, rows.cache)
        logits: Tensor = model(
            inputs_embeds=embeds,
            position_ids=positions,
            **as_inputs(masks),
            past_key_values=rows.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps some rows, in ascending order, and drops all others."""
        begin, counts = 0, []
        for _, count in self._choosers:
            counts.append(sum(begin <= row < begin + count for row in rows))
            begin += count
        pairs = zip(self._choosers, counts, strict=True)
        self._choosers = [(choose, count) for (choose, _), count in pairs if count]
        if not rows:
            self._rows = None
        elif self._rows is not None:
            self._rows = self._rows.select(torch.tensor(rows, device=self._generator.device))


def chooser(decoding: Decoding, device: torch.device) -> Choose:
    """How the tokens of rows are chosen, with random numbers of their own if there is a seed."""
    if decoding.temperature == 0:
        return lambda logits: logits.argmax(dim=-1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(decoding.temperature))])
    if decoding.top_k:
        warpers.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        warpers.append(TopPLogitsWarper(decoding.top_p))
    random: torch.Generator | None = None
    if decoding.seed is not None:
        random = torch.Generator(device).manual_seed(decoding.seed)

    def sample(logits: Tensor) -> Tensor:
        probabilities = warpers(None, logits.float()).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=random)[:, 0]

    return sample


def _kv(cache: RoomyCache, layer: int) -> tuple[Tensor, Tensor]:
    return cache.layers[layer].keys, cache.layers[layer].values


def _padded(one: Tensor, other: Tensor) -> Tensor:
    """Keys or values of both, padded at the end. Shape: (rows, kv_heads, entries, head_dim)."""
    width = max(one.shape[2], other.shape[2])
    return torch.cat([functional.pad(t, (0, 0, 0, width - t.shape[2])) for t in (one, other)])


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    """Masks of both, blocked where one is padded. Shape: (rows, kv_heads, 1, entries)."""
    width = max(one.shape[3], other.shape[3])
    heads = max(one.shape[1], other.shape[1])
    blocked = torch.finfo(one.dtype).min
    return torch.cat(
        [
            functional.pad(mask, (0, width - mask.shape[3]), value=blocked).expand(
                -1, heads, -1, -1
            )
            for mask in (one, other)
        ]
    )
