"""Processes that compress side by side into one store. Knows nothing of files or documents.

Each loads the model once and is handed one window after the other through a pipe of its own, so
that one that is killed leaves nothing locked.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.precompress.job import compress_window, place_of
from sac_rag.reports import PrecompressReport

log = logging.getLogger(__name__)

_PATIENCE_S = 5.0  # for a worker that was told to end
_DONE, _DIED = object(), object()


@dataclass(frozen=True)
class _Job:
    """What a worker is told at its start.

    Attributes:
        open_compressor: Opens the compressor and its store.
        fingerprint: What the compressor's must be.
        threads: CPU threads to compute with.
    """

    open_compressor: Callable[[], CachedCompressor]
    fingerprint: str
    threads: int


@dataclass(frozen=True)
class _Failed:
    """What a worker says when it cannot go on: another one could not either."""

    message: str
    is_os_error: bool


class Workers:
    """Worker processes, started when they are first needed and ended on leaving the block.

    Args:
        open_compressor: Opens the compressor and its store in a worker; must be picklable, as
            module-level functions and partials of them are.
        fingerprint: The compressor's. A worker that opens another one stops the run: a model that
            was changed meanwhile, say.
        count: How many. The CPU threads that PyTorch has here are shared out among them.

    Raises:
        ValueError: for a count below 1.
    """

    def __init__(
        self, open_compressor: Callable[[], CachedCompressor], fingerprint: str, count: int
    ) -> None:
        if count < 1:
            raise ValueError(f"there must be at least 1 worker, was: {count}")
        self._job = _Job(open_compressor, fingerprint, max(1, torch.get_num_threads() // count))
        self._count = count
        self._processes: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._processes:
            worker.end()
        self._processes.clear()

    def run(self, windows: Iterator[list[Chunk]]) -> Iterator[PrecompressReport]:
        """Compresses windows in any order, bad chunks left out.

        A window whose worker dies is given to another one, once.

        Yields:
            What was done since the last time, over all workers.

        Raises:
            OSError: if the store cannot be written.
            RuntimeError: if a worker cannot go on, or a window's second worker dies as well.
        """
        again: deque[list[Chunk]] = deque()
        died_on: list[list[Chunk]] = []
        coming = next(windows, None)
        while True:
            while again or coming is not None:
                worker = self._idle()
                if worker is None:
                    break
                if again:
                    worker.begin(again.popleft())
                elif coming is not None:
                    worker.begin(coming)
                    coming = next(windows, None)
            busy = {w.connection: w for w in self._processes if w.window is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                told = worker.receive()
                if isinstance(told, _Failed):
                    raise (OSError if told.is_os_error else RuntimeError)(told.message)
                if isinstance(told, PrecompressReport):
                    yield told
                elif told is _DIED:
                    window = worker.window or []
                    died_on.append(window)
                    again.append(window)
                    yield self._lost(worker, window, died_on)

    def _idle(self) -> _Worker | None:
        for worker in self._processes:
            if worker.window is None:
                return worker
        if len(self._processes) == self._count:
            return None
        self._processes.append(_Worker(self._job))
        return self._processes[-1]

    def _lost(
        self, worker: _Worker, window: list[Chunk], died_on: list[list[Chunk]]
    ) -> PrecompressReport:
        self._processes.remove(worker)
        how = worker.end(died=True)
        what = f"its window of {len(window)} chunks, from {place_of(window[0])}"
        if sum(other is window for other in died_on) > 1:
            raise RuntimeError(
                f"a second worker ended ({how}) on {what}; if memory ran out, use fewer workers; "
                "what was finished is kept"
            )
        log.warning("a worker ended (%s); %s is done again", how, what)
        # What it stored is found when the window is done again, and is not to be counted twice.
        return PrecompressReport(hits=-worker.computed, workers_lost=1)


class _Worker:
    """One process, seen from outside.

    Attributes:
        connection: Readable when it has something to say, or has died.
        window: What it is at; None if it waits for more.
        computed: Chunks of it that it has computed.
    """

    def __init__(self, job: _Job) -> None:
        # Where the parent has used CUDA or threads, a fork would hang.
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        self.window: list[Chunk] | None = None
        self.computed = 0
        self._process = context.Process(target=_work, args=(other_end, job), daemon=True)
        with _interrupts_ignored():
            self._process.start()
        # The child's end: while it is open here, the child's death would not be seen.
        other_end.close()

    def begin(self, window: list[Chunk]) -> None:
        """Hands over a window; that the process has died is noticed by `receive`."""
        self.window, self.computed = window, 0
        with suppress(OSError):
            self.connection.send(window)

    def receive(self) -> PrecompressReport | _Failed | object:
        """What the process says next: _DONE with its window, or _DIED, if nothing else."""
        try:
            told: object = self.connection.recv()
        except (EOFError, OSError):
            return _DIED
        if isinstance(told, PrecompressReport):
            self.computed += told.computed
        elif told is None:
            self.window = None
            return _DONE
        return told

    def end(self, died: bool = False) -> str:
        """Ends the process, at once if it is at work; says how it ended."""
        if self.window is not None and not died:
            self._process.terminate()
        self.connection.close()
        self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code = self._process.exitcode or 0
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _work(connection: Connection, job: _Job) -> None:
    """What a worker does until its pipe is closed: it then is not needed, or its parent is dead."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(job.threads)
    try:
        compressor = job.open_compressor()
        if compressor.fingerprint != job.fingerprint:
            raise ValueError(
                f"a worker must open the compressor {job.fingerprint[:12]}, opened: "
                f"{compressor.fingerprint[:12]}; was the model or the compressor changed meanwhile?"
            )
        while True:
            try:
                window = connection.recv()
            except (EOFError, OSError):
                return
            for done in compress_window(compressor, window, skip_bad=True):
                if not _told(connection, done):
                    return
            if not _told(connection, None):
                return
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        _told(connection, _Failed(str(error), isinstance(error, OSError)))


def _told(connection: Connection, what: object) -> bool:
    try:
        connection.send(what)
    except OSError:
        return False
    return True


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C reaches the whole group: processes started here leave it to this one to act on it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
