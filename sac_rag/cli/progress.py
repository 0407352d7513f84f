"""Progress of long commands on stderr: bars on a terminal, lines of figures in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from sac_rag.cli.render import human_bytes, human_time, notes, print_estimate
from sac_rag.precompress.callback import JobCallback, Step

if TYPE_CHECKING:
    from types import TracebackType

    from sac_rag.precompress.estimate import Estimate
    from sac_rag.reports import BadRecord, PrecompressReport

_LINE_EVERY_S = 30.0
_STEPS = {"count": "counting", "read": "reading documents", "index": "embedding"}
_FIT_STEPS = {"read": "reading passages", "fit": "fitting", "measure": "measuring"}


@contextmanager
def progress(
    what: str, total: int | None = None, show: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar; yields a function that takes the number of items finished since its last call."""
    with Progress(console=notes, transient=True, disable=not show) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def compress_progress(
    total_tokens: int | None, *, show: bool = True
) -> Iterator[Callable[[PrecompressReport], None]]:
    """Chunks, tokens per second, bytes and time left: a bar, or a line every half minute in a log.

    Args:
        total_tokens: Tokens that will be computed, if known.
        show: Whether to show anything.

    Yields:
        A function that takes the counts since its last call.
    """
    bar = Progress(
        TextColumn("compressing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=notes,
        transient=True,
        disable=not (show and notes.is_terminal),
        speed_estimate_period=300,
    )
    with bar:
        bar.add_task("", total=total_tokens, figures="")
        (task,) = bar.tasks
        chunks = nbytes = 0
        printed = time.monotonic()

        def advance(report: PrecompressReport) -> None:
            nonlocal chunks, nbytes, printed
            chunks, nbytes = chunks + report.chunks, nbytes + report.nbytes
            bar.advance(task.id, report.source_tokens)
            figures = f"{chunks:,} chunks, {task.speed or 0:,.0f} tokens/s, {human_bytes(nbytes)}"
            bar.update(task.id, figures=figures)
            in_log = show and not notes.is_terminal
            if in_log and time.monotonic() - printed >= _LINE_EVERY_S:
                printed = time.monotonic()
                notes.print(f"compressing: {figures}{_left(task)}")

        yield advance


def _left(task: Task) -> str:
    return "" if task.time_remaining is None else f", {human_time(task.time_remaining)} left"


class JobDisplay(JobCallback):
    """Shows a PrecompressJob: a bar per step, the estimate, and records that are left out.

    Args:
        folder: Where the store is, or would be if this were no dry run.
        store: The job's.
        show: Whether to show more than warnings.
    """

    def __init__(self, folder: Path, store: object, *, show: bool) -> None:
        self._folder = folder
        self._store = store
        self._show = show
        self._bar = ExitStack()
        self._advance: Callable[[int], None] = _ignore
        self._advance_compressing: Callable[[PrecompressReport], None] = _ignore

    def __enter__(self) -> JobDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def on_step(self, step: Step, total: int | None) -> None:
        """Replaces the bar."""
        self._bar.close()
        if step == "compress":
            bar = compress_progress(total, show=self._show)
            self._advance_compressing = self._bar.enter_context(bar)
        else:
            self._advance = self._bar.enter_context(progress(_STEPS[step], total, self._show))

    def on_progress(self, count: int) -> None:
        """Advances the bar."""
        self._advance(count)

    def on_compressed(self, report: PrecompressReport) -> None:
        """Advances the bar of compressing."""
        self._advance_compressing(report)

    def on_estimate(self, expected: Estimate) -> None:
        """Prints it, and warnings where there is too little room."""
        from sac_rag.precompress.estimate import shortages

        self._bar.close()
        if self._show:
            print_estimate(expected, self._folder)
        for warning in shortages(expected, self._store, self._folder):
            notes.print(warning, style="yellow")

    def on_bad(self, record: BadRecord) -> None:
        """Prints the place and the problem."""
        notes.print(f"skipped {record.place}: {record.problem}", style="yellow")


def _ignore(_: object) -> None:
    pass


@contextmanager
def fit_progress(show: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar per step of a fit; yields its `on_event`."""
    with Progress(console=notes, transient=True, disable=not show) as bar:
        task = bar.add_task("loading the model", total=None)

        def on_event(event: dict[str, Any]) -> None:
            bar.update(
                task,
                description=_FIT_STEPS[event["event"]],
                total=event.get("total"),
                completed=event.get("done", 0),
            )

        yield on_event


@contextmanager
def train_progress(show: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar with loss, rate and time left, and a line per validation; yields its `on_event`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, transient=True, disable=not show) as bar:
        task = bar.add_task("loading", total=None)
        tokens, seconds, loss = 0, 0.0, 0.0

        def on_event(event: dict[str, Any]) -> None:
            nonlocal tokens, seconds, loss
            kind = event["event"]
            if kind == "scorer" and "done" in event:
                bar.update(task, description="fitting the scorer", total=event["texts"])
                bar.advance(task, event["done"])
            elif kind == "start":
                bar.reset(task, total=event["steps"], completed=event["step"])
            elif kind == "step":
                tokens, seconds = tokens + event["tokens"], seconds + event["seconds"]
                loss = 0.95 * loss + 0.05 * event["loss"] if loss else event["loss"]
                rate = f"loss {loss:.3f}, {tokens / seconds:.0f} tokens/s"
                bar.update(task, description=rate, completed=event["step"])
            elif kind == "validation":
                notes.print(_validation(event), highlight=False)
            elif kind == "interrupted":
                notes.print(f"saved at step {event['step']}; run it again to resume")

        yield on_event


def _validation(event: dict[str, Any]) -> str:
    answers = "" if event["f1"] is None else f", F1 {event['f1']:.3f}"
    answers += "" if event["ended"] is None else f", ended {event['ended']:.2f}"
    prompt = f" {event['prompt']}" if event["prompt"] else ""
    return (
        f"step {event['step']}{prompt}, {event['ratio']}x: loss {event['loss']:.3f}, "
        f"accuracy {event['accuracy']:.3f} (wrong text {event['wrong_accuracy']:.3f}), "
        f"first token {event['first_accuracy']:.3f}{answers}"
    )
