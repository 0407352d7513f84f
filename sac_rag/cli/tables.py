"""Tables of what some of `bench` measures. Knows nothing of how it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from sac_rag.cli.render import human_bytes, out

if TYPE_CHECKING:
    from sac_rag.benchmarks.dtypes import DtypeRow
    from sac_rag.benchmarks.store import LookupSpeed, ReadSpeed
    from sac_rag.evaluation.dropin import DropinResult
    from sac_rag.training.anchor_oracle import AnchorChoice
    from sac_rag.training.fit import FitFigure
    from sac_rag.training.step_speed import StepSpeed


def print_dtypes(model: str, dtype: str, rows: Sequence[DtypeRow]) -> None:
    """Stored dtypes beside float32, which holds what was computed."""
    columns = ("stored", "entry", "logits", "at most", "KL", "same answers", "F1", "change")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row.stored_dtype,
            human_bytes(round(row.entry_bytes)),
            f"{row.logit_rms:.4f}",
            f"{row.logit_max:.3f}",
            f"{row.kl:.1e}",
            f"{row.same_answers:.1%}",
            f"{row.f1:.3f}",
            f"{row.f1_change:+.3f}",
        )
    out.print(f"{model}, {dtype}, {rows[0].n} questions; logits: root mean square of errors\n")
    out.print(table)


def print_dropin(model: str, dtype: str, rows: Sequence[DropinResult]) -> None:
    """Prompts of the frameworks, a table for each number of chunks and what was attended to."""
    columns = ("framework", "prompt", "n", "F1", "gold", "words", "ended", "empty", "repeated")
    out.print(
        f"{model}, {dtype}; gold: contained in the answer; words: median; repeated: word bigrams",
        markup=False,
    )
    groups: dict[tuple[int, int], list[DropinResult]] = {}
    for row in rows:
        groups.setdefault((row.k, row.ratio or 0), []).append(row)
    # Text first, then anchors by ratio; within that as they were measured.
    for (k, ratio), group in sorted(groups.items()):
        table = Table(*columns, box=None, pad_edge=False)
        for row in group:
            table.add_row(
                row.framework,
                row.prompt,
                str(row.n),
                *("-" if score is None else f"{score:.3f}" for score in (row.f1, row.contains)),
                f"{row.words:.1f}",
                *(f"{share:.2f}" for share in (row.ended, row.empty, row.repeated)),
            )
        out.print(f"\nk={k}, {f'anchors, {ratio}x' if ratio else 'text'}\n")
        out.print(table)


def print_reads(rows: Sequence[ReadSpeed]) -> None:
    """A store beside safetensors."""
    columns = ("stored", "entry", "store", "half", "safetensors", "ratio", "read", "mapped")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        seconds = (row.store_s, row.half_s, row.safetensors_s, row.read_s, row.mapped_s)
        store, half, safetensors, read, mapped = (f"{1000 * s:.3f} ms" for s in seconds)
        size = human_bytes(row.nbytes)
        name = f"{row.stored_dtype}, encrypted" if row.encrypted else row.stored_dtype
        table.add_row(name, size, store, half, safetensors, f"{row.ratio:.2f}", read, mapped)
    out.print(table)


def print_lookups(speed: LookupSpeed) -> None:
    """A store of many entries."""
    out.print(
        f"\n{speed.entries} entries: opened in {speed.open_ms:.1f} ms; looking up adds "
        f"{speed.lookup_ms:.3f} ms to a read of {speed.read_ms:.3f} ms, a miss takes "
        f"{speed.miss_ms:.3f} ms; a write takes {speed.put_ms:.1f} ms, forgetting a document "
        f"{speed.forget_ms:.0f} ms; the index has {human_bytes(speed.index_nbytes)}"
    )


def print_anchors(rows: Sequence[AnchorChoice]) -> None:
    """Choices of anchors out of one and the same KV, best first at each ratio."""
    columns = ("ratio", "chosen by", "attention kept", "loss", "accuracy")
    table = Table(*columns, box=None, pad_edge=False)
    for row in sorted(rows, key=lambda row: (row.ratio, row.loss)):
        figures = (f"{row.kept:.1%}", f"{row.loss:.3f}", f"{row.accuracy:.3f}")
        table.add_row(f"{row.ratio}x", row.anchors, *figures)
    out.print(table)


def print_fit(figures: Sequence[FitFigure]) -> None:
    """Each prompt at each ratio, with the same scorer's choice for equal heads beside it."""
    columns = ("prompt", "ratio", "attention kept", "loss", "accuracy", "equal heads:", "", "")
    table = Table(*columns, box=None, pad_edge=False)
    by_setting = {(row.prompt, row.ratio, row.budget): row for row in figures}
    for row in figures:
        if row.budget != "shared":
            continue
        equal = by_setting.get((row.prompt, row.ratio, "uniform"))
        cells = [
            cell
            for of in (row, equal)
            if of is not None
            for cell in (f"{of.kept:.1%}", f"{of.loss:.3f}", f"{of.accuracy:.3f}")
        ]
        table.add_row(row.prompt, "all kept" if row.ratio == 1 else f"{row.ratio}x", *cells)
    out.print(table)


def print_steps(rows: Sequence[StepSpeed]) -> None:
    """Tokens a second of training and of the model alone."""
    table = Table("what", "tokens", "seconds", "tokens/s", box=None, pad_edge=False)
    for row in rows:
        figures = (f"{row.tokens:,}", f"{row.seconds:.2f}", f"{row.tokens_per_s:,.0f}")
        table.add_row(row.what, *figures)
    out.print(table)
