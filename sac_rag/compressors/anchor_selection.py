"""Which tokens carry a chunk, and how a chunk is cut into segments. Knows token counts only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sac_rag.lm import rope
from sac_rag.lm.generator import Generator


def strided_anchors(num_tokens: int, ratio: int) -> Tensor:
    """Picks the middle token of every block of `ratio` tokens (SAC, arXiv 2510.08907).

    A segment shorter than half a block keeps its first token, so no text is ever without an anchor.

    Args:
        num_tokens: Tokens in the segment, at least 1.
        ratio: Source tokens per anchor, at least 1.

    Returns:
        In-segment indices, ascending, int64. Shape: (anchors,)

    Raises:
        ValueError: if either number is below 1.
    """
    if num_tokens < 1 or ratio < 1:
        raise ValueError(f"num_tokens and ratio must be at least 1, were: {num_tokens} and {ratio}")
    first = (ratio - 1) // 2
    if first >= num_tokens:
        first = 0
    return torch.arange(first, num_tokens, ratio)


def num_anchors(num_tokens: int, ratio: int) -> int:
    """How many anchors a segment has, however they are chosen."""
    return len(strided_anchors(num_tokens, ratio))


def top_anchors(scores: Tensor, ratio: int) -> Tensor:
    """Picks the tokens of the highest scores, for each leading dimension apart.

    Args:
        scores: Shape: (..., tokens)
        ratio: Source tokens per anchor, at least 1.

    Returns:
        In-segment indices, ascending, int64; as many as `strided_anchors` gives.
        Shape: (..., anchors)
    """
    count = num_anchors(scores.shape[-1], ratio)
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def segment_bounds(num_tokens: int, segment_tokens: int) -> list[tuple[int, int]]:
    """Cuts a chunk into segments that are each encoded in a forward pass of their own.

    Returns:
        (start, end) of every segment in source tokens; all but the last are `segment_tokens` long.
    """
    return [
        (start, min(start + segment_tokens, num_tokens))
        for start in range(0, num_tokens, segment_tokens)
    ]


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


# The network sees the last of every three layers, and two tokens to each side in each block.
_EVERY, _NEIGHBOURS, _BLOCKS = 3, 5, 2


class Scorer(nn.Module):
    """A score for each token in each layer and head: the higher, the more it will be attended to.

    The sum of a linear function of the token's own keys and values in that layer, and of what a
    small convolutional network makes of the KV of many layers and of the tokens around: unlike
    the encoder, it sees what follows. A network whose last matrix is zero adds nothing.

    Args:
        layers: Of the generator.
        kv_heads: Of each layer.
        features: Of each token in each layer, see `token_features`.
        width: Of the network; 0 for the linear function alone.
    """

    def __init__(self, layers: int, kv_heads: int, features: int, width: int) -> None:
        super().__init__()
        self._heads = (layers, kv_heads)
        self._seen = list(range(layers))[_EVERY - 1 :: _EVERY] or [layers - 1]
        self.width = width
        self.linear = nn.Parameter(torch.zeros(layers, kv_heads, features))
        if width:
            self.into = nn.Linear(len(self._seen) * features, width)
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(_BLOCKS))
            self.around = nn.ModuleList(
                nn.Conv1d(width, width, _NEIGHBOURS, padding="same") for _ in range(_BLOCKS)
            )
            self.out = nn.Linear(width, layers * kv_heads, bias=False)
            nn.init.zeros_(self.out.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Scores of one text's tokens; only differences within a head mean something.

        Args:
            features: Shape: (layers, tokens, features)

        Returns:
            Shape: (layers, kv_heads, tokens)
        """
        scores: Tensor = (features @ self.linear.transpose(1, 2)).transpose(1, 2)
        if not self.width:
            return scores
        hidden = self.into(features[self._seen].transpose(0, 1).flatten(1))
        for norm, around in zip(self.norms, self.around, strict=True):
            hidden = hidden + around(functional.gelu(norm(hidden)).T[None])[0].T
        from_network: Tensor = self.out(functional.gelu(hidden)).T.reshape(*self._heads, -1)
        return scores + from_network

    @torch.no_grad()
    def fold_normalization(self, mean: Tensor, scale: Tensor) -> None:
        """Folds a normalization into the weights: they are then for features as they are.

        Args:
            mean: Shape: (layers, features)
            scale: Shape: (layers, features)
        """
        self.linear.div_(scale[:, None])
        if self.width:
            self.into.weight.div_(scale[self._seen].flatten())
            self.into.bias.sub_(self.into.weight @ mean[self._seen].flatten())

    def named_weights(self) -> dict[str, Tensor]:
        """Its parameters by the names under which a compressor has them."""
        named = dict(self.named_parameters())
        return {"scorer": named.pop("linear"), **{f"scorer.{n}": w for n, w in named.items()}}


def token_features(positions: Tensor, keys: Tensor, values: Tensor, frequencies: Tensor) -> Tensor:
    """What a scorer sees of each token: its unrotated keys and its values, of all heads, float32.

    Args:
        positions: What the keys are rotated for. Shape: (tokens,)
        keys: Shape: (layers, kv_heads, tokens, head_dim)
        values: Shape: (layers, kv_heads, tokens, head_dim)
        frequencies: Of the generator's RoPE. Shape: (head_dim / 2,)

    Returns:
        Shape: (layers, tokens, 2 * kv_heads * head_dim)
    """
    layers, _, count, _ = keys.shape
    both = torch.cat([rope.move(keys, -positions, frequencies), values], dim=-1)
    return both.float().transpose(1, 2).reshape(layers, count, -1)
