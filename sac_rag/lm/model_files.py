"""Checks a model's files before they are loaded: what transformers reports late, or misreads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from torch import nn

from sac_rag.errors import UnsupportedModelError

_POINTER = b"version https://git-lfs"
_LENGTH = 8  # bytes of the length of a safetensors header
_TIMEOUT_S = 10.0


def require_loadable(source: str, hub: dict[str, Any]) -> None:
    """Checks a local folder's files, or that the Hub has the model.

    Raises:
        ValueError: for files that are git-lfs pointers or cut short, or a hub id that cannot be
            found.
        UnsupportedModelError: for a folder with an adapter.
    """
    folder = Path(source)
    if not folder.is_dir():
        _require_on_hub(source, hub)
        return
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{source} must be a model without adapters, has adapter_config.json; merge the "
            "adapter into the weights (peft's merge_and_unload) and save that, or delete the file"
        )
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".model") and path.is_file():
            _require_whole(path)


def _require_whole(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
        if start == _POINTER:
            raise ValueError(
                f"{path} is a git-lfs pointer in place of the file; fetch it: git lfs pull"
            )
        if path.suffix != ".safetensors":
            return
        length = int.from_bytes(start[:_LENGTH], "little")
        expected = _LENGTH + length
        if expected <= size:
            file.seek(_LENGTH)
            try:
                header = json.loads(file.read(length))
                ends = (t["data_offsets"][1] for n, t in header.items() if n != "__metadata__")
                expected += max(ends, default=0)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is no safetensors file: {error}") from error
    if size != expected:
        raise ValueError(f"{path} must have {expected} bytes, has {size}; copy it again")


def _require_on_hub(name: str, hub: dict[str, Any]) -> None:
    """Asks the Hub once, unless the model is in its cache: transformers retries for long."""
    revision, cache_dir = hub["revision"], hub["cache_dir"]
    if try_to_load_from_cache(name, "config.json", cache_dir, revision):
        return
    try:
        HfApi().model_info(name, revision=revision, token=hub["token"], timeout=_TIMEOUT_S)
    except Exception as error:  # of the Hub, of the network, of its settings
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"a model must be a folder or a repository on the Hugging Face Hub, but there is no "
            f"folder {name!r}, and the repository cannot be found: {reason[0]}"
        ) from error


def read_into_memory(network: nn.Module) -> None:
    """Copies weights that are mapped from a file, which may be overwritten or cut later."""
    for parameter in network.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
