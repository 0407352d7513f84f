"""Files of a compressor, in a folder and on the Hugging Face Hub.

config.json              everything besides the weights that determines its KV
compressor.safetensors   its trained weights
format.json              format of the prompts it was trained for, if it was trained for one
README.md                model card; written only where there is none
"""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import Self

from sac_rag.compressors.config import CompressorConfig
from sac_rag.default_models import is_hub_id
from sac_rag.prompts.format import PromptFormat
from sac_rag.whole_file import whole_file

if TYPE_CHECKING:
    from sac_rag.lm.generator import Generator

CONFIG, WEIGHTS = "config.json", "compressor.safetensors"
FORMAT, CARD = "format.json", "README.md"

# The class of each method; a new method is added here. Those of the package are given by name,
# since their modules import this one.
METHODS: dict[str, Any] = {
    "sac": "sac_rag.compressors.sac:SAC",
    "full": "sac_rag.compressors.full:Full",
    "icae": "sac_rag.compressors.icae:ICAE",
    "x500": "sac_rag.compressors.x500:X500",
}

_CARD = """\
---
library_name: sac-rag
tags:
- context-compression
- rag
{base_model}---

# Compressor for {model}

Compresses retrieved chunks of text to the KV of a few anchor tokens, for
sac-rag: method `{method}`, anchors `{anchors}`, {ratio} source tokens per anchor.

```python
from sac_rag import SacRAG

rag = SacRAG.from_pretrained("{model}", compressor="{name}")
```
"""


class Pretrained:
    """Saving, loading and sharing of compressors, with the verbs of the Hugging Face libraries."""

    config: CompressorConfig
    weights: dict[str, Tensor]
    prompt_format: PromptFormat | None
    generator: Generator

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        prompt_format: PromptFormat | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Writes config, weights, prompt format and card; each file appears whole or not at all.

        Args:
            folder: Created if it does not exist; the files of another compressor are replaced.
            prompt_format: Format of the prompts it was trained for. Default: `self.prompt_format`.
            dtype: Of the weights in the file: float32 to resume training, float16 to distribute.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().to("cpu", dtype).contiguous()
            for name, tensor in self.weights.items()
        }
        prompt_format = prompt_format or self.prompt_format
        texts = {CONFIG: self.config.to_json()}
        if prompt_format is None:
            (folder / FORMAT).unlink(missing_ok=True)
        else:
            texts[FORMAT] = prompt_format.to_json()
        if not (folder / CARD).exists():
            texts[CARD] = self._card(folder.name)
        with ExitStack() as drafts:
            # All are written before the first takes its place: the weights, then what names them.
            draft = {
                name: drafts.enter_context(whole_file(folder / name))
                for name in (*reversed(texts), WEIGHTS)
            }
            save_file(tensors, draft[WEIGHTS])
            for name, text in texts.items():
                draft[name].write_text(text, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str = "Upload compressor",
        create_pr: bool = False,
        prompt_format: PromptFormat | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> str:
        """Uploads the files of `save_pretrained` in one commit; a card that is there stays.

        Args:
            repo_id: For example "user/compressor"; the repository is created if need be.
            revision: Branch, created if need be. Default: "main".
            token: Access token. Default: that of `hf auth login` or HF_TOKEN.
            private: Whether a new repository is private. Default: the account's.
            commit_message: Of the commit.
            create_pr: Whether the commit is opened as a pull request.
            prompt_format: As for `save_pretrained`.
            dtype: As for `save_pretrained`.

        Returns:
            URL of the commit.

        Raises:
            OSError: if the Hub cannot be reached or refuses (huggingface_hub's HfHubHTTPError), or
                is switched off with HF_HUB_OFFLINE.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id
            self.save_pretrained(folder, prompt_format=prompt_format, dtype=dtype)
            (folder / CARD).write_text(self._card(repo_id), encoding="utf-8")
            if api.file_exists(repo_id, CARD, revision=revision):
                (folder / CARD).unlink()
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
                delete_patterns=[FORMAT],  # of another compressor; unless it is uploaded now
            )
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        generator: Generator,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **changes: Any,
    ) -> Self:
        """Loads a compressor from a folder or from the Hub.

        Args:
            name: A folder, or the id of a repository on the Hub, for example "user/compressor". A
                folder of that name takes precedence.
            generator: The model that it was trained for.
            revision: Branch, tag or commit of the repository. Default: "main".
            token: Access token. Default: that of `hf auth login` or HF_TOKEN.
            cache_dir: Folder of downloads. Default: that of huggingface_hub.
            local_files_only: Whether only earlier downloads are used, as with HF_HUB_OFFLINE.
            **changes: Fields of the config to change, for example ratio=15.

        Raises:
            ValueError: if it is neither a compressor's folder nor a repository that can be
                downloaded, is another method than the class, or does not fit the generator.
        """
        folder = pretrained_folder(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config, weights = read(folder)
        method = method_class(config.method)
        if not issubclass(method, cls):
            raise ValueError(
                f"{name} is a compressor of method {config.method!r}, which is no {cls.__name__}; "
                "load it with Compressor.from_pretrained"
            )
        compressor: Self = method(generator, replace(config, **changes))
        compressor.load_weights(weights)
        compressor.prompt_format = load_prompt_format(folder)
        return compressor

    @abstractmethod
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies trained weights into the compressor."""

    def _card(self, name: str) -> str:
        """A model card. Of a local model it names only the folder, not the path."""
        source = str(self.generator.model.name_or_path)
        is_on_hub = is_hub_id(source) and not Path(source).exists()
        model = source if is_on_hub else Path(source).name or "MODEL"
        return _CARD.format(
            base_model=f"base_model: {model}\n" if is_on_hub else "",
            model=model,
            method=self.config.method,
            ratio=self.config.ratio,
            anchors=self.config.anchors,
            name=name,
        )


def method_class(name: str) -> Any:
    """The class of a compression method.

    Raises:
        ValueError: for an unknown method.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, was: {name!r}")
    entry = METHODS[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return getattr(import_module(module), attribute)
    return entry


def read(folder: str | os.PathLike[str]) -> tuple[CompressorConfig, dict[str, Tensor]]:
    """Reads config and weights, without a model.

    Raises:
        ValueError: if the folder is not a compressor's.
    """
    folder = Path(folder)
    try:
        config = CompressorConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
        return config, load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} must hold {CONFIG} and {WEIGHTS} of a compressor: {error}"
        ) from error


def load_prompt_format(folder: str | os.PathLike[str]) -> PromptFormat | None:
    """Reads the prompt format of a compressor; None if it was not trained for one.

    Raises:
        ValueError: if the file is there and is not that of a prompt format.
    """
    path = Path(folder) / FORMAT
    try:
        return PromptFormat.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a prompt format: {error}") from error


def pretrained_folder(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a compressor; a repository on the Hub is downloaded if need be.

    Only the files of a compressor are downloaded: JSON, safetensors and the card.

    Args:
        name: A folder or a hub id; a Path is always a folder.
        revision: As for `Pretrained.from_pretrained`, like the rest.
        token: See there.
        cache_dir: See there.
        local_files_only: See there.

    Raises:
        ValueError: if it is neither an existing folder nor a repository that can be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() or not isinstance(name, str) or not is_hub_id(name):
        return folder
    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS, FORMAT, CARD],
        )
    except OSError as error:  # huggingface_hub's errors, of the network and of its cache
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"a compressor must be a folder or a repository on the Hugging Face Hub, but there is "
            f"no folder {name!r}, and the repository cannot be downloaded: {reason}"
        ) from error
    return Path(snapshot)
