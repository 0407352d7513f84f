"""Digests of models and tokenizers. Knows nothing of what they are used for."""

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
    """Digest of names, shapes and values of tensors, the same in whatever dtype they are kept."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        bits = tensor.detach().cpu().float().contiguous().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}\0".encode() + bits.tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what turns text into tokens: not of the last call's padding or truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_json([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    description = backend.to_str()
    # Truncation and padding, state of the last call, stand in front of everything else. Parsing
    # megabytes of JSON to leave them out would take half a second of every start.
    _, found, lasting = description.partition('"added_tokens"')
    return hashlib.sha256((lasting if found else description).encode()).hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON value, the same for equal values whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
