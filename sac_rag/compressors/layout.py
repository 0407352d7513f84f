"""Layout: encoder inputs, positions, attention and anchors of one segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Encoder inputs of one segment and the slots that are kept, as a method lays them out.

    Attributes:
        embeds: Encoder inputs. Shape: (slots, hidden)
        positions: RoPE index of each slot, counted from the segment's first token.
            Shape: (slots,)
        attends_to: Whether a slot (row) attends to a slot (column), bool. Shape: (slots, slots)
        anchors: The slots whose KV is kept.
            Shape: (anchors,), or (layers, kv_heads, anchors) where heads keep different ones.
    """

    embeds: Tensor
    positions: Tensor
    attends_to: Tensor
    anchors: Tensor


def causal(num_slots: int, device: torch.device) -> Tensor:
    """Each slot attends to itself and to the slots before it. Shape: (slots, slots)."""
    return torch.ones(num_slots, num_slots, dtype=torch.bool, device=device).tril()


def after_sink(layout: Layout, sink_embeds: Tensor) -> Layout:
    """Puts a sink before a segment: it attends to itself only, and every slot attends to it.

    Positions of the sink are below those of the segment, which are still counted from 0.

    Args:
        layout: A method's layout of one segment.
        sink_embeds: Shape: (sink, hidden)
    """
    sink, slots = len(sink_embeds), len(layout.embeds)
    device = layout.attends_to.device
    first = int(layout.positions[0])
    attends_to = torch.ones(sink + slots, sink + slots, dtype=torch.bool, device=device)
    attends_to[:sink] = causal(sink + slots, device)[:sink]
    attends_to[sink:, sink:] = layout.attends_to
    return Layout(
        embeds=torch.cat([sink_embeds, layout.embeds]),
        positions=torch.cat([torch.arange(first - sink, first, device=device), layout.positions]),
        attends_to=attends_to,
        anchors=layout.anchors + sink,
    )


def collate(layouts: list[Layout]) -> tuple[Tensor, Tensor, Tensor]:
    """Pads layouts on the right into one batch in which no slot attends to a pad.

    Returns:
        Embeddings, positions and attention mask (True = attend).
        Shapes: (batch, slots, hidden), (batch, slots), (batch, 1, slots, slots)
    """
    first = layouts[0].embeds
    rows, slots = len(layouts), max(len(layout.embeds) for layout in layouts)
    embeds = first.new_zeros(rows, slots, first.shape[1])
    positions = torch.zeros(rows, slots, dtype=torch.long, device=first.device)
    # A pad attends to itself: attention over nothing would be NaN, which spreads even at weight 0.
    mask = torch.eye(slots, dtype=torch.bool, device=first.device).repeat(rows, 1, 1, 1)
    for row, layout in enumerate(layouts):
        n = len(layout.embeds)
        embeds[row, :n] = layout.embeds
        positions[row, :n] = layout.positions
        mask[row, 0, :n, :n] = layout.attends_to
    return embeds, positions, mask
