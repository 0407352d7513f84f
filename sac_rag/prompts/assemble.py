"""Text and AnchorKVs, interleaved in order, to a Prompt. Knows nothing of tokenizers or stores.

Two counts must be kept apart. A *position* is a RoPE index, in source tokens: a chunk of 500 tokens
moves what follows by 500, however few anchors it kept. An *entry* is a place in the HF KV cache:
that chunk takes as many as it has anchors.

Gradients flow from a Prompt back into the AnchorKVs and the cue it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache

from sac_rag.errors import PromptTooLongError
from sac_rag.kv import AnchorKV
from sac_rag.lm import rope
from sac_rag.lm.attention import Masks
from sac_rag.lm.generator import Generator

# Plain text as token ids, or a chunk.
Part: TypeAlias = Sequence[int] | AnchorKV


@dataclass(frozen=True)
class Branches:
    """Texts that each continue the same prompt and do not see one another. Only ever a last part.

    Attributes:
        texts: Token ids, one sequence a branch, none of them empty.
    """

    texts: tuple[Sequence[int], ...]

    def __len__(self) -> int:
        """Positions taken: those of the longest branch."""
        return max(map(len, self.texts), default=0)


@dataclass(frozen=True, eq=False)
class Prompt:
    """What one forward pass of the generator needs; rows may hold different chunks.

    Plain text is padded on the left, so that the last token of every row is the last column;
    entries are padded on the right, in each layer to its longest head's.

    Attributes:
        embeds: Plain text of all rows. Shape: (rows, tokens, hidden)
        position_ids: Shape: (rows, tokens)
        masks: What each layer adds to attention scores so that a token attends to just what it may.
            One for all layers and heads where all of them have the same entries.
        cache: All anchors, moved to their places; the pass adds the plain text to it.
        next_positions: Position of the first token of each answer. Shape: (rows,)
        adapter: Name of the LoRA to read it and to answer with; None for the frozen LM.
        num_anchors: Anchors of each row, without padding.
        num_tokens: Plain tokens of each row, without padding.
    """

    embeds: Tensor
    position_ids: Tensor
    masks: Masks
    cache: DynamicCache
    next_positions: Tensor
    adapter: str | None
    num_anchors: tuple[int, ...]
    num_tokens: tuple[int, ...]

    def inputs(self) -> dict[str, Any]:
        """Keywords of the model's forward, to read the prompt."""
        return {
            "inputs_embeds": self.embeds,
            "position_ids": self.position_ids,
            **self.masks.inputs(),
            "past_key_values": self.cache,
            "use_cache": True,
        }


@dataclass
class _Row:
    """Parts of one prompt with their places: (turn in the reading order, first position, part)."""

    chunks: list[tuple[int, int, AnchorKV]]
    texts: list[tuple[int, int, Tensor]]  # embeddings, Shape: (tokens, hidden)
    end: int = 0  # position after the last part
    last_shared_turn: int = 0  # what comes later is a branch

    @property
    def num_anchors(self) -> int:
        return sum(kv.num_anchors for _, _, kv in self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(len(embeds) for _, _, embeds in self.texts)


def assemble(
    rows: Sequence[Sequence[Part | Branches]],
    generator: Generator,
    *,
    prefix: AnchorKV | None = None,
    cue: Tensor | None = None,
    adapter: str | None = None,
    reserve: int = 0,
    first_position: int = 0,
) -> Prompt:
    """Places parts one after the other and moves every chunk's keys to its place.

    Args:
        rows: One prompt each, any interleaving of text and chunks, ending in text or in branches.
        generator: Whose embeddings, frequencies, dtype and last position count.
        prefix: KV of plain text that every row begins with, read beforehand at position 0.
        cue: Embedding put behind every chunk, at the position of the chunk's last token.
            Shape: (hidden,)
        adapter: Name of the LoRA to read and answer with. Default: the frozen LM does.
        reserve: Positions to keep free for the answer, in tokens.
        first_position: Of every row's first token, or of its prefix's.

    Raises:
        ValueError: if a row does not end in text, or a chunk is not of this generator's shape.
        PromptTooLongError: if a row and its reserve pass the model's last position.
    """
    if not rows:
        raise ValueError("expected at least one row, got none")
    for number, parts in enumerate(rows):
        # Before anything is embedded: what is far too long would not fit into memory either.
        positions = sum(p.num_tokens if isinstance(p, AnchorKV) else len(p) for p in parts)
        positions += prefix.num_tokens if prefix is not None else 0
        require_room(number, first_position + positions, reserve, generator)
    placed = [_place(row, generator, prefix, cue, first_position) for row in rows]
    cache, entry_turns = _cache(placed, generator)
    embeds, position_ids, token_turns = _plain_text(placed, generator)
    last_shared = torch.tensor([row.last_shared_turn for row in placed], device=generator.device)
    return Prompt(
        embeds=embeds,
        position_ids=position_ids,
        masks=Masks(entry_turns, token_turns, last_shared, generator.dtype),
        cache=cache,
        next_positions=torch.tensor([row.end for row in placed], device=generator.device),
        adapter=adapter,
        num_anchors=tuple(row.num_anchors for row in placed),
        num_tokens=tuple(row.num_tokens for row in placed),
    )


def require_room(number: int, positions: int, reserve: int, generator: Generator) -> None:
    """Refuses a prompt that does not fit the model.

    Args:
        number: Which prompt of the batch, for the message.
        positions: What the prompt takes, in source tokens, and what it leaves free before it.
        reserve: Positions to keep free for the answer, in tokens.
        generator: Whose last position counts.

    Raises:
        PromptTooLongError: with the numbers.
    """
    if positions + reserve > generator.max_positions:
        raise PromptTooLongError(
            f"prompt {number} needs {positions} positions and {reserve} for the answer, but the "
            f"model has {generator.max_positions}; retrieve fewer or shorter chunks, or lower "
            "max_new_tokens"
        )


def _place(
    parts: Sequence[Part | Branches],
    generator: Generator,
    prefix: AnchorKV | None,
    cue: Tensor | None,
    first_position: int,
) -> _Row:
    if not parts or isinstance(parts[-1], AnchorKV) or not len(parts[-1]):
        raise ValueError("a prompt must end in text: the model answers from its last token")
    row = _Row([], [], end=first_position)
    if prefix is not None:
        row.chunks.append((0, row.end, prefix))
        row.end += prefix.num_tokens
    for turn, part in enumerate(parts, start=1):
        if isinstance(part, Branches):
            _place_branches(part, turn, row, generator, last=turn == len(parts))
        elif not isinstance(part, AnchorKV):
            row.texts.append((turn, row.end, generator.embed(part)))
            row.end += len(part)
            row.last_shared_turn = turn
        else:
            if part.kv_shape != generator.kv_shape:
                raise ValueError(
                    "a chunk's KV must be of this model's (layers, kv_heads, head_dim) = "
                    f"{generator.kv_shape}, was: {part.kv_shape}"
                )
            row.chunks.append((turn, row.end, part))
            row.end += part.num_tokens
            row.last_shared_turn = turn
            if cue is not None:
                embeds = cue.to(generator.device, generator.dtype)[None]
                row.texts.append((turn, row.end - 1, embeds))
    return row


def _place_branches(
    branches: Branches, turn: int, row: _Row, generator: Generator, last: bool
) -> None:
    if not last or not all(branches.texts):
        raise ValueError("branches must be the last part of a prompt, and each must have text")
    for number, text in enumerate(branches.texts):
        row.texts.append((turn + number, row.end, generator.embed(text)))
    row.end += len(branches)


def _cache(rows: list[_Row], generator: Generator) -> tuple[DynamicCache, list[Tensor]]:
    """Moves all chunks into one HF cache, each layer of it as long as its longest head.

    Returns:
        The cache; and the turn of each entry of each layer, -1 for padding, one with a single head
        for all layers where they are the same. Shape of each: (rows, kv_heads, entries)
    """
    device = generator.device
    cache = DynamicCache()
    # What is kept in fewer bits travels in fewer bits.
    chunks = [
        (number, turn, start, kv.to(device))
        for number, row in enumerate(rows)
        for turn, start, kv in row.chunks
    ]
    if not chunks:
        return cache, [torch.full((len(rows), 1, 0), -1, device=device)]
    slots = _slots([(number, kv) for number, _, _, kv in chunks], len(rows), generator)
    keys = [rope.move(kv.keys, start, generator.frequencies) for _, _, start, kv in chunks]
    values = [kv.values for _, _, _, kv in chunks]
    turns = [torch.full((kv.num_entries,), turn, device=device) for _, turn, _, kv in chunks]
    # Zeros for padding: NaN would spread even at weight 0.
    of_layers = (slots.lay_out(parts, 0, generator.dtype) for parts in (keys, values))
    for layer, (of_keys, of_values) in enumerate(zip(*of_layers, strict=True)):
        cache.update(of_keys, of_values, layer)
    entry_turns = slots.lay_out(turns, -1, torch.long)
    first = entry_turns[0][:, :1]
    if all(t.shape[2] == first.shape[2] and bool((t == first).all()) for t in entry_turns):
        return cache, [first]
    return cache, entry_turns


@dataclass(frozen=True, eq=False)
class _Slots:
    """Where entries of all rows lie: row by row, in each layer by layer, in each head by head.

    Attributes:
        index: The slot of each entry. Shape: (entries,)
        rows: Of the batch.
        kv_heads: Of each layer.
        widths: Slots of each head, by layer.
    """

    index: Tensor
    rows: int
    kv_heads: int
    widths: list[int]

    def lay_out(self, parts: list[Tensor], padding: int, dtype: torch.dtype) -> list[Tensor]:
        """Something of each entry, by layer. Shape of each: (rows, kv_heads, slots, …)."""
        sizes = [self.kv_heads * width for width in self.widths]
        inner = parts[0].shape[1:]
        shape = (self.rows * sum(sizes), *inner)
        # Zeros come from the system as they are: padding is never written.
        laid_out = torch.zeros(shape, dtype=dtype, device=self.index.device)
        if padding:
            laid_out.fill_(padding)
        indices = torch.split(self.index, [len(part) for part in parts])
        for index, part in zip(indices, parts, strict=True):
            laid_out.index_copy_(0, index, part.to(dtype))
        # One split, not a selection a layer: each one's gradient would be as large as them all.
        by_layer = torch.split(laid_out.view(self.rows, -1, *inner), sizes, dim=1)
        return [t.view(self.rows, self.kv_heads, -1, *inner) for t in by_layer]


def _slots(chunks: Sequence[tuple[int, AnchorKV]], rows: int, generator: Generator) -> _Slots:
    """Gives every entry a slot; those of one head and row follow one another.

    Args:
        chunks: Each with the number of its row.
        rows: Of the batch.
        generator: Of whose shape the chunks are.
    """
    layers, kv_heads, _ = generator.kv_shape
    device = generator.device
    # Rows are one more level of heads.
    heads = torch.cat([kv.heads.int() + number * layers * kv_heads for number, kv in chunks])
    counts = torch.bincount(heads, minlength=rows * layers * kv_heads)
    widths = counts.view(rows, layers, kv_heads).amax(dim=(0, 2))
    before = torch.arange(rows, device=device)[:, None] * widths.sum()
    before = (before + widths.cumsum(0) - widths)[:, :, None] * kv_heads
    begins = before + torch.arange(kv_heads, device=device) * widths[:, None]
    in_order, by_head = heads.sort(stable=True)
    rank = torch.arange(len(heads), device=device) - (counts.cumsum(0) - counts)[in_order]
    index = torch.empty_like(by_head)
    index[by_head] = begins.flatten()[in_order] + rank
    return _Slots(index, rows, kv_heads, widths.tolist())


def _plain_text(rows: list[_Row], generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Lines up the plain text of all rows, padded on the left.

    Returns:
        embeds, Shape: (rows, tokens, hidden); positions and turns (-1 for padding),
        Shape: (rows, tokens)
    """
    device = generator.device
    tokens = max(row.num_tokens for row in rows)
    embeds = torch.zeros(
        len(rows), tokens, generator.hidden_size, dtype=generator.dtype, device=device
    )
    positions = torch.zeros(len(rows), tokens, dtype=torch.long, device=device)
    turns = torch.full((len(rows), tokens), -1, device=device)
    for number, row in enumerate(rows):
        begin = tokens - row.num_tokens
        for turn, start, text in row.texts:
            end = begin + len(text)
            embeds[number, begin:end] = text
            positions[number, begin:end] = torch.arange(start, start + len(text), device=device)
            turns[number, begin:end] = turn
            begin = end
    return embeds, positions, turns
