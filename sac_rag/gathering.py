"""Gatherer: prompts of concurrent callers are answered together, in padded batches.

A batch of eight costs about as much as three answers one by one, so that callers who wait anyway
are better off together. Answers in float32 are the same as alone; in bfloat16 a batch rounds in
another order, as any batch does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from sac_rag.answering import Run
from sac_rag.prompts.generate import Decoding
from sac_rag.reports import Answer

# Starts a batch of prompts of one kind; the ratio is that of chunks without one.
Start = Callable[[Sequence[Any], Decoding, int | None], Run]


@dataclass(frozen=True, eq=False)
class _Waiting:
    start: Start
    prompt: Any
    decoding: Decoding
    ratio: int | None
    context: Context = field(default_factory=copy_context)
    future: Future[Answer] = field(default_factory=Future)

    def fits(self, other: _Waiting) -> bool:
        """Whether both can be rows of one batch."""
        # A seed gives the rows of a batch other random numbers than a prompt of its own.
        is_seeded = self.decoding.temperature > 0 and self.decoding.seed is not None
        mine = (self.start, self.decoding, self.ratio)
        return self is other or (
            not is_seeded and mine == (other.start, other.decoding, other.ratio)
        )


class Gatherer:
    """Gathers prompts into batches, which one thread answers in the order of their first prompt.

    The thread is started by a prompt and ends when none is waiting.

    Args:
        size: Most prompts of a batch.
        window_s: A batch starts when no further prompt has come for this long, in seconds.
    """

    def __init__(self, *, size: int = 8, window_s: float = 0.01) -> None:
        self._size = size
        self._window_s = window_s
        self._waiting: list[_Waiting] = []
        self._arrival = threading.Condition()
        self._worker: threading.Thread | None = None

    def submit(
        self, start: Start, prompt: Any, decoding: Decoding, ratio: int | None
    ) -> Future[Answer]:
        """Adds a prompt.

        Args:
            start: Starts a batch of such prompts.
            prompt: One of them.
            decoding: How to answer.
            ratio: Of chunks that have none of their own.

        Returns:
            Its answer or error. It can be cancelled at any time; a batch ends when all its prompts
            are cancelled.
        """
        one = _Waiting(start, prompt, decoding, ratio)
        with self._arrival:
            self._waiting.append(one)
            self._arrival.notify()
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work, name="sac-rag-gatherer")
                self._worker.start()
        return one.future

    def _work(self) -> None:
        while batch := self._next_batch():
            batch[0].context.run(_settle, batch)

    def _next_batch(self) -> list[_Waiting]:
        with self._arrival:
            if not self._waiting:
                self._worker = None
                return []
            while len(self._waiting) < self._size and self._arrival.wait(self._window_s):
                pass
            first = self._waiting[0]
            batch = [one for one in self._waiting if first.fits(one)][: self._size]
            self._waiting = [one for one in self._waiting if one not in batch]
            return batch


def _settle(batch: Sequence[_Waiting]) -> None:
    """Answers a batch; if it fails, each prompt by itself, so that one does not fail others."""
    batch = [one for one in batch if not one.future.cancelled()]
    if not batch:
        return
    try:
        answers = _answers(batch)
    except BaseException as error:  # noqa: BLE001 (raised by the future)
        if len(batch) > 1:
            for one in batch:
                _settle([one])
        elif batch[0].future.set_running_or_notify_cancel():
            batch[0].future.set_exception(error)
        return
    for one, answer in zip(batch, answers, strict=True):
        if one.future.set_running_or_notify_cancel():
            one.future.set_result(answer)


def _answers(batch: Sequence[_Waiting]) -> list[Answer]:
    first = batch[0]
    run = first.start([one.prompt for one in batch], first.decoding, first.ratio)
    for _ in run.steps():
        # A future is pending until it has its answer: only a pending one can be cancelled.
        if all(one.future.cancelled() for one in batch):
            break
    return run.answers()
