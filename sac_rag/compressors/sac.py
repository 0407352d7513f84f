"""SAC, Semantic-Anchor Compression (arXiv 2510.08907). Knows nothing of how it is trained."""

from __future__ import annotations

from typing import ClassVar
from uuid import uuid4

import torch
from torch import Tensor, nn

from sac_rag.anchors import strided_anchors
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.layout import Layout, causal
from sac_rag.generator import Generator


class SAC(Compressor):
    """Anchors are the chunk's own tokens, marked by a learned embedding and free to look ahead.

    Without trained weights LoRA and mark start at nothing, and what is left is the frozen LM's own
    KV of every `ratio`-th token: a starting point for training, not yet a compressor.
    """

    method: ClassVar[str] = "sac"

    def __init__(self, generator: Generator, config: CompressorConfig) -> None:
        """Adds untrained LoRA to the generator's model, switched off outside of encoding."""
        super().__init__(generator, config)
        hidden, device = generator.hidden_size, generator.device
        # Float32: small steps of training would be lost in bfloat16.
        self.anchor_embedding = nn.Parameter(torch.zeros(hidden, device=device))
        self.weights["anchor_embedding"] = self.anchor_embedding
        if config.cue:
            self.cue = nn.Parameter(self._untrained_cue())
            self.weights["cue"] = self.cue
        if config.lora_targets:
            from peft import LoraConfig  # a second of imports that only LoRA is worth

            self._adapter = f"sac_{uuid4().hex}"
            lora = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules=list(config.lora_targets),
                lora_dropout=0.0,
                bias="none",
            )
            self.weights |= dict(generator.add_adapter(self._adapter, lora))

    def layout(self, tokens: Tensor) -> Layout:
        """Marks every ratio-th token as an anchor. Shape of `tokens`: (tokens,)."""
        anchors = strided_anchors(len(tokens), self.config.ratio).to(tokens.device)
        is_anchor = torch.zeros(len(tokens), 1, device=tokens.device).index_fill_(0, anchors, 1)
        embeds = self.generator.embed(tokens)
        sees = causal(len(tokens), tokens.device)
        if self.config.attention == "full":
            sees[:] = True
        elif self.config.attention == "anchors":
            sees[anchors] = True
        return Layout(
            embeds=embeds + (is_anchor * self.anchor_embedding).to(embeds.dtype),
            positions=torch.arange(len(tokens), device=tokens.device),
            sees=sees,
            kept=anchors,
        )

    def _untrained_cue(self) -> Tensor:
        # The mean of all embeddings: a word that says nothing in particular.
        mean: Tensor = self.generator.model.get_input_embeddings().weight.float().mean(dim=0)
        return mean
