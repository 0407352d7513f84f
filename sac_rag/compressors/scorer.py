"""Foretells which tokens will be needed, from their keys and values. Knows nothing of a ratio."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sac_rag import rope

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
