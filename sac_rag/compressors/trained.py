"""TrainedCompressor: what trained compressors have in common, LoRA and a cue."""

from __future__ import annotations

from uuid import uuid4

from torch import Tensor, nn

from sac_rag.compressors.base import Compressor
from sac_rag.lm.adapters import AdapterName


class TrainedCompressor(Compressor):
    """A compressor whose encoder is the generator with LoRA on.

    Untrained, LoRA is zero and the cue is the mean of all embeddings, like no particular token's.
    """

    def _add_cue_and_lora(self) -> None:
        """Adds them behind a method's own weights: an optimizer's state goes by their order."""
        config = self.config
        if config.cue:
            embeddings: Tensor = self.generator.model.get_input_embeddings().weight
            self.cue = nn.Parameter(embeddings.float().mean(dim=0))
            self.weights["cue"] = self.cue
        if config.lora_targets:
            self._adapter, weights = self._add_lora(config.lora_rank)
            self.weights |= weights
        if config.generator_adapter_rank:
            self.generator_adapter, weights = self._add_lora(config.generator_adapter_rank)
            self.weights |= {f"generator_adapter.{n}": weight for n, weight in weights.items()}

    def _add_lora(self, rank: int) -> tuple[str, dict[str, Tensor]]:
        """Adds LoRA of a rank to the generator; returns the adapter's name and weights."""
        from peft import LoraConfig  # takes a second to import: only where LoRA is used

        config, name = self.config, AdapterName(f"sac_{uuid4().hex}")
        lora = LoraConfig(
            r=rank,
            lora_alpha=config.lora_alpha * rank / config.lora_rank,
            target_modules=list(config.lora_targets),
            lora_dropout=0.0,
            bias="none",
        )
        return name, dict(self.generator.add_adapter(name, lora))
