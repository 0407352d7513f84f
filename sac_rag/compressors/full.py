"""Full: every token is an anchor; nothing to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.layout import Layout, causal
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator


class Full(Compressor):
    """Every token is an anchor: the oracle of the tests and the upper bound of benchmarks.

    One chunk behind its real prefix gives the logits of plain reading; several chunks differ from
    plain reading only in that no chunk attends to another.
    """

    method: ClassVar[str] = "full"

    def __init__(self, generator: Generator, config: CompressorConfig) -> None:
        if config.ratio != 1 or config.cue or config.lora_targets or config.attention != "causal":
            raise ValueError(
                "full keeps every token of plain reading: its config must have ratio=1, cue=False, "
                "attention='causal' and lora_targets=(), "
                f"was: ratio={config.ratio}, cue={config.cue}, attention={config.attention!r}, "
                f"lora_targets={config.lora_targets}"
            )
        super().__init__(generator, config)

    @classmethod
    def default_config(cls, **changes: object) -> CompressorConfig:
        """The config of plain reading, with some fields changed."""
        plain = {"ratio": 1, "cue": False, "attention": "causal", "lora_targets": ()}
        return CompressorConfig(**{"method": cls.method, **plain, **changes})  # type: ignore[arg-type]

    def layout(self, tokens: Tensor) -> Layout:
        """Lays out one segment for plain reading. Shape of `tokens`: (tokens,)."""
        positions = torch.arange(len(tokens), device=tokens.device)
        return Layout(
            embeds=self.generator.embed(tokens),
            positions=positions,
            attends_to=causal(len(tokens), tokens.device),
            anchors=positions,
        )


def read_plain(generator: Generator, ids: Sequence[int]) -> AnchorKV:
    """KV of plain text at position 0, every token kept: a prefix for `assemble`."""
    config = Full.default_config(segment_tokens=len(ids), stored_dtype=generator.dtype_name)
    (kv,) = Full(generator, config).compress_tokens([ids])
    return kv
