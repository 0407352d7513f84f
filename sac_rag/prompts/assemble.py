"""Assembles text and AnchorKVs, interleaved in reading order, into the model input of a Prompt.

Two counts differ. A *position* is a RoPE index, in source tokens: a chunk of 500 tokens moves the
following text by 500, however few anchors it has. An *entry* is a slot of the HF KV cache: the same
chunk takes as many as it has anchors.

Gradients flow from a Prompt back into its AnchorKVs and the cue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from sac_rag.errors import PromptTooLongError
from sac_rag.kv import AnchorKV
from sac_rag.lm import rope
from sac_rag.lm.attention import Masks
from sac_rag.lm.cache import ROOM, RoomyCache
from sac_rag.lm.generator import Generator

# Plain text as token ids, or a chunk.
Part: TypeAlias = Sequence[int] | AnchorKV

# Stands for the cue among token ids.
_CUE = -1


@dataclass(frozen=True)
class Branches:
    """Texts that each continue the same prompt and do not attend to one another; its last part.

    Attributes:
        texts: Token ids, one sequence per branch, none of them empty.
    """

    texts: tuple[Sequence[int], ...]

    def __len__(self) -> int:
        """Positions of the longest branch."""
        return max(map(len, self.texts), default=0)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Input of one forward pass of the generator; rows may have different chunks.

    Plain text is padded on the left, so that the last token of every row is the last column;
    entries are padded on the left, in each layer to the length of its longest head.

    Attributes:
        embeds: Embeddings of the plain text. Shape: (rows, tokens, hidden)
        position_ids: Positions of the plain text. Shape: (rows, tokens)
        masks: Additive attention mask of each layer; a single one where all layers and heads have
            the same entries.
        cache: All anchors, moved to their places; the pass appends the plain text.
        next_positions: Position of the first token of each answer. Shape: (rows,)
        adapter: Name of the LoRA for prompt and answer; None for the frozen LM.
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
        """Arguments of the model's forward pass over the prompt."""
        return {
            "inputs_embeds": self.embeds,
            "position_ids": self.position_ids,
            **self.masks.inputs(),
            "past_key_values": self.cache,
            "use_cache": True,
        }


@dataclass
class _PlacedRow:
    """Parts of one prompt with their places: (turn in the reading order, first position, part)."""

    chunks: list[tuple[int, int, AnchorKV]]
    texts: list[tuple[int, int, Sequence[int]]]  # token ids
    end: int = 0  # position after the last part
    last_shared_turn: int = 0  # later turns are branches

    @property
    def num_anchors(self) -> int:
        return sum(kv.num_anchors for _, _, kv in self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for _, _, ids in self.texts)


def assemble(
    rows: Sequence[Sequence[Part | Branches]],
    generator: Generator,
    *,
    prefix: AnchorKV | None = None,
    cue: Tensor | None = None,
    adapter: str | None = None,
    first_position: int = 0,
) -> Prompt:
    """Places parts one after the other and moves each chunk's keys to its place.

    Args:
        rows: One prompt each, any interleaving of text and chunks, ending in text or in branches.
        generator: The LM that reads the prompt.
        prefix: KV of plain text that every row begins with, read at position 0.
        cue: Embedding after each chunk, at the position of the chunk's last token.
            Shape: (hidden,)
        adapter: Name of the LoRA for prompt and answer. Default: the frozen LM.
        first_position: Position of each row's first token, or of that of its prefix.

    Raises:
        ValueError: if a row does not end in text, or a chunk is not of this generator's shape.
        PromptTooLongError: if a row passes the model's last position.
    """
    if not rows:
        raise ValueError("expected at least one row, got none")
    for number, parts in enumerate(rows):
        # Before anything is embedded: a prompt that is far too long may not fit into memory.
        positions = sum(p.num_tokens if isinstance(p, AnchorKV) else len(p) for p in parts)
        positions += prefix.num_tokens if prefix is not None else 0
        require_room(number, first_position + positions, 0, generator)
    has_cue = cue is not None
    placed = [_place(row, generator, prefix, has_cue, first_position) for row in rows]
    cache, entry_turns = _cache(placed, generator)
    embeds, position_ids, token_turns = _plain_text(placed, generator, cue)
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
    """Raises PromptTooLongError for a prompt that does not fit the model.

    Args:
        number: Index of the prompt in the batch, for the message.
        positions: Length of the prompt in source tokens, plus its first position.
        reserve: Positions that the answer needs, in tokens.
        generator: The LM that would read it.
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
    has_cue: bool,
    first_position: int,
) -> _PlacedRow:
    if not parts or isinstance(parts[-1], AnchorKV) or not len(parts[-1]):
        raise ValueError("a prompt must end in text: the model answers from its last token")
    row = _PlacedRow([], [], end=first_position)
    if prefix is not None:
        row.chunks.append((0, row.end, prefix))
        row.end += prefix.num_tokens
    for turn, part in enumerate(parts, start=1):
        if isinstance(part, Branches):
            _place_branches(part, turn, row, last=turn == len(parts))
        elif not isinstance(part, AnchorKV):
            row.texts.append((turn, row.end, part))
            row.end += len(part)
            row.last_shared_turn = turn
        else:
            if part.kv_shape != generator.kv_shape:
                raise ValueError(
                    "a chunk's KV must have this model's (layers, kv_heads, head_dim) = "
                    f"{generator.kv_shape}, was: {part.kv_shape}"
                )
            row.chunks.append((turn, row.end, part))
            row.end += part.num_tokens
            row.last_shared_turn = turn
            if has_cue:
                row.texts.append((turn, row.end - 1, [_CUE]))
    return row


def _place_branches(branches: Branches, turn: int, row: _PlacedRow, last: bool) -> None:
    if not last or not all(branches.texts):
        raise ValueError("branches must be the last part of a prompt, and each must have text")
    for number, text in enumerate(branches.texts):
        row.texts.append((turn + number, row.end, text))
    row.end += len(branches)


def _cache(rows: list[_PlacedRow], generator: Generator) -> tuple[DynamicCache, list[Tensor]]:
    """Moves all chunks into one HF cache, each layer as long as its longest head.

    Behind the entries is room for the plain text and the beginning of the answer.

    Returns:
        The cache; and the turn of each entry per layer, -1 for padding. Where all heads and layers
        are equal, one tensor with one head. Shape of each: (rows, kv_heads, entries)
    """
    device = generator.device
    # Quantized KV is copied to the device in 8 bits.
    chunks = [
        (number, turn, start, kv.to(device))
        for number, row in enumerate(rows)
        for turn, start, kv in row.chunks
    ]
    if not chunks:
        return DynamicCache(), [torch.full((len(rows), 1, 0), -1, device=device)]
    room = ROOM + max(row.num_tokens for row in rows)
    slots = _slots([(number, kv) for number, _, _, kv in chunks], len(rows), room, generator)
    keys = [rope.move(kv.keys, start, generator.frequencies) for _, _, start, kv in chunks]
    values = [kv.values for _, _, _, kv in chunks]
    turns = [torch.full((kv.num_entries,), turn, device=device) for _, turn, _, kv in chunks]
    # Padding is zero: NaN would spread even with weight 0.
    of_layers = (slots.lay_out(parts, 0, generator.dtype) for parts in (keys, values))
    cache = RoomyCache(zip(*of_layers, strict=True), room=room)
    by_layer = zip(slots.lay_out(turns, -1, torch.long), slots.lengths, strict=True)
    entry_turns = [turns_of_layer[..., :length] for turns_of_layer, length in by_layer]
    first = entry_turns[0][:, :1]
    if all(t.shape[2] == first.shape[2] and bool((t == first).all()) for t in entry_turns):
        return cache, [first]
    return cache, entry_turns


@dataclass(frozen=True, eq=False)
class _Slots:
    """Slots of the entries of all rows: row by row, then layer by layer, then head by head.

    Attributes:
        index: The slot of each entry. Shape: (entries,)
        rows: Rows of the batch.
        kv_heads: KV heads of each layer.
        lengths: Slots per head for entries, by layer.
        room: Slots per head behind them.
    """

    index: Tensor
    rows: int
    kv_heads: int
    lengths: list[int]
    room: int

    def lay_out(self, parts: list[Tensor], padding: int, dtype: torch.dtype) -> list[Tensor]:
        """Values of entries in their slots, by layer. Shape of each: (rows, kv_heads, slots, …)."""
        sizes = [self.kv_heads * (length + self.room) for length in self.lengths]
        inner = parts[0].shape[1:]
        laid_out = _zeros((self.rows * sum(sizes), *inner), dtype, self.index.device)
        if padding:
            laid_out.fill_(padding)
        indices = torch.split(self.index, [len(part) for part in parts])
        for index, part in zip(indices, parts, strict=True):
            laid_out.index_copy_(0, index, part.to(dtype))
        # One split, not one selection per layer, whose gradients would each have the full size.
        by_layer = torch.split(laid_out.view(self.rows, -1, *inner), sizes, dim=1)
        return [t.view(self.rows, self.kv_heads, -1, *inner) for t in by_layer]


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on CPUs without touching the memory, which takes longer than writing the entries."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
        .view(dtype)
        .view(*shape)
    )


def _slots(
    chunks: Sequence[tuple[int, AnchorKV]], rows: int, room: int, generator: Generator
) -> _Slots:
    """Assigns a slot to each entry; those of one head and row are adjacent.

    Args:
        chunks: Pairs of row number and KV.
        rows: Rows of the batch.
        room: Slots per head behind those of the entries.
        generator: The LM, whose shape the chunks have.
    """
    layers, kv_heads, _ = generator.kv_shape
    device = generator.device
    # A row is a further level above layers and heads.
    heads = torch.cat([kv.heads.int() + number * layers * kv_heads for number, kv in chunks])
    counts = torch.bincount(heads, minlength=rows * layers * kv_heads)
    lengths = counts.view(rows, layers, kv_heads).amax(dim=(0, 2))
    widths = lengths + room
    before = torch.arange(rows, device=device)[:, None] * widths.sum()
    before = (before + widths.cumsum(0) - widths)[:, :, None] * kv_heads
    padding = lengths[:, None] - counts.view(rows, layers, kv_heads)
    begins = before + torch.arange(kv_heads, device=device) * widths[:, None] + padding
    in_order, by_head = heads.sort(stable=True)
    rank = torch.arange(len(heads), device=device) - (counts.cumsum(0) - counts)[in_order]
    index = torch.empty_like(by_head)
    index[by_head] = begins.flatten()[in_order] + rank
    return _Slots(index, rows, kv_heads, lengths.tolist(), room)


def _plain_text(
    rows: list[_PlacedRow], generator: Generator, cue: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain text of all rows, padded on the left.

    Returns:
        embeds, Shape: (rows, tokens, hidden); positions and turns (-1 for padding),
        Shape: (rows, tokens)
    """
    tokens = max(row.num_tokens for row in rows)
    # Laid out on the host, so that one copy to the device serves all texts.
    places = np.zeros((3, len(rows), tokens), np.int64)
    ids, positions, turns = places
    turns[:] = -1
    for number, row in enumerate(rows):
        begin = tokens - row.num_tokens
        for turn, start, text in row.texts:
            end = begin + len(text)
            ids[number, begin:end] = text
            positions[number, begin:end] = range(start, start + len(text))
            turns[number, begin:end] = turn
            begin = end
    token_ids, position_ids, token_turns = torch.from_numpy(places).to(generator.device)
    embeds = generator.embed(token_ids.clamp(min=0)).masked_fill(token_turns[..., None] < 0, 0)
    if cue is not None:
        is_cue = token_ids[..., None] == _CUE
        embeds = torch.where(is_cue, cue.to(generator.device, generator.dtype), embeds)
    return embeds, position_ids, token_turns
