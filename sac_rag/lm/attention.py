"""Attention where each KV head has different cache entries, for transformers' models.

HF's models use one mask for all layers, and caches of one length. Where heads keep different
numbers of entries, each layer's cache is as long as its longest head, and each head needs a mask.
The attention functions registered here get these as the keyword `entry_masks` of the model's
forward; without it they call transformers' functions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

# Names of the functions here, by that of the function of transformers that each replaces.
NAMES = {"sdpa": "sac_rag_sdpa", "eager": "sac_rag_eager"}


class LayerMasks(Protocol):
    """Sequence of masks, one per layer."""

    def __len__(self) -> int: ...

    def __getitem__(self, layer: int, /) -> Tensor: ...


def sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    entry_masks: LayerMasks | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by torch's fused kernels.

    Args:
        module: The attention layer; it has a `layer_idx`.
        query: Shape: (rows, query_heads, tokens, head_dim)
        key: Shape: (rows, kv_heads, entries, head_dim)
        value: Shape: (rows, kv_heads, entries, head_dim)
        attention_mask: Mask of all layers; ignored with entry_masks.
        entry_masks: Additive masks of each layer. Shape of each: (rows, kv_heads, tokens, entries)
        scaling: Factor of the scores.
        **kwargs: Further arguments of transformers' function.

    Returns:
        Shape: (rows, tokens, query_heads, head_dim); and None in place of attention weights.
    """
    if entry_masks is None:
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return usual
    mask = entry_masks[module.layer_idx]
    rows, heads, tokens, width = query.shape
    group = heads // key.shape[1]
    padding = entry_masks.padding(module.layer_idx) if isinstance(entry_masks, Masks) else None
    if padding is not None:
        return _without_padding(query, key, value, mask, padding, scaling), None
    if tokens == 1:
        # The query heads of a group take the place of tokens: each KV head is read once.
        output = functional.scaled_dot_product_attention(
            query.reshape(rows, -1, group, width),
            key,
            value,
            attn_mask=mask.expand(-1, key.shape[1], group, -1),
            scale=scaling,
        )
        return output.reshape(rows, 1, heads, width), None
    # KV heads become rows: all query heads of a group then share one mask without copies.
    output = functional.scaled_dot_product_attention(
        query.reshape(-1, group, tokens, width),
        key.flatten(0, 1)[:, None].expand(-1, group, -1, -1),
        value.flatten(0, 1)[:, None].expand(-1, group, -1, -1),
        attn_mask=mask.flatten(0, 1)[:, None],
        scale=scaling,
    )
    return output.view(rows, heads, tokens, width).transpose(1, 2).contiguous(), None


def _without_padding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    padding: Sequence[int],
    scaling: float | None,
) -> Tensor:
    """Attention head by head, each to its own entries; `padding` has the first slots of each."""
    of_heads = [
        functional.scaled_dot_product_attention(
            query_group,
            key[:, head : head + 1, begin:].expand(-1, query_group.shape[1], -1, -1),
            value[:, head : head + 1, begin:].expand(-1, query_group.shape[1], -1, -1),
            attn_mask=mask[:, head : head + 1, :, begin:],
            scale=scaling,
        )
        for head, (begin, query_group) in enumerate(
            zip(padding, query.chunk(len(padding), dim=1), strict=True)
        )
    ]
    return torch.cat(of_heads, dim=1).transpose(1, 2).contiguous()


def eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    entry_masks: LayerMasks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by the model's `eager_attention_forward`; see `sdpa`.

    Shape of the weights: (rows, query_heads, tokens, entries).
    """
    if entry_masks is not None:
        group = query.shape[1] // key.shape[1]
        attention_mask = entry_masks[module.layer_idx].repeat_interleave(group, dim=1)
    # Each model of transformers has one in the module of its layers; some cap the scores.
    attend = sys.modules[type(module).__module__].eager_attention_forward
    output: tuple[Tensor, Tensor] = attend(module, query, key, value, attention_mask, **kwargs)
    return output


for _usual, _function, _mask in (("sdpa", sdpa, sdpa_mask), ("eager", eager, eager_mask)):
    AttentionInterface.register(NAMES[_usual], _function)
    AttentionMaskInterface.register(NAMES[_usual], _mask)


class Masks:
    """Additive masks of the attention scores, computed per layer on access.

    A token attends to the entries of earlier turns and the plain text before it; nothing attends to
    padding. A cue has the turn of its chunk and attends to that chunk. Branches do not attend to
    one another.

    Args:
        entry_turns: The turn of each layer's entries, -1 for padding; a single tensor if all layers
            are equal. Shape of each: (rows, kv_heads, entries)
        token_turns: The turn of each token of plain text. Shape: (rows, tokens)
        last_shared: The turn of each row after which branches begin. Shape: (rows,)
        dtype: Dtype of the scores.
    """

    def __init__(
        self,
        entry_turns: Sequence[Tensor],
        token_turns: Tensor,
        last_shared: Tensor,
        dtype: torch.dtype,
    ) -> None:
        tokens, device = token_turns.shape[1], token_turns.device
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        shared = token_turns <= last_shared[:, None]
        same_turn = token_turns[:, None, :] == token_turns[:, :, None]
        to_tokens = causal & (token_turns[:, None, :] >= 0) & (shared[:, None, :] | same_turn)
        # A padding token attends to itself: attention over nothing would be NaN.
        to_tokens = to_tokens | torch.eye(tokens, dtype=torch.bool, device=device)
        turns = torch.arange(-1, int(token_turns.max()) + 1, device=device)
        to_turns = (turns >= 0) & (turns <= token_turns[:, :, None])
        self._entry_turns = entry_turns
        self._padding = list(map(_padding, entry_turns))
        # Shape: (rows, tokens, tokens) and (rows, tokens, turns), turn -1 first
        self._to_tokens = additive(to_tokens, dtype)
        self._to_turns = additive(to_turns, dtype)

    def __len__(self) -> int:
        return len(self._entry_turns)

    def __getitem__(self, layer: int, /) -> Tensor:
        """Shape: (rows, kv_heads, tokens, entries + tokens); one head if all heads are equal."""
        turns = self._entry_turns[layer]
        rows, heads, entries = turns.shape
        tokens = self._to_tokens.shape[1]
        index = (turns + 1).view(rows, 1, -1).expand(-1, tokens, -1)
        to_entries = self._to_turns.gather(2, index).view(rows, tokens, heads, entries)
        to_tokens = self._to_tokens[:, None].expand(-1, heads, -1, -1)
        return torch.cat([to_entries.transpose(1, 2), to_tokens], dim=-1)

    def padding(self, layer: int) -> list[int] | None:
        """Slots before the first entry of each head in any row; None if skipping saves no time."""
        return self._padding[layer]

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward pass over the prompt."""
        return as_inputs([self[0]] if len(self) == 1 else self)

    def of_next(self, count: int) -> list[Tensor]:
        """Masks of the next tokens of the answer, at most `count`, each attending to all before.

        Returns:
            One mask per layer, or one for all, to be cut to the length of the cache at each step.
            Shape of each: (rows, kv_heads, 1, entries + tokens + count)
        """
        last = copy(self)
        last._to_turns, last._to_tokens = self._to_turns[:, -1:], self._to_tokens[:, -1:]
        return [functional.pad(last[layer], (0, count)) for layer in range(len(self))]


def _padding(turns: Tensor) -> list[int] | None:
    """See `Masks.padding`. Shape: (rows, kv_heads, entries)."""
    _, heads, entries = turns.shape
    if heads == 1 or not entries or turns.device.type != "cpu":
        return None
    # Of several rows, what none of them has.
    padding: list[int] = (turns >= 0).any(dim=0).int().argmax(dim=1).tolist()
    return padding if any(padding) else None


def as_inputs(masks: LayerMasks) -> dict[str, Any]:
    """Mask arguments of a model's forward pass: one mask for all layers, or one per layer."""
    if len(masks) == 1 and masks[0].shape[1] == 1:
        return {"attention_mask": masks[0]}
    # Any mask of four dimensions keeps transformers from making one. This one fits no scores: a
    # model that does not pass `entry_masks` to its layers raises instead of answering wrongly.
    return {"attention_mask": masks[0].new_zeros(1, 1, 1, 0), "entry_masks": masks}


def additive(attends_to: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of a boolean one: 0 where a query attends to a key, else the lowest number.

    A boolean mask would not do: eager attention adds any mask to the scores, True as 1.

    Args:
        attends_to: bool. Shape: (…, queries, keys)
        dtype: Dtype of the scores.
    """
    blocked = torch.finfo(dtype).min
    return torch.zeros_like(attends_to, dtype=dtype).masked_fill_(~attends_to, blocked)
