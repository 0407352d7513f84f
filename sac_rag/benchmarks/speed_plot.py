"""Plots of times side by side."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if find_spec("matplotlib") is None:
    raise ImportError("plots need the 'eval' extra: pip install 'sac-rag[eval]'")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sac_rag.whole_file import whole_file

if TYPE_CHECKING:
    from sac_rag.benchmarks.side_by_side import SpeedRow


def draw(rows: Sequence[SpeedRow], path: Path) -> None:
    """Writes a PNG with the first token's and the longest answer's time over the chunks.

    Bars reach from the fastest to the slowest measurement.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    longest = max(row.answer_tokens for row in rows)
    shown = [row for row in rows if row.answer_tokens == longest and row.skipped is None]
    titles = ("first token", f"answer of {longest} tokens")
    for axes, kind, title in zip(
        figure.subplots(1, 2), ("first_token", "answer"), titles, strict=True
    ):
        for number, name in enumerate(dict.fromkeys(row.name for row in shown)):
            line = [(row.k, getattr(row, kind)) for row in shown if row.name == name]
            ks, times = zip(*line, strict=True)
            medians = [each.median for each in times]
            spread = [
                [each.median - each.best for each in times],
                [max(each.seconds) - each.median for each in times],
            ]
            axes.errorbar(
                ks, medians, yerr=spread, fmt="o-", color=f"C{number % 10}", label=name,
                capsize=2, markersize=4, alpha=0.6 if number >= 10 else 1.0,
            )  # fmt: skip
        axes.set(title=title, xlabel="chunks", ylabel="seconds", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=6)
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
