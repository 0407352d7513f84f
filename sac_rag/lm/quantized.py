"""Matrices of a model in fewer bits, for the generation of single tokens, which waits for memory.

They are copies: whatever reads more than a token per row (chunks, prompts) has the exact weights.
The kernels are torch's own. torchao's run slower than exact weights without torch.compile, which
needs a C++ compiler, and its 4-bit layout for CPUs is a prototype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]

_GROUP = 32  # inputs of a 4-bit row that share a scale and a minimum


def require_usable(weights: str, device: torch.device) -> None:
    """Checks that there is a kernel.

    Raises:
        ValueError: for an unknown kind of weights, or one that the device has no kernel for.
    """
    if weights not in PACKERS:
        raise ValueError(f"weights must be None or one of {', '.join(PACKERS)}, was: {weights!r}")
    if device.type != "cpu":
        raise ValueError(f"weights={weights!r} needs device='cpu', was: {device}")
    if weights == "float16" and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError("weights='float16' needs a CPU with AVX2; leave it out, or give 'int8'")


def packed(linear: Any, weights: str) -> Linear:
    """A linear map with its matrix in fewer bits, and of its dtype on both sides.

    Args:
        linear: A torch.nn.Linear.
        weights: "float16", "int8" (a scale per output) or "int4" (a scale and a minimum for each
            32 inputs of an output).

    Raises:
        ValueError: with "int4", for a number of inputs that is no multiple of 32.
    """
    product = PACKERS[weights](linear.weight.detach())
    width, bias, dtype = linear.out_features, linear.bias, linear.weight.dtype

    def forward(inputs: Tensor) -> Tensor:
        outputs = product(inputs.flatten(0, -2)).to(dtype).view(*inputs.shape[:-1], width)
        return outputs if bias is None else outputs + bias

    return forward


def _float16(weight: Tensor) -> Linear:
    matrix = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
    return lambda inputs: torch.ops.quantized.linear_dynamic_fp16(inputs.float(), matrix)


def _int8(weight: Tensor) -> Linear:
    scales = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
    matrix = (weight.float() / scales[:, None]).round().to(torch.int8)
    rounded = scales.bfloat16()
    return lambda inputs: torch._weight_int8pack_mm(inputs.bfloat16(), matrix, rounded)


def _int4(weight: Tensor) -> Linear:
    if weight.shape[1] % _GROUP:
        raise ValueError(
            f"weights='int4' needs matrices with a multiple of {_GROUP} inputs, one has "
            f"{weight.shape[1]}; give 'int8'"
        )
    groups = weight.float().reshape(len(weight), -1, _GROUP)
    least, most = groups.aminmax(dim=2)
    scales = ((most - least) / 15).clamp_min(1e-12)
    levels = ((groups - least[:, :, None]) / scales[:, :, None]).round().clamp(0, 15)
    matrix = torch._convert_weight_to_int4pack_for_cpu(levels.flatten(1).int(), 1)
    # The kernel counts levels from the eighth.
    affine = torch.stack([scales, least + 8 * scales], dim=2).transpose(0, 1).bfloat16()
    affine = affine.contiguous()
    return lambda inputs: torch._weight_int4pack_mm_for_cpu(
        inputs.bfloat16(), matrix, _GROUP, affine
    )


# Packs a matrix; returns its product with inputs. Shapes: (outputs, inputs); (rows, inputs)
PACKERS: dict[str, Callable[[Tensor], Linear]] = {
    "float16": _float16,
    "int8": _int8,
    "int4": _int4,
}
