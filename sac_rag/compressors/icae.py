"""ICAE, the in-context autoencoder (arXiv 2307.06945)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sac_rag.compressors.layout import Layout, causal
from sac_rag.compressors.memory import MemoryCompressor
from sac_rag.kv import AnchorKV


class ICAE(MemoryCompressor):
    """Keeps the last hidden states of memory slots, as the frozen LM reads them for embeddings.

    The frozen LM reads the slots of each segment by themselves, behind the sink, so that their keys
    and values can be stored and moved. In the original it reads those of all segments together,
    behind the prompt's beginning: for a prompt of several chunks this is an approximation, for a
    single one behind the sink it is the same.
    """

    method: ClassVar[str] = "icae"

    def encode(self, segments: Sequence[Tensor], starts: Sequence[int]) -> list[AnchorKV]:
        """Two passes: the encoder over text and slots, the frozen LM over the slots' states."""
        layouts = [self.layout(tokens) for tokens in segments]
        states = self._hidden_states(layouts, starts)
        memories = [self._memory(*pair) for pair in zip(layouts, states, strict=True)]
        with self.generator.running():
            return self.read(self.generator.encoder, memories, starts, list(map(len, segments)))

    def _hidden_states(self, layouts: Sequence[Layout], starts: Sequence[int]) -> Sequence[Tensor]:
        """The encoder's last hidden states. Shape of each: (slots, hidden)."""
        embeds, positions, mask, sink = self.collated(layouts, starts)
        with self.generator.running(self._adapter) as model:
            hidden: Tensor = model.base_model(
                inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
        return hidden[:, sink:].unbind(0)

    def _memory(self, layout: Layout, states: Tensor) -> Layout:
        """The slots of a segment as a layout of their own."""
        slots = layout.anchors
        return Layout(
            embeds=states[slots],
            positions=layout.positions[slots],
            attends_to=causal(len(slots), slots.device),
            anchors=torch.arange(len(slots), device=slots.device),
        )
