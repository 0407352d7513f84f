"""How much each token of a text matters to the frozen LM. Knows nothing of anchors or ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sac_rag.generator import Generator

# Behind it the model copies the text, and its copying heads show which entries they need.
_AGAIN = "\n\nRepeat the text:\n"


@torch.no_grad()
def surprisal(generator: Generator, sink: Sequence[int], tokens: Tensor) -> Tensor:
    """How little the frozen LM expected each token, in nats.

    Args:
        generator: The frozen LM.
        sink: Token ids read before the text.
        tokens: Shape: (tokens,)

    Returns:
        Infinite for a first token that nothing stands before. Shape: (tokens,)
    """
    ids = torch.cat([torch.tensor(sink, dtype=torch.long, device=tokens.device), tokens])
    with generator.running() as model:
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
    of_rest = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return torch.cat([of_rest.new_tensor([torch.inf]), of_rest])[-len(tokens) :]


@torch.no_grad()
def attention_when_read_again(generator: Generator, sink: Sequence[int], tokens: Tensor) -> Tensor:
    """The most attention that each token receives while the frozen LM reads the text once more.

    The idea is KVzip's (arXiv 2505.23416): what is needed to repeat a text is needed to answer
    from it, whatever the question. Takes two passes over the text.

    Args:
        generator: The frozen LM.
        sink: Token ids read before the text.
        tokens: Shape: (tokens,)

    Returns:
        The largest attention weight over all queries of a KV head, float32.
        Shape: (layers, kv_heads, tokens)
    """
    _, kv_heads, _ = generator.kv_shape
    before, count = len(sink), len(tokens)
    text = torch.cat([torch.tensor(sink, dtype=torch.long, device=tokens.device), tokens])
    again = torch.tensor(generator.tokenize(_AGAIN), device=tokens.device)
    with generator.running() as model:
        cache = model.base_model(text[None], use_cache=True).past_key_values
        with showing_attention(model):
            attentions = model.base_model(
                torch.cat([again, tokens])[None],
                past_key_values=cache,
                use_cache=True,
                output_attentions=True,
            ).attentions
    return most_received(attentions, kv_heads)[:, :, before : before + count]


@contextmanager
def showing_attention(model: Any) -> Iterator[None]:
    """Has the model compute its attention in the only way that hands the weights out."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def most_received(attentions: Sequence[Tensor], kv_heads: int) -> Tensor:
    """The most attention that each entry of one row receives from any query, float32.

    Args:
        attentions: As a model outputs them, a tensor a layer.
            Shape of each: (1, query_heads, tokens, entries)
        kv_heads: Of each layer.

    Returns:
        Shape: (layers, kv_heads, entries)
    """
    received = torch.stack([of_layer[0].amax(dim=1) for of_layer in attentions]).float()
    layers, _, entries = received.shape
    # Query heads that share a KV head stand next to each other.
    return received.view(layers, kv_heads, -1, entries).amax(dim=2)
