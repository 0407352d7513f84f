"""Plots of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("matplotlib") is None:
    raise ImportError("sac_rag.training needs the 'train' extra: pip install 'sac-rag[train]'")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sac_rag.whole_file import whole_file


def draw_curves(history: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Writes a PNG with the loss of each step by ratio, and the accuracy with right and wrong text.

    Args:
        history: "steps" and "validations" of `sac_rag.training.trainer`.
        path: The file.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    ratios = sorted({entry["ratio"] for kind in history.values() for entry in kind})
    for number, ratio in enumerate(ratios):
        colour = f"C{number}"
        steps = [entry for entry in history["steps"] if entry["ratio"] == ratio]
        at, loss = [entry["step"] for entry in steps], [entry["loss"] for entry in steps]
        losses.plot(at, loss, ".", color=colour, alpha=0.15, markersize=3)
        losses.plot(at, _smoothed(loss), color=colour, label=f"{ratio}x")
        validations = [entry for entry in history["validations"] if entry["ratio"] == ratio]
        at = [entry["step"] for entry in validations]
        accuracies.plot(
            at, [e["accuracy"] for e in validations], "o-", color=colour, label=f"{ratio}x"
        )
        accuracies.plot(
            at, [e["wrong_accuracy"] for e in validations], "x:", color=colour, alpha=0.6
        )
    losses.set(xlabel="step", ylabel="loss, nats per token", title="training")
    accuracies.set(
        xlabel="step",
        ylabel="share of the answers' tokens right",
        title="held-out questions (dotted: with a wrong text)",
    )
    for axes in (losses, accuracies):
        if axes.has_data():
            axes.legend(title="ratio", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=120, format="png")


def _smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average with bias correction."""
    mean, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed
