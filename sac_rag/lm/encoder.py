"""The decoder stack as far as keys and values need it. Knows nothing of chunks or anchors.

Stacks made here share every weight with the model they are made of but for those they replace, and
change nothing in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import nn


def without_last_mlp(stack: Any) -> Any:
    """A decoder stack whose last layer ends with its attention: its cache has the same bits.

    What the stack returns besides the cache means nothing. A stack that does not call its parts
    `layers` and `mlp` is left whole.
    """
    layers: Any = getattr(stack, "layers", ())
    if not len(layers) or not isinstance(getattr(layers[-1], "mlp", None), nn.Module):
        return stack
    return _replaced(stack, {f"layers.{len(layers) - 1}.mlp": nn.Identity()})


@torch.no_grad()
def merged(stack: Any, adapter: str) -> Any:
    """A decoder stack with LoRA added to weights of its own: no more work than without LoRA.

    Adding is done in float32, then rounded to the model's dtype. To run it, switch off the adapters
    of the model; what becomes of the LoRA afterwards is not seen.

    Args:
        stack: With peft's LoRA modules in it.
        adapter: Which of their adapters to add.
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
    """A module with others in some places, by path; everything off those paths is shared."""
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
