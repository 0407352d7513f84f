"""How far a long job is: a bar for who looks on, a line now and then for who reads later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sac_rag.cli.render import human_bytes, human_time, notes

if TYPE_CHECKING:
    from sac_rag.reports import PrecompressReport

Advance = Callable[["PrecompressReport"], None]

_LINE_EVERY_S = 30.0


@contextmanager
def job_progress(total_tokens: int | None, *, show: bool) -> Iterator[Advance]:
    """Shows tokens a second, time left and bytes on stderr.

    Args:
        total_tokens: Tokens to be computed, if known.
        show: Whether to show anything.

    Yields:
        A function to call with what was done since the last time.
    """
    if not show:
        yield lambda more: None
    elif notes.is_terminal:
        with _bar(total_tokens) as advance:
            yield advance
    else:
        yield _lines(total_tokens)


@contextmanager
def _bar(total_tokens: int | None) -> Iterator[Advance]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    progress = Progress(
        TextColumn("compressing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[account]}"),
        console=notes,
        transient=True,
    )
    account = _Account(total_tokens)
    with progress:
        task = progress.add_task("", total=total_tokens, account="")

        def advance(more: PrecompressReport) -> None:
            account.add(more)
            progress.update(task, completed=account.tokens, account=str(account))

        yield advance


def _lines(total_tokens: int | None) -> Advance:
    account = _Account(total_tokens)
    told = time.monotonic()

    def advance(more: PrecompressReport) -> None:
        nonlocal told
        account.add(more)
        if time.monotonic() - told >= _LINE_EVERY_S:
            told = time.monotonic()
            notes.print(f"compressing: {account}", markup=False, soft_wrap=True)

    return advance


class _Account:
    """What was done since it was made, in a line."""

    def __init__(self, total_tokens: int | None) -> None:
        self.tokens = 0
        self._total = total_tokens
        self._chunks = self._bytes = 0
        self._started = time.monotonic()

    def add(self, more: PrecompressReport) -> None:
        self._chunks += more.chunks
        self.tokens += more.source_tokens
        self._bytes += more.nbytes

    def __str__(self) -> str:
        rate = self.tokens / max(time.monotonic() - self._started, 1e-9)
        line = f"{self._chunks:,} chunks, {rate:,.0f} tokens/s, {human_bytes(self._bytes)}"
        if self._total is None or not rate:
            return line
        return f"{line}, {human_time(max(0, self._total - self.tokens) / rate)} left"
