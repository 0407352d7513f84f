"""Worker processes that compress side by side into one store.

Each loads the model once and receives one window after the other through a pipe of its own, so that
one that is killed leaves nothing locked.
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
from sac_rag.precompress.windows import compress_window, place_of
from sac_rag.reports import PrecompressReport

log = logging.getLogger(__name__)

_PATIENCE_S = 5.0  # for a worker to end by itself
_FINISHED, _DIED = object(), object()


@dataclass(frozen=True)
class _Job:
    """What a worker gets at its start.

    Attributes:
        open_compressor: Opens the compressor and its store.
        fingerprint: Required of the compressor.
        threads: CPU threads to compute with.
    """

    open_compressor: Callable[[], CachedCompressor]
    fingerprint: str
    threads: int


@dataclass(frozen=True)
class _Failed:
    """An error of a worker that another one would meet as well."""

    message: str
    is_os_error: bool


class Workers:
    """Worker processes, started when they are first needed and ended on leaving the block.

    Args:
        open_compressor: Opens the compressor and its store in a worker; must be picklable:
            a module-level function, or a partial of one.
        fingerprint: The compressor's. A worker that opens another one, because the model has
            changed for example, stops the run.
        count: Number of workers. They share the CPU threads that PyTorch has here.

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
            The counts since the last report, over all workers.

        Raises:
            OSError: if the store cannot be written.
            RuntimeError: if a worker fails, or a window's second worker dies as well.
        """
        again: deque[list[Chunk]] = deque()
        died_on: list[list[Chunk]] = []
        following = next(windows, None)
        while True:
            while again or following is not None:
                worker = self._idle()
                if worker is None:
                    break
                if again:
                    worker.begin(again.popleft())
                elif following is not None:
                    worker.begin(following)
                    following = next(windows, None)
            busy = {w.connection: w for w in self._processes if w.window is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                message = worker.receive()
                if isinstance(message, _Failed):
                    raise (OSError if message.is_os_error else RuntimeError)(message.message)
                if isinstance(message, PrecompressReport):
                    yield message
                elif message is _DIED:
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
        ending = worker.end(died=True)
        subject = f"its window of {len(window)} chunks, from {place_of(window[0])}"
        if sum(other is window for other in died_on) > 1:
            raise RuntimeError(
                f"a second worker ended ({ending}) on {subject}; if memory ran out, use fewer "
                "workers; what was finished is kept"
            )
        log.warning("a worker ended (%s); %s is done again", ending, subject)
        # Chunks that it stored will be hits of the window's second worker: not counted twice.
        return PrecompressReport(hits=-worker.computed, workers_lost=1)


class _Worker:
    """A worker process, as its parent has it.

    Attributes:
        connection: Readable when there is a message, or the process has died.
        window: The chunks it works on; None if it is idle.
        computed: Number of chunks of the window that it has computed.
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
        # The child's end: while it is open here, the child's death would go unnoticed.
        other_end.close()

    def begin(self, window: list[Chunk]) -> None:
        """Hands over a window; `receive` notices a process that has died."""
        self.window, self.computed = window, 0
        with suppress(OSError):
            self.connection.send(window)

    def receive(self) -> PrecompressReport | _Failed | object:
        """The next message: a report, an error, _FINISHED with its window, or _DIED."""
        try:
            message: object = self.connection.recv()
        except (EOFError, OSError):
            return _DIED
        if isinstance(message, PrecompressReport):
            self.computed += message.computed
        elif message is None:
            self.window = None
            return _FINISHED
        return message

    def end(self, died: bool = False) -> str:
        """Ends the process, at once if it is at work; returns its exit code or signal in words."""
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
    """A worker's life, until its pipe is closed: it is not needed, or its parent is dead."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(job.threads)
    try:
        compressor = opened(job.open_compressor, job.fingerprint)
        while True:
            try:
                window = connection.recv()
            except (EOFError, OSError):
                return
            for report in compress_window(compressor, window, skip_bad=True):
                if not _sent(connection, report):
                    return
            if not _sent(connection, None):
                return
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        _sent(connection, _Failed(str(error), isinstance(error, OSError)))


def opened(open_compressor: Callable[[], CachedCompressor], fingerprint: str) -> CachedCompressor:
    """A worker's compressor; raises ValueError if it is another one than the job's."""
    compressor = open_compressor()
    if compressor.fingerprint != fingerprint:
        raise ValueError(
            f"a worker must open the compressor {fingerprint[:12]}, opened: "
            f"{compressor.fingerprint[:12]}; has the model or the compressor changed?"
        )
    return compressor


def _sent(connection: Connection, message: object) -> bool:
    try:
        connection.send(message)
    except OSError:
        return False
    return True


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C reaches the whole process group: those started here leave it to their parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
