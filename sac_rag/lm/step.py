"""One further token per row through a model, without what transformers does around its operations.

The operations are those of transformers' forward pass, in its order. Left out are the calls of some
five hundred modules, the checks of arguments and the making of masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from sac_rag.lm import attention, quantized
from sac_rag.lm.attention import LayerMasks

_MODELS = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_ATTEND: dict[str, Callable[..., tuple[Tensor, Any]]] = {
    attention.NAMES["sdpa"]: attention.sdpa,
    attention.NAMES["eager"]: attention.eager,
}


class Step:
    """The forward pass of a model over one token per row.

    Args:
        model: A causal LM that `is_supported`; adapters that it has count as off.
        weights: What its matrices are packed as, into copies; see `quantized.packed`. Default: they
            are not.
    """

    def __init__(self, model: Any, weights: str | None = None) -> None:
        self._stack = model.base_model
        self._norm = _norm(self._stack.norm)
        self._head = _linear(model.lm_head, weights)
        self._attend = _ATTEND[model.config._attn_implementation]
        self._layers = [_Layer(layer, weights) for layer in self._stack.layers]

    @staticmethod
    def is_supported(model: Any) -> bool:
        """Whether a model is of an architecture known here, and no module is changed or hooked."""
        return type(model) in _MODELS and not any(
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            for module in model.modules()
        )

    def logits(
        self, embeds: Tensor, positions: Tensor, masks: LayerMasks, cache: DynamicCache
    ) -> Tensor:
        """Logits behind the tokens, whose KV is added to the cache.

        Args:
            embeds: Shape: (rows, 1, hidden)
            positions: Shape: (rows, 1)
            masks: Additive masks, one per layer or one for all.
                Shape of each: (rows, kv_heads, 1, entries + 1); one head if all heads are equal.
            cache: KV of all that the rows have read.

        Returns:
            Shape: (rows, vocabulary)
        """
        cos, sin = (t[:, None] for t in self._stack.rotary_emb(embeds, positions))
        if len(masks) == 1:
            kv_heads = cache.layers[0].keys.shape[1]
            masks = [masks[0].expand(-1, kv_heads, -1, -1)] * len(self._layers)
        hidden = embeds
        for number, layer in enumerate(self._layers):
            query, key, value = layer.projected(hidden, cos, sin)
            keys, values = cache.layers[number].update(key, value)
            attended, _ = self._attend(
                layer.attention,
                query,
                keys,
                values,
                None,
                entry_masks=masks,
                scaling=layer.attention.scaling,
            )
            hidden = hidden + layer.output(attended.flatten(2))
            hidden = hidden + layer.transformed(hidden)
        logits: Tensor = self._head(self._norm(hidden))
        return logits[:, -1]


class _Layer:
    """A decoder layer's operations on one token per row.

    Modules are called through `forward`: what torch does before it takes longer than some of them.
    """

    def __init__(self, layer: Any, weights: str | None) -> None:
        self.attention = layer.self_attn
        projections = (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        norms = (getattr(self.attention, name, None) for name in ("q_norm", "k_norm", "v_norm"))
        self._projections = [
            (_linear(projection, weights), _norm(norm) if norm else None)
            for projection, norm in zip(projections, norms, strict=True)
        ]
        self._head_dim = self.attention.head_dim
        self._before = _norm(layer.input_layernorm)
        self._between = _norm(layer.post_attention_layernorm)
        matrices = (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        self._mlp = [_linear(matrix, weights) for matrix in matrices]
        self._activation = layer.mlp.act_fn.forward
        self.output = _linear(self.attention.o_proj, weights)

    def projected(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values. Shape of each: (rows, heads, 1, head_dim)."""
        normed = self._before(hidden)
        shape = (len(hidden), -1, 1, self._head_dim)
        projected = []
        for project, norm in self._projections:
            heads = project(normed).view(shape)
            projected.append(norm(heads) if norm else heads)
        query, key, value = projected
        both = torch.cat([query, key], dim=1)
        first, second = both.chunk(2, dim=-1)
        both = both * cos + torch.cat([-second, first], dim=-1) * sin
        return both[:, : query.shape[1]], both[:, query.shape[1] :], value

    def transformed(self, hidden: Tensor) -> Tensor:
        """What the MLP adds. Shape: (rows, 1, hidden)."""
        gate, up, down = self._mlp
        normed = self._between(hidden)
        output: Tensor = down(self._activation(gate(normed)) * up(normed))
        return output


def _linear(module: Any, weights: str | None) -> Callable[[Tensor], Tensor]:
    """A linear map, without adapters."""
    plain = getattr(module, "base_layer", module)
    if weights is not None:
        return quantized.packed(plain, weights)
    forward: Callable[[Tensor], Tensor] = plain.forward
    return forward


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """An RMS norm, by torch's one operation in place of transformers' seven."""
    weight, epsilon = module.weight, module.variance_epsilon
    return lambda hidden: functional.rms_norm(hidden, weight.shape, weight, epsilon)
