"""Reads a prompt part by part, one head at a time: the oracle of reading it in one pass.

Shares nothing with sac_rag.prompts.assemble and sac_rag.lm.attention. Each chunk is a rectangle
with a slot for every token in every head; what a head has not kept is filled with noise, which must
never be seen. A part is a forward pass of its own, so that the cache holds what stands before it,
and turns and padding are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.lm.rope import move

NAME = "one_head_at_a_time"

# Text; a chunk compressed at position 0; or what compresses one at the place it is given.
SlowPart: TypeAlias = Sequence[int] | AnchorKV | Callable[[int], AnchorKV]


def one_head_at_a_time(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    seen: Sequence[Tensor],
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one row. Shape of `seen`, for each layer: (kv_heads, tokens, slots)."""
    group = query.shape[1] // key.shape[1]
    of_heads = []
    for head in range(query.shape[1]):
        scores = query[0, head] @ key[0, head // group].T * scaling
        scores = scores.masked_fill(~seen[module.layer_idx][head // group], -torch.inf)
        of_heads.append(scores.softmax(-1) @ value[0, head // group])
    return torch.stack(of_heads, dim=1)[None], None


AttentionInterface.register(NAME, one_head_at_a_time)


class SlowReader:
    """One prompt being read.

    Attributes:
        position: Of what comes next.
        logits: Behind each plain token so far, one tensor a part.
    """

    def __init__(self, generator: Generator, first_position: int = 0) -> None:
        self._generator = generator
        self._cache = DynamicCache()
        layers, kv_heads, _ = generator.kv_shape
        self._seen = [torch.zeros(kv_heads, 0, dtype=torch.bool) for _ in range(layers)]
        self.position = first_position
        self.logits: list[Tensor] = []

    def read(self, parts: Sequence[SlowPart], cue: Tensor | None = None) -> Tensor:
        """Logits behind each plain token of all parts. Shape: (tokens, vocabulary)."""
        position, placed = self.position, []
        for part in parts:
            is_moved = callable(part)
            whole = part(position) if callable(part) else part
            placed.append((whole, is_moved))
            position += whole.num_tokens if isinstance(whole, AnchorKV) else len(whole)
        with attending_one_head_at_a_time(self._generator):
            for part, is_moved in placed:
                if isinstance(part, AnchorKV):
                    self._put(part, is_moved)
                    if cue is not None:
                        self._feed(cue[None].to(self._generator.dtype), self.position - 1)
                elif len(part):
                    self._feed(self._generator.embed(part), self.position)
                    self.position += len(part)
        return torch.cat(self.logits)

    def write(self, token: int) -> Tensor:
        """Logits behind one token more. Shape: (vocabulary,)."""
        with attending_one_head_at_a_time(self._generator):
            self._feed(self._generator.embed([token]), self.position)
        self.position += 1
        return self.logits[-1][-1]

    def _put(self, kv: AnchorKV, is_moved: bool) -> None:
        layers, kv_heads, width = self._generator.kv_shape
        keys, values, at = kv.keys, kv.values, kv.positions.long() - self.position
        if not is_moved:
            keys, at = move(keys, self.position, self._generator.frequencies), kv.positions.long()
        noise = torch.Generator().manual_seed(kv.num_entries)
        slots = torch.randn(2, layers * kv_heads, kv.num_tokens, width, generator=noise) * 3
        slots[0, kv.heads.long(), at], slots[1, kv.heads.long(), at] = keys.float(), values.float()
        kept = torch.zeros(layers * kv_heads, kv.num_tokens, dtype=torch.bool)
        kept[kv.heads.long(), at] = True
        of_layers = slots.view(2, layers, 1, kv_heads, kv.num_tokens, width)
        for layer, of_heads in enumerate(kept.view(layers, kv_heads, -1)):
            self._cache.update(*of_layers[:, layer].to(self._generator.dtype), layer)
            self._seen[layer] = torch.cat([self._seen[layer], of_heads], dim=1)
        self.position += kv.num_tokens

    def _feed(self, embeds: Tensor, position: int) -> None:
        tokens = len(embeds)
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        seen = [
            torch.cat(
                [before[:, None].expand(-1, tokens, -1), causal.expand(len(before), -1, -1)], dim=2
            )
            for before in self._seen
        ]
        logits: Tensor = self._generator.model(
            inputs_embeds=embeds[None],
            position_ids=torch.arange(position, position + tokens)[None],
            past_key_values=self._cache,
            use_cache=True,
            seen=seen,
        ).logits[0]
        self._seen = [of_layer[:, -1] for of_layer in seen]
        self.logits.append(logits)


@contextmanager
def attending_one_head_at_a_time(generator: Generator) -> Iterator[None]:
    with generator.running() as model:
        usual = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            model.set_attn_implementation(usual)


def read_slowly(
    generator: Generator,
    parts: Sequence[SlowPart],
    cue: Tensor | None = None,
    first_position: int = 0,
) -> Tensor:
    """Logits behind each plain token, cues included. Shape: (tokens, vocabulary)."""
    return SlowReader(generator, first_position).read(parts, cue)
