"""Encoders: variants of a model's decoder stack that compute only keys and values.

They share all weights with the model except those they replace, and do not change the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import nn


def without_last_mlp(stack: Any) -> Any:
    """A decoder stack without the MLP of its last layer: its KV cache has the same bits.

    Other outputs of the stack have no meaning. A stack whose parts have other names than `layers`
    and `mlp` is returned unchanged.
    """
    layers: Any = getattr(stack, "layers", ())
    if not len(layers) or not isinstance(getattr(layers[-1], "mlp", None), nn.Module):
        return stack
    return _replaced(stack, {f"layers.{len(layers) - 1}.mlp": nn.Identity()})


@torch.no_grad()
def merged(stack: Any, adapter: str) -> Any:
    """A decoder stack with LoRA merged into copies of its weights: as fast as without LoRA.

    LoRA is added in float32, then rounded to the model's dtype. The stack must run with the model's
    adapters off; later changes of the LoRA have no effect on it.

    Args:
        stack: A decoder stack with peft's LoRA modules.
        adapter: Name of the adapter to merge.
    """
    linears: dict[str, nn.Module] = {}
    for path, module in stack.named_modules():
        if adapter in getattr(module, "lora_A", ()):
            base = module.get_base_layer()
            weight = base.weight.float() + module.get_delta_weight(adapter).float()
            linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
            linear.bias = base.bias
            linears[path] = linear
    return _replaced(stack, linears)


def _replaced(module: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a module with submodules replaced by path; everything off these paths is shared."""
    inside: dict[str, dict[str, nn.Module]] = {}
    twin = copy(module)
    twin._modules = dict(module._modules)
    for path, replacement in replacements.items():
        name, _, rest = path.partition(".")
        if rest:
            inside.setdefault(name, {})[rest] = replacement
        else:
            twin._modules[name] = replacement
    for name, further in inside.items():
        twin._modules[name] = _replaced(module.get_submodule(name), further)
    return twin
