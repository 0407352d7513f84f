"""Origin: what made stored KV, with all that answering from it needs."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.lm.digests import digest_json, tensors_digest
from sac_rag.prompts.format import PromptFormat


@dataclass(frozen=True, eq=False)
class Origin:
    """A compressor without the weights that only compressing needs: all of them except the cue.

    Attributes:
        fields: Fingerprint fields of the compressor.
        config: Config of the compressor.
        cue: Cue of the compressor, if it has one. Shape: (hidden,)
        prompt_format: Format of the prompts that the chunks are for, if it is known.

    Raises:
        ValueError: if config or cue contradict the fields, or if prompts with the anchors need a
            generator adapter, which only the compressor has.
    """

    fields: Mapping[str, str]
    config: CompressorConfig
    cue: Tensor | None = None
    prompt_format: PromptFormat | None = None

    def __post_init__(self) -> None:
        recorded = {name: v for name, v in self.fields.items() if name.startswith("config.")}
        actual = self.config.fingerprint_fields()
        names = recorded.keys() | actual.keys()
        mismatches = sorted(name for name in names if recorded.get(name) != actual.get(name))
        if mismatches:
            raise ValueError(f"the config is not the fingerprint's: {', '.join(mismatches)} differ")
        if self.config.generator_adapter_rank:
            raise ValueError(
                "chunks of a compressor with a generator adapter (rank "
                f"{self.config.generator_adapter_rank}) can only be answered from with that "
                "adapter: load the compressor itself"
            )
        if self.config.cue != (self.cue is not None):
            raise ValueError(
                f"the config has cue={self.config.cue}, but "
                f"{'no cue was' if self.cue is None else 'a cue was'} given"
            )

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the compressor."""
        return digest_json(dict(self.fields))

    @classmethod
    def of(cls, compressor: Compressor, prompt_format: PromptFormat | None = None) -> Origin:
        """The origin of chunks that a loaded compressor makes."""
        fields, cue = compressor.fingerprint_fields(), compressor.cue
        return cls(fields, compressor.config, None if cue is None else cue.detach(), prompt_format)

    @classmethod
    def from_folder(cls, fields: Mapping[str, str], folder: Path | None) -> Origin:
        """Combines the fields that a store has recorded with a compressor's folder.

        Loads no model.

        Args:
            fields: Fingerprint fields as a store records them.
            folder: Folder of the compressor; None for one without weights. Where the fields hold
                for every ratio, the ratio is the folder's.

        Raises:
            ValueError: if the folder is not that of the compressor with this fingerprint.
        """
        values = {
            name.removeprefix("config."): ast.literal_eval(value)
            for name, value in fields.items()
            if name.startswith("config.")
        }
        config = CompressorConfig.from_json(json.dumps(values))
        weights: dict[str, Tensor] = {}
        if folder is not None:
            loaded, weights = checkpoint.read(folder)
            if config.is_nested:  # then the fields hold for every ratio
                config = replace(config, ratio=loaded.ratio)
        if tensors_digest(weights) != fields.get("compressor_weights"):
            raise ValueError(
                f"the chunks were compressed by {config.method!r} with other weights than "
                f"{'none' if folder is None else f'those in {folder}'}; "
                "give the folder of the compressor they were compressed with"
            )
        prompt_format = checkpoint.load_prompt_format(folder) if folder is not None else None
        return cls(fields, config, weights.get("cue"), prompt_format)

    def to_dict(self) -> dict[str, Any]:
        """All fields except the cue as JSON values."""
        return {
            "fingerprint": self.fingerprint,
            "fields": dict(self.fields),
            "config": self.config.to_dict(),
            "prompt_format": None
            if self.prompt_format is None
            else json.loads(self.prompt_format.to_json()),
        }

    @classmethod
    def from_dict(cls, about: Mapping[str, Any], cue: Tensor | None) -> Origin:
        """Reads the result of `to_dict`.

        Raises:
            ValueError: if it contradicts itself, or has fields unknown to this version.
            KeyError, TypeError: if it has another structure.
        """
        text = about["prompt_format"]
        origin = cls(
            fields=dict(about["fields"]),
            config=CompressorConfig.from_json(json.dumps(about["config"])),
            cue=cue,
            prompt_format=None if text is None else PromptFormat.from_json(json.dumps(text)),
        )
        if about["fingerprint"] != origin.fingerprint:
            raise ValueError("the fingerprint is not that of the fields given for it")
        return origin
