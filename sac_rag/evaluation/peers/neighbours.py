"""Neighbours: other ways to compress KV without training, on the frozen LM and our own code.

They are SAC without any weights. None of them is a method of the package: they are here to be
measured beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sac_rag.cached import CachedCompressor
from sac_rag.compressors.anchor_selection import (
    max_received_attention,
    read_again,
    top_anchors,
)
from sac_rag.compressors.config import Anchors, CompressorConfig
from sac_rag.compressors.layout import Layout
from sac_rag.compressors.sac import SAC
from sac_rag.evaluation.peers.base import Peer
from sac_rag.evaluation.quality import answered_by
from sac_rag.evaluation.sample import Trial
from sac_rag.kv import AnchorKV
from sac_rag.lm import rope
from sac_rag.lm.digests import digest_json
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.generate import Decoding
from sac_rag.reports import Answer

# Of the mean square of an anchor's attention weights: how strongly its value stays what it was.
_RIDGE = 0.1


@dataclass(frozen=True, eq=False)
class ReadAgain(Layout):
    """A layout, and what reading the text again has shown.

    Attributes:
        received: Largest attention weight that each token received.
            Shape: (layers, kv_heads, tokens)
        attentions: Weights of the second reading. Shape of each: (1, query_heads, queries, entries)
        values: Of all its entries. Shape of each: (kv_heads, entries, head_dim)
        sink: Tokens before the text.
    """

    received: Tensor
    attentions: Sequence[Tensor]
    values: Sequence[Tensor]
    sink: int


class ReadAgainSAC(SAC):
    """Keeps the entries attended to most when the text is read again, as many for every head."""

    batch_tokens = 512  # its layouts hold attention weights of all layers

    def layout(self, tokens: Tensor) -> Layout:
        """Lays out one segment. Shape of `tokens`: (tokens,)."""
        plain, sink = super().layout(tokens), len(self.sink_ids)
        attentions, layers = read_again(self.generator, self.sink_ids, tokens)
        received = max_received_attention(attentions, self.generator.kv_shape[1])
        received = received[..., sink : sink + len(tokens)]
        parts = {f.name: getattr(plain, f.name) for f in fields(plain)}
        return ReadAgain(
            **{**parts, "anchors": top_anchors(received, self.config.ratio)},
            received=received,
            attentions=attentions,
            values=[layer.values[0] for layer in layers],
            sink=sink,
        )

    def _anchors(self, tokens: Tensor) -> Tensor:
        return torch.arange(len(tokens), device=tokens.device)  # chosen in `layout`

    def changed(self, layout: ReadAgain, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with those of the anchors changed.

        Shape of each: (layers, kv_heads, tokens, head_dim)
        """
        return keys, values

    def _read_out(
        self, layout: Layout, start: int, keys: Tensor, values: Tensor, num_tokens: int
    ) -> AnchorKV:
        if not isinstance(layout, ReadAgain):
            raise TypeError(f"expected a layout of this compressor, got: {type(layout).__name__}")
        keys, values = keys[:, :, :num_tokens], values[:, :, :num_tokens]
        keys, values = self.changed(layout, keys, values)
        return super()._read_out(layout, start, keys, values, num_tokens)


class MergedSAC(ReadAgainSAC):
    """Entries that are dropped are merged into the kept one with the most similar key.

    The idea of ZeroMerge (arXiv 2503.10714), weighted by received attention, without its correction
    of attention scores, for which an AnchorKV has no place.
    """

    def changed(self, layout: ReadAgain, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted means of keys, without their rotation, and of values."""
        frequencies, anchors = self.generator.frequencies, layout.anchors
        plain = rope.move(keys.float(), -layout.positions, frequencies)
        unit = functional.normalize(plain, dim=-1)
        nearest = (unit @ _taken(unit, anchors).transpose(2, 3)).argmax(dim=-1)
        slots = torch.arange(anchors.shape[-1], device=anchors.device)
        nearest = nearest.scatter(2, anchors, slots.expand_as(anchors))
        weights = layout.received.clamp_min(1e-9)[..., None]
        total = _summed(weights, nearest, anchors)
        means = [_summed(t.float() * weights, nearest, anchors) / total for t in (plain, values)]
        at = layout.positions[anchors]
        merged_keys = rope.move(means[0], at, frequencies)
        return _put(keys, anchors, merged_keys), _put(values, anchors, means[1])


class RefitSAC(ReadAgainSAC):
    """Values of kept entries are refitted, so that attention has the output that it had of all.

    Ridge regression on the queries of the text read again, each head by itself, the idea of GRKV
    (arXiv 2605.31105); keys and the choice of entries are unchanged.
    """

    def changed(self, layout: ReadAgain, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The same keys, and refitted values."""
        kv_heads, tokens = values.shape[1:3]
        text = torch.arange(layout.sink, layout.sink + tokens, device=values.device)
        refitted = []
        for anchors, attention, all_values in zip(
            layout.anchors, layout.attentions, layout.values, strict=True
        ):
            # Query heads that share a KV head are adjacent.
            weights = attention[0].float().reshape(kv_heads, -1, attention.shape[-1])
            refitted.append(_refit(weights, all_values.float(), text, anchors))
        return keys, _put(values, layout.anchors, torch.stack(refitted))


class NeighbourPeer(Peer):
    """A compressor without training that takes the place of SAC in the pipeline."""

    compressor_class: ClassVar[type[SAC]] = SAC
    anchors: ClassVar[Anchors] = "attention"

    def __init__(self, rag: SacRAG, ratio: int) -> None:
        super().__init__(rag, ratio)
        trained = rag.compressor.config
        config = CompressorConfig(
            ratio=ratio,
            anchors=self.anchors,
            segment_tokens=trained.segment_tokens,
            sink=trained.sink,
            heading=trained.heading,
            first_position=trained.first_position,
            attention="causal",
            anchor_embedding="none",
            cue=False,
            lora_targets=(),
            stored_dtype=rag.generator.dtype_name,  # type: ignore[arg-type]
        )
        self.compressor = self.compressor_class(rag.generator, config)
        cached = CachedCompressor(self.compressor, {}, guard=False)
        self._answer = answered_by(SacRAG(cached, prompt_format=rag.prompt_format))

    @property
    def fingerprint(self) -> str:
        """Digest of the compressor and of what this class makes of it."""
        return digest_json([self.name, self.compressor.fingerprint])

    def answer(self, trials: Sequence[Trial], decoding: Decoding) -> Sequence[Answer]:
        """Answers trials from the compressor's entries."""
        return self._answer(trials, decoding)


class RandomAnchors(NeighbourPeer):
    """Any tokens, the same for all heads: the control of every choice."""

    name: ClassVar[str] = "random-anchors"
    title: ClassVar[str] = "random anchors, untrained"
    does: ClassVar[str] = "keeps the KV of random tokens"
    anchors: ClassVar[Anchors] = "random"


class UniformAnchors(NeighbourPeer):
    """The middle token of each block: what SAC keeps in its paper, without training."""

    name: ClassVar[str] = "uniform-anchors"
    title: ClassVar[str] = "every n-th token, untrained"
    does: ClassVar[str] = "keeps the KV of the middle token of each block"
    anchors: ClassVar[Anchors] = "uniform"


class SurprisalAnchors(NeighbourPeer):
    """The tokens that LLMLingua would keep as text, as KV that has read all of the text."""

    name: ClassVar[str] = "surprisal-anchors"
    title: ClassVar[str] = "least expected tokens, untrained"
    does: ClassVar[str] = "keeps the KV of the tokens expected least (LLMLingua's choice)"
    anchors: ClassVar[Anchors] = "surprisal"


class ReadAgainAnchors(NeighbourPeer):
    """What the next two begin with."""

    name: ClassVar[str] = "read-again"
    title: ClassVar[str] = "attended to when read again, untrained"
    does: ClassVar[str] = "keeps as many entries per head, those attended to when read again"


class Merged(NeighbourPeer):
    """Dropped entries are merged into kept ones."""

    name: ClassVar[str] = "merged"
    title: ClassVar[str] = "read again, the rest merged, untrained"
    does: ClassVar[str] = "the same, dropped entries merged into similar ones (ZeroMerge's idea)"
    compressor_class: ClassVar[type[SAC]] = MergedSAC


class Refit(NeighbourPeer):
    """Values of kept entries are refitted."""

    name: ClassVar[str] = "refit"
    title: ClassVar[str] = "read again, values refitted, untrained"
    does: ClassVar[str] = "the same, values refitted by ridge regression (GRKV's idea)"
    compressor_class: ClassVar[type[SAC]] = RefitSAC


def _refit(weights: Tensor, values: Tensor, text: Tensor, anchors: Tensor) -> Tensor:
    """Values of anchors with which attention over what is left has the output of all of it.

    Args:
        weights: Attention weights over all entries. Shape: (kv_heads, queries, entries)
        values: Shape: (kv_heads, entries, head_dim)
        text: Entries of the text. Shape: (tokens,)
        anchors: Indices in the text. Shape: (kv_heads, anchors)

    Returns:
        Shape: (kv_heads, anchors, head_dim)
    """
    entries = text[anchors]  # (kv_heads, anchors)
    remaining = torch.ones_like(weights[:, 0])
    remaining[:, text] = 0
    outside = weights * remaining[:, None]
    at = entries[:, None].expand(-1, weights.shape[1], -1)
    inside = weights.gather(2, at)
    # Attention is a softmax over what is left.
    share = (outside.sum(-1, keepdim=True) + inside.sum(-1, keepdim=True)).clamp_min(1e-6)
    target = weights @ values - (outside / share) @ values
    inside = inside / share
    old = values.gather(1, entries[..., None].expand(-1, -1, values.shape[-1]))
    square = inside.transpose(1, 2) @ inside
    diagonal = square.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(_RIDGE * diagonal.mean(-1, keepdim=True).expand_as(diagonal) + 1e-9)
    refitted: Tensor = torch.linalg.solve(
        square + ridge, inside.transpose(1, 2) @ target + ridge @ old
    )
    return refitted


def _taken(tensor: Tensor, anchors: Tensor) -> Tensor:
    return tensor.gather(2, anchors[..., None].expand(-1, -1, -1, tensor.shape[-1]))


def _put(tensor: Tensor, anchors: Tensor, new: Tensor) -> Tensor:
    index = anchors[..., None].expand(-1, -1, -1, tensor.shape[-1])
    return tensor.scatter(2, index, new.to(tensor.dtype))


def _summed(parts: Tensor, slots: Tensor, anchors: Tensor) -> Tensor:
    """Sums of the parts with equal slots. Shape: (layers, kv_heads, anchors, …)."""
    sums = parts.new_zeros(*anchors.shape, parts.shape[-1])
    return sums.scatter_add(2, slots[..., None].expand_as(parts), parts)
