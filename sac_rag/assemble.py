"""Text and AnchorKVs, interleaved in order, to a Prompt. Knows nothing of tokenizers or stores.

Two counts must be kept apart. A *position* is a RoPE index, in source tokens: a chunk of 500 tokens
moves what follows by 500, however few anchors it kept. An *entry* is a place in the HF KV cache:
that chunk takes as many as it has anchors.

Gradients flow from a Prompt back into the AnchorKVs and the cue it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache

from sac_rag import rope
from sac_rag.errors import PromptTooLong
from sac_rag.generator import Generator
from sac_rag.kv import AnchorKV

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
    anchors are padded on the right.

    Attributes:
        embeds: Plain text of all rows. Shape: (rows, tokens, hidden)
        position_ids: Shape: (rows, tokens)
        mask: True = attend. Shape: (rows, 1, tokens, entries + tokens)
        cache: All anchors, moved to their places; the pass adds the plain text to it.
        next_positions: Position of the first token of each answer. Shape: (rows,)
        adapter: Name of the LoRA to read it and to answer with; None for the frozen LM.
        num_anchors: Anchors of each row, without padding.
        num_tokens: Plain tokens of each row, without padding.
    """

    embeds: Tensor
    position_ids: Tensor
    mask: Tensor
    cache: DynamicCache
    next_positions: Tensor
    adapter: str | None
    num_anchors: tuple[int, ...]
    num_tokens: tuple[int, ...]


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
        PromptTooLong: if a row and its reserve pass the model's last position.
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
    return Prompt(
        embeds=embeds,
        position_ids=position_ids,
        mask=_mask(entry_turns, token_turns, [row.last_shared_turn for row in placed]),
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
        PromptTooLong: with the numbers.
    """
    if positions + reserve > generator.max_positions:
        raise PromptTooLong(
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
            layers, heads, _, head_dim = part.shape
            if (layers, heads, head_dim) != generator.kv_shape:
                raise ValueError(
                    "a chunk's KV must be of this model's (layers, kv_heads, head_dim) = "
                    f"{generator.kv_shape}, was: {(layers, heads, head_dim)}"
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


def _cache(rows: list[_Row], generator: Generator) -> tuple[DynamicCache, Tensor]:
    """Moves all chunks into one HF cache.

    Returns:
        The cache, and each entry's turn, -1 for padding. Shape: (rows, entries)
    """
    device = generator.device
    entries = max(row.num_anchors for row in rows)
    turns = torch.full((len(rows), entries), -1, device=device)
    cache = DynamicCache()
    if not entries:
        return cache, turns
    keys, values = [], []
    for number, row in enumerate(rows):
        # What is kept in fewer bits travels in fewer bits.
        chunks = [(start, kv.to(device)) for _, start, kv in row.chunks]
        moved = [rope.move(kv.keys, start, generator.frequencies) for start, kv in chunks]
        keys.append(_joined(moved, entries, generator))
        values.append(_joined([kv.values for _, kv in chunks], entries, generator))
        own = [turn for turn, _, kv in row.chunks for _ in range(kv.num_anchors)]
        turns[number, : len(own)] = torch.tensor(own, device=device)
    # One unbind, not a selection a layer: the gradient of each selection is as large as them all.
    by_layer = (
        (of_rows[0][:, None] if len(rows) == 1 else torch.stack(of_rows, dim=1)).unbind(0)
        for of_rows in (keys, values)
    )
    for layer, (of_keys, of_values) in enumerate(zip(*by_layer, strict=True)):
        cache.update(of_keys, of_values, layer)
    return cache, turns


def _joined(parts: list[Tensor], entries: int, generator: Generator) -> Tensor:
    """One row's keys or values, padded with zeros, for NaN would spread even at weight 0.

    Returns:
        Shape: (layers, kv_heads, entries, head_dim)
    """
    layers, heads, head_dim = generator.kv_shape
    padding = entries - sum(part.shape[2] for part in parts)
    dtype, device = generator.dtype, generator.device
    parts = [part.to(device, dtype) for part in parts]
    if padding:
        parts.append(torch.zeros(layers, heads, padding, head_dim, dtype=dtype, device=device))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


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


def _mask(entry_turns: Tensor, token_turns: Tensor, last_shared: list[int]) -> Tensor:
    """A token sees the anchors of earlier turns and the plain text before it; nobody sees padding.

    A cue has its chunk's own turn and sees that chunk. A branch sees no other branch.

    Args:
        entry_turns: Shape: (rows, entries)
        token_turns: Shape: (rows, tokens)
        last_shared: The turn of each row after which branches begin.

    Returns:
        Shape: (rows, 1, tokens, entries + tokens)
    """
    tokens, device = token_turns.shape[1], token_turns.device
    entries_seen = (entry_turns[:, None, :] >= 0) & (
        entry_turns[:, None, :] <= token_turns[:, :, None]
    )
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    shared = token_turns <= torch.tensor(last_shared, device=device)[:, None]
    own = token_turns[:, None, :] == token_turns[:, :, None]
    tokens_seen = causal & (token_turns[:, None, :] >= 0) & (shared[:, None, :] | own)
    # A padding token sees itself: attention over nothing would be NaN.
    tokens_seen = tokens_seen | torch.eye(tokens, dtype=torch.bool, device=device)
    return torch.cat([entries_seen, tokens_seen], dim=-1)[:, None]
