"""Layout, what one segment looks like to the encoder. Knows nothing of models or batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """What a compression method decides about one segment.

    Attributes:
        embeds: Encoder inputs. Shape: (slots, hidden)
        positions: RoPE index of each slot, counted from the segment's first token.
            Shape: (slots,)
        sees: Which slots (columns) each slot (row) attends to, bool. Shape: (slots, slots)
        kept: The slots whose KV is handed over: the anchors.
            Shape: (anchors,), or (layers, kv_heads, anchors) where heads keep different ones
    """

    embeds: Tensor
    positions: Tensor
    sees: Tensor
    kept: Tensor


def causal(num_slots: int, device: torch.device) -> Tensor:
    """Every slot sees itself and what stands before it. Shape: (slots, slots)."""
    return torch.ones(num_slots, num_slots, dtype=torch.bool, device=device).tril()


def after_sink(layout: Layout, sink_embeds: Tensor) -> Layout:
    """Puts a sink in front: its slots see only themselves, every slot of the segment sees them.

    Positions of the sink are negative, so the segment's own count from 0 stays.

    Args:
        layout: A method's layout of one segment.
        sink_embeds: Shape: (sink, hidden)
    """
    sink, slots = len(sink_embeds), len(layout.embeds)
    device = layout.sees.device
    sees = torch.ones(sink + slots, sink + slots, dtype=torch.bool, device=device)
    sees[:sink] = causal(sink + slots, device)[:sink]
    sees[sink:, sink:] = layout.sees
    return Layout(
        embeds=torch.cat([sink_embeds, layout.embeds]),
        positions=torch.cat([torch.arange(-sink, 0, device=device), layout.positions]),
        sees=sees,
        kept=layout.kept + sink,
    )


def collate(layouts: list[Layout]) -> tuple[Tensor, Tensor, Tensor]:
    """Pads layouts on the right into one batch in which no slot sees a pad.

    Returns:
        embeds, Shape: (batch, slots, hidden); positions, Shape: (batch, slots);
        mask, True = attend, Shape: (batch, 1, slots, slots)
    """
    first = layouts[0].embeds
    rows, slots = len(layouts), max(len(layout.embeds) for layout in layouts)
    embeds = first.new_zeros(rows, slots, first.shape[1])
    positions = torch.zeros(rows, slots, dtype=torch.long, device=first.device)
    # A pad sees itself: attention over nothing would be NaN, and NaN spreads even at weight 0.
    mask = torch.eye(slots, dtype=torch.bool, device=first.device).repeat(rows, 1, 1, 1)
    for row, layout in enumerate(layouts):
        n = len(layout.embeds)
        embeds[row, :n] = layout.embeds
        positions[row, :n] = layout.positions
        mask[row, 0, :n, :n] = layout.sees
    return embeds, positions, mask
