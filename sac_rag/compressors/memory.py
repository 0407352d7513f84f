"""MemoryCompressor: methods that append learned memory embeddings to a text.

The encoder reads a text and then the memory embeddings, which attend to all of it: what they hold
is kept in place of the text. Methods differ in what is read out of them.

A text's memory slots stand at the end of the range of positions that the text takes in a prompt,
so that what follows comes right after them, as after the slots of the original methods; there is no
moving of positions that a store would not do anyway. With positions="uniform" (EPL, arXiv
2409.14364) they stand where strided anchors would, and the text keeps its own positions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from sac_rag.compressors.anchor_selection import num_anchors, strided_anchors
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.layout import Layout, causal
from sac_rag.compressors.trained import TrainedCompressor
from sac_rag.lm.generator import Generator


class MemoryCompressor(TrainedCompressor):
    """Encodes a segment followed by memory embeddings, one per `ratio` tokens.

    Untrained, memory embeddings are near the mean of all embeddings, each a little different, since
    equal ones would hold the same.
    """

    has_slots: ClassVar[bool] = True

    def __init__(self, generator: Generator, config: CompressorConfig) -> None:
        """Adds untrained LoRA to the model of the generator, switched off outside of encoding."""
        super().__init__(generator, config)
        if (
            config.anchors != "uniform"
            or config.attention != "causal"
            or config.anchor_embedding != "slot"
        ):
            raise ValueError(
                f"{self.method} keeps memory slots behind a text that is read as usual: its config "
                "must have anchors='uniform', attention='causal' and anchor_embedding='slot', was: "
                f"{config.anchors!r}, {config.attention!r} and {config.anchor_embedding!r}"
            )
        slots = num_anchors(config.segment_tokens, config.ratio)
        embeddings: Tensor = generator.model.get_input_embeddings().weight.float()
        noise = torch.Generator().manual_seed(0)
        spread = torch.randn(slots, generator.hidden_size, generator=noise).to(embeddings.device)
        self.memory = nn.Parameter(embeddings.mean(dim=0) + embeddings.std() * spread)
        self.weights["memory"] = self.memory
        self._add_cue_and_lora()

    @classmethod
    def default_config(cls, **changes: object) -> CompressorConfig:
        """The config of the method, with some fields changed."""
        fixed = {"attention": "causal", "anchor_embedding": "slot"}
        return CompressorConfig(**{"method": cls.method, **fixed, **changes})  # type: ignore[arg-type]

    def at_ratio(self, ratio: int) -> Self:
        """Refuses another ratio: memory embeddings are trained for one number of tokens each."""
        if ratio != self.config.ratio:
            raise ValueError(
                f"{self.method} has memory embeddings for ratio {self.config.ratio} only, was "
                f"asked for {ratio}; train another compressor for it"
            )
        return self

    def layout(self, tokens: Tensor) -> Layout:
        """The segment and its memory slots behind it. Shape of `tokens`: (tokens,)."""
        count, device = len(tokens), tokens.device
        at = strided_anchors(count, self.config.ratio).to(device)
        text = self.generator.embed(tokens)
        positions = torch.arange(count, device=device)
        if self.config.positions == "uniform":
            positions = torch.cat([positions, at])
        else:
            positions = torch.arange(-len(at), count, device=device)
        return Layout(
            embeds=torch.cat([text, self.memory[: len(at)].to(text.dtype)]),
            positions=positions,
            attends_to=causal(count + len(at), device),
            anchors=torch.arange(count, count + len(at), device=device),
        )
