"""Digests of models, tensors, tokenizers and JSON values."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


def weights_digest(model: nn.Module) -> str:
    """Digest of names, dtypes, shapes and bits of all weights, in the dtype they were loaded in."""

    def digest(named: tuple[str, Tensor]) -> bytes:
        name, weight = named
        bits = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        header = f"{name} {weight.dtype} {tuple(weight.shape)}\0".encode()
        return hashlib.sha256(header + hashlib.sha256(bits.data).digest()).digest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(digest, sorted(model.named_parameters())))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes and values of tensors, independent of their dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        bits = tensor.detach().cpu().float().contiguous().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}\0".encode() + bits.tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what turns text into tokens, without the last call's padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_json([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    description = backend.to_str()
    # Truncation and padding, state of the last call, are at the start of the JSON. Parsing its
    # megabytes to drop them would add half a second to every start.
    _, separator, lasting = description.partition('"added_tokens"')
    return hashlib.sha256((lasting if separator else description).encode()).hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
