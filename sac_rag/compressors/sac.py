"""SAC, Semantic-Anchor Compression (arXiv 2510.08907)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sac_rag.compressors.anchor_selection import (
    Scorer,
    attention_when_read_again,
    num_anchors,
    random_anchors,
    strided_anchors,
    surprisal,
    token_features,
    top_anchors,
)
from sac_rag.compressors.budget import heads_together, joint_order, ranked_entries
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.layout import Layout, causal
from sac_rag.compressors.trained import TrainedCompressor
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator

# Added to a score per token of distance from the start. In the first layer equal tokens have equal
# keys and values, hence scores that differ by rounding only; this term decides between them, and
# over a whole segment it is small beside the differences of other scores.
_TIE_BREAK = 1e-5


class SAC(TrainedCompressor):
    """Anchors are tokens of the chunk: marked, attending to later ones, or chosen for each head.

    Untrained, the anchor embedding, LoRA and the scorer are zero, and the KV is the frozen LM's: a
    starting point for training.
    """

    method: ClassVar[str] = "sac"

    def __init__(self, generator: Generator, config: CompressorConfig) -> None:
        """Adds untrained LoRA to the model of the generator, switched off outside of encoding."""
        super().__init__(generator, config)
        layers, kv_heads, head_dim = generator.kv_shape
        hidden, device = generator.hidden_size, generator.device
        # Float32: small steps of training would be lost in bfloat16.
        if config.anchor_embedding != "none":
            slots = num_anchors(config.segment_tokens, config.ratio)
            shape = (hidden,) if config.anchor_embedding == "shared" else (slots, hidden)
            self.anchor_embedding = nn.Parameter(torch.zeros(shape, device=device))
            self.weights["anchor_embedding"] = self.anchor_embedding
        if config.anchors == "learned":
            features = 2 * kv_heads * head_dim
            self.scorer = Scorer(layers, kv_heads, features, config.scorer_width).to(device)
            self.weights |= self.scorer.named_weights()
            if config.budget != "uniform":
                # Before it is fitted, all heads pay the same attention to a text.
                self.weights["budget"] = torch.zeros(layers, kv_heads, device=device)
            self.fitted = frozenset(self.weights) - {"anchor_embedding"}
        self._add_cue_and_lora()

    def at_ratio(self, ratio: int) -> SAC:
        """The same weights at another ratio; refused where each slot has its own vector."""
        if self.config.anchor_embedding == "slot" and ratio != self.config.ratio:
            raise ValueError(
                f"anchor_embedding='slot' has one vector per anchor at ratio "
                f"{self.config.ratio} and none for ratio {ratio}; train with 'shared' or 'none'"
            )
        return super().at_ratio(ratio)

    def layout(self, tokens: Tensor) -> Layout:
        """Marks the anchors, if they are chosen before reading. Shape of `tokens`: (tokens,)."""
        config, count = self.config, len(tokens)
        embeds = self.generator.embed(tokens)
        attends_to = causal(count, tokens.device)
        if config.attention == "full":
            attends_to[:] = True
        anchors = self._anchors(tokens)
        if anchors.ndim == 1:
            if config.attention == "anchors":
                attends_to[anchors] = True
            if config.anchor_embedding != "none":
                marks: Tensor = self.anchor_embedding
                if config.anchor_embedding == "slot":
                    marks = marks[: len(anchors)]
                marked = embeds.new_zeros(embeds.shape, dtype=marks.dtype)
                marked = marked.index_add(0, anchors, marks.expand(len(anchors), -1))
                embeds = embeds + marked.to(embeds.dtype)
        return Layout(
            embeds=embeds,
            positions=torch.arange(count, device=tokens.device),
            attends_to=attends_to,
            anchors=anchors,
        )

    def choose(self, layout: Layout, keys: Tensor, values: Tensor) -> Tensor:
        """With anchors="learned", the entries to which the scorer predicts the most attention."""
        if self.config.anchors != "learned":
            return super().choose(layout, keys, values)
        scores = self.scores(layout.positions, keys, values)
        return self.entries_of(scores)[: self.num_segment_entries(scores.shape[-1])]

    def entries_of(self, scores: Tensor) -> Tensor:
        """All entries of a segment, most important first.

        Args:
            scores: Predicted attention of each token. Shape: (layers, kv_heads, tokens)

        Returns:
            head * tokens + token. Shape: (layers * kv_heads * tokens,)
        """
        places = torch.arange(scores.shape[-1], device=scores.device)
        mass = self.weights.get("budget", scores.new_zeros(scores.shape[:2])).detach()
        return ranked_entries(scores + _TIE_BREAK * places, mass, self.config.budget)

    def join(self, segments: Sequence[AnchorKV]) -> AnchorKV:
        """Joins the segments of a chunk, in their joint order of importance if there is one."""
        if not self.is_nested or len(segments) == 1:
            return super().join(segments)
        layers, kv_heads, _ = self.generator.kv_shape
        tokens, entries = zip(*((kv.num_tokens, kv.num_entries) for kv in segments), strict=True)
        step = heads_together(self.config.budget, layers, kv_heads)
        order = joint_order(tokens, entries, layers * kv_heads, step)
        return AnchorKV.join(segments, order.to(segments[0].heads.device))

    def scores(self, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Predicted attention of each token, from the keys and values of all tokens.

        Args:
            positions: Positions for which the keys are rotated. Shape: (tokens,)
            keys: Shape: (layers, kv_heads, tokens, head_dim)
            values: Shape: (layers, kv_heads, tokens, head_dim)

        Returns:
            Shape: (layers, kv_heads, tokens)
        """
        features = token_features(positions, keys, values, self.generator.frequencies)
        scores: Tensor = self.scorer(features)
        return scores

    def _anchors(self, tokens: Tensor) -> Tensor:
        """Anchors chosen before reading; all tokens where they are chosen after it."""
        config, count = self.config, len(tokens)
        if config.anchors == "uniform":
            return strided_anchors(count, config.ratio).to(tokens.device)
        if config.anchors == "random":
            return random_anchors(tokens, config.ratio).to(tokens.device)
        if config.anchors == "learned":
            return torch.arange(count, device=tokens.device)
        measure = {"surprisal": surprisal, "attention": attention_when_read_again}[config.anchors]
        return top_anchors(measure(self.generator, self._sink_ids, tokens), config.ratio)
