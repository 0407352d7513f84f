"""Fits the scorer that chooses anchors. Knows nothing of gradients: it is a least-squares problem.

The scorer foretells, from a token's own keys and values, the logarithm of the most attention that
it will receive when the text is read again. KVzap (arXiv 2601.07891) found that this can be
learned; here the predictor is linear in the KV of one layer, so that one pass is enough to encode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sac_rag.compressors.sac import SAC, token_features
from sac_rag.salience import attention_when_read_again

# Below this share of attention nothing is told apart, and the logarithm is only noise.
_LEAST = 1e-4
# Of the features' variance, added to it: few texts are enough then.
_RIDGE = 1e-3


@torch.no_grad()
def fit_scorer(
    compressor: SAC,
    texts: Iterable[Tensor],
    on_progress: Callable[[int], None] | None = None,
) -> float:
    """Sets `compressor.scorer` to the best linear prediction over some texts.

    Only running sums are kept, so any number of texts can be gone through. 200 paragraphs are
    enough for a model of 135M parameters.

    Args:
        compressor: With anchors="learned". Its LoRA is as it is: fit before training it.
        texts: Token ids, each at most a segment. Shape of each: (tokens,)
        on_progress: Called with 1 after each text.

    Returns:
        Share of the variance explained over these texts, mean over layers and heads.

    Raises:
        ValueError: if there is no text, or the compressor has no scorer.
    """
    if compressor.config.anchors != "learned":
        raise ValueError(
            "only a compressor with anchors='learned' has a scorer, was: "
            f"anchors={compressor.config.anchors!r}"
        )
    generator = compressor.generator
    everything = compressor.at_ratio(1)
    layers, heads, head_dim = generator.kv_shape
    features, count = 2 * heads * head_dim, 0
    device = generator.device
    # Sums of x, y, x xᵀ, x yᵀ and y²; float64, for the variance is a difference of large sums.
    x_sum = torch.zeros(layers, features, dtype=torch.float64, device=device)
    y_sum = torch.zeros(layers, heads, dtype=torch.float64, device=device)
    y_squared = torch.zeros_like(y_sum)
    xx = torch.zeros(layers, features, features, dtype=torch.float64, device=device)
    xy = torch.zeros(layers, features, heads, dtype=torch.float64, device=device)
    for tokens in texts:
        (kv,) = everything.encode([tokens], [0])
        positions = torch.arange(len(tokens), device=device)
        x = token_features(positions, kv.keys, kv.values, generator.frequencies).double()
        wanted = attention_when_read_again(generator, compressor.sink_ids, tokens)
        y = wanted.clamp_min(_LEAST).log().double().transpose(1, 2)
        count += len(tokens)
        x_sum += x.sum(1)
        y_sum += y.sum(1)
        y_squared += y.square().sum(1)
        xx += x.transpose(1, 2) @ x
        xy += x.transpose(1, 2) @ y
        if on_progress is not None:
            on_progress(1)
    if not count:
        raise ValueError("expected at least one text to fit the scorer on, got none")
    mean_x, mean_y = x_sum / count, y_sum / count
    covariance = xx / count - mean_x[:, :, None] * mean_x[:, None, :]
    with_y = xy / count - mean_x[:, :, None] * mean_y[:, None, :]
    spread = covariance.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    solution = torch.linalg.solve(covariance + _RIDGE * torch.diag_embed(spread), with_y)
    compressor.scorer.copy_(solution.transpose(1, 2))
    residual = (
        y_squared / count
        - mean_y.square()
        - 2 * (solution * with_y).sum(1)
        + (solution * (covariance @ solution)).sum(1)
    )
    variance = (y_squared / count - mean_y.square()).clamp_min(1e-12)
    return float((1 - residual / variance).mean())
