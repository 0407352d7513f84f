"""Anchor selection: the tokens of a segment whose KV is kept, and the segments of a chunk.

The ways of `CompressorConfig.anchors`, from the cheapest to the one that answers best:

uniform     the middle token of every block of `ratio` tokens (`strided_anchors`)
random      any tokens, the same whenever a text is compressed: a control (`random_anchors`)
surprisal   the tokens that the frozen LM expected least (`surprisal`)
attention   for each layer and head, the tokens that receive the most attention while the frozen LM
            reads the text a second time (`attention_when_read_again`)
learned     for each layer and head, the tokens to which a fitted `Scorer` predicts the most
            attention, from their keys and values

The first two need token ids only. The others give a score per token, of which `top_anchors` keeps
the highest, or `budget.ranked_entries` where heads keep different numbers of tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sac_rag.lm import rope
from sac_rag.lm.generator import Generator

# Behind it the model copies the text, and its copying heads show which entries they need.
REPEAT_PROMPT = "\n\nRepeat the text:\n"

# The scorer's network reads the last of every three layers, and two tokens to each side per block.
_LAYER_STEP, _KERNEL_TOKENS, _BLOCKS = 3, 5, 2


def segment_bounds(num_tokens: int, segment_tokens: int) -> list[tuple[int, int]]:
    """Cuts a chunk into segments, each of which is encoded in one forward pass.

    Returns:
        (start, end) of every segment in source tokens; all but the last are `segment_tokens` long.
    """
    return [
        (start, min(start + segment_tokens, num_tokens))
        for start in range(0, num_tokens, segment_tokens)
    ]


def num_anchors(num_tokens: int, ratio: int) -> int:
    """Number of anchors of a segment, however they are chosen."""
    return len(strided_anchors(num_tokens, ratio))


def strided_anchors(num_tokens: int, ratio: int) -> Tensor:
    """Picks the middle token of every block of `ratio` tokens (SAC, arXiv 2510.08907).

    A segment shorter than half a block keeps its first token, so that every text has an anchor.

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


def random_anchors(tokens: Tensor, ratio: int) -> Tensor:
    """Picks tokens at random, as many as `strided_anchors` gives; equal texts have equal ones.

    Args:
        tokens: Token ids, whose digest is the seed. Shape: (tokens,)
        ratio: Source tokens per anchor, at least 1.

    Returns:
        In-segment indices, ascending, int64. Shape: (anchors,)
    """
    digest = hashlib.sha256(repr(tokens.tolist()).encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    shuffled = torch.randperm(len(tokens), generator=random)
    return shuffled[: num_anchors(len(tokens), ratio)].sort().values


def top_anchors(scores: Tensor, ratio: int) -> Tensor:
    """Picks the tokens with the highest scores, separately for each leading dimension.

    Args:
        scores: Shape: (..., tokens)
        ratio: Source tokens per anchor, at least 1.

    Returns:
        In-segment indices, ascending, int64; as many as `strided_anchors` gives.
        Shape: (..., anchors)
    """
    count = num_anchors(scores.shape[-1], ratio)
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


@torch.no_grad()
def surprisal(generator: Generator, sink: Sequence[int], tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each token under the frozen LM, in nats.

    Args:
        generator: The frozen LM.
        sink: Token ids read before the text.
        tokens: Shape: (tokens,)

    Returns:
        Infinite for a first token without a sink before it. Shape: (tokens,)
    """
    ids = torch.cat([torch.tensor(sink, dtype=torch.long, device=tokens.device), tokens])
    with generator.running() as model:
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
    losses = functional.cross_entropy(logits, ids[1:], reduction="none")
    return torch.cat([losses.new_tensor([torch.inf]), losses])[-len(tokens) :]


@torch.no_grad()
def attention_when_read_again(generator: Generator, sink: Sequence[int], tokens: Tensor) -> Tensor:
    """Largest attention weight of each token while the frozen LM reads the text a second time.

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
    attentions, _ = read_again(generator, sink, tokens)
    received = max_received_attention(attentions, generator.kv_shape[1])
    return received[:, :, len(sink) : len(sink) + len(tokens)]


@torch.no_grad()
def read_again(
    generator: Generator, sink: Sequence[int], tokens: Tensor
) -> tuple[Sequence[Tensor], Sequence[Any]]:
    """Attention and KV of the frozen LM that reads a text, then a prompt and the text again.

    Args:
        generator: The frozen LM.
        sink: Token ids read before the text.
        tokens: Shape: (tokens,)

    Returns:
        Attention weights of the second reading, one tensor per layer, Shape of each: (1,
        query_heads, queries, entries); and the layers of the cache, with the entries of the sink,
        the text and the second reading.
    """
    text = torch.cat([torch.tensor(sink, dtype=torch.long, device=tokens.device), tokens])
    again = torch.tensor(generator.tokenize(REPEAT_PROMPT), device=tokens.device)
    with generator.running() as model:
        cache = model.base_model(text[None], use_cache=True).past_key_values
        with eager_attention(model):
            output = model.base_model(
                torch.cat([again, tokens])[None],
                past_key_values=cache,
                use_cache=True,
                output_attentions=True,
            )
    return output.attentions, output.past_key_values.layers


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Switches a running model to eager attention, the only one that returns weights."""
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(implementation)


def max_received_attention(attentions: Sequence[Tensor], kv_heads: int) -> Tensor:
    """Largest attention weight that each entry of one row receives from any query, float32.

    Args:
        attentions: As a model returns them, one tensor per layer.
            Shape of each: (1, query_heads, tokens, entries)
        kv_heads: Number of KV heads per layer.

    Returns:
        Shape: (layers, kv_heads, entries)
    """
    received = torch.stack([weights[0].amax(dim=1) for weights in attentions]).float()
    layers, _, entries = received.shape
    # Query heads that share a KV head are adjacent.
    return received.view(layers, kv_heads, -1, entries).amax(dim=2)


class Scorer(nn.Module):
    """Predicts the attention that each token will receive, in each layer and head.

    The sum of a linear function of the token's keys and values in that layer, and of the output of
    a small convolutional network over the KV of several layers and of neighbouring tokens: unlike
    the encoder, it reads the tokens that follow, too. Its last matrix starts at zero, so that an
    unfitted network adds nothing.

    Args:
        layers: Number of layers of the generator.
        kv_heads: Number of KV heads per layer.
        features: Number of features per token and layer, see `token_features`.
        width: Hidden size of the network; 0 for the linear function alone.
    """

    def __init__(self, layers: int, kv_heads: int, features: int, width: int) -> None:
        super().__init__()
        self._heads = (layers, kv_heads)
        self._read_layers = list(range(layers))[_LAYER_STEP - 1 :: _LAYER_STEP] or [layers - 1]
        self.width = width
        self.linear = nn.Parameter(torch.zeros(layers, kv_heads, features))
        if width:
            self.into = nn.Linear(len(self._read_layers) * features, width)
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(_BLOCKS))
            self.around = nn.ModuleList(
                nn.Conv1d(width, width, _KERNEL_TOKENS, padding="same") for _ in range(_BLOCKS)
            )
            self.out = nn.Linear(width, layers * kv_heads, bias=False)
            nn.init.zeros_(self.out.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Scores of the tokens of one text; only differences within a head are meaningful.

        Args:
            features: Shape: (layers, tokens, features)

        Returns:
            Shape: (layers, kv_heads, tokens)
        """
        scores: Tensor = (features @ self.linear.transpose(1, 2)).transpose(1, 2)
        if not self.width:
            return scores
        hidden = self.into(features[self._read_layers].transpose(0, 1).flatten(1))
        for norm, around in zip(self.norms, self.around, strict=True):
            hidden = hidden + around(functional.gelu(norm(hidden)).T[None])[0].T
        from_network: Tensor = self.out(functional.gelu(hidden)).T.reshape(*self._heads, -1)
        return scores + from_network

    @torch.no_grad()
    def fold_normalization(self, mean: Tensor, scale: Tensor) -> None:
        """Folds a normalization of the features into the weights, which then take raw features.

        Args:
            mean: Shape: (layers, features)
            scale: Shape: (layers, features)
        """
        self.linear.div_(scale[:, None])
        if self.width:
            self.into.weight.div_(scale[self._read_layers].flatten())
            self.into.bias.sub_(self.into.weight @ mean[self._read_layers].flatten())

    def named_weights(self) -> dict[str, Tensor]:
        """The parameters, under the names that they have among a compressor's weights."""
        named = dict(self.named_parameters())
        return {"scorer": named.pop("linear"), **{f"scorer.{n}": w for n, w in named.items()}}


def token_features(positions: Tensor, keys: Tensor, values: Tensor, frequencies: Tensor) -> Tensor:
    """Inputs of a scorer: unrotated keys and values of all heads of a layer, float32.

    Args:
        positions: Positions for which the keys are rotated. Shape: (tokens,)
        keys: Shape: (layers, kv_heads, tokens, head_dim)
        values: Shape: (layers, kv_heads, tokens, head_dim)
        frequencies: RoPE frequencies of the generator. Shape: (head_dim / 2,)

    Returns:
        Shape: (layers, tokens, 2 * kv_heads * head_dim)
    """
    layers, _, count, _ = keys.shape
    both = torch.cat([rope.move(keys, -positions, frequencies), values], dim=-1)
    return both.float().transpose(1, 2).reshape(layers, count, -1)
