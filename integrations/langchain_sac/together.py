"""Together: one batch out of the rows of several threads or tasks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from langchain_core.runnables.config import ContextThreadPoolExecutor

Row = TypeVar("Row")
Result = TypeVar("Result")


class Together(Generic[Row, Result]):
    """Rows that are answered as one batch, once every place is taken or given up.

    If the batch fails, each row is answered by itself, so that one bad row does not fail others. A
    row that is cancelled before the batch starts is left out.

    Args:
        expected: Number of places.
        answer: Answers rows, one result per row; called in a thread of its own.
    """

    def __init__(self, expected: int, answer: Callable[[Sequence[Row]], Sequence[Result]]) -> None:
        self._expected = expected
        self._answer = answer
        self._asked: list[tuple[Row, Future[Result]]] = []
        self._lock = threading.Lock()
        self._worker = ContextThreadPoolExecutor(max_workers=1)

    def ask(self, row: Row) -> Future[Result]:
        """Adds a row; its result is computed once all places are taken or given up."""
        future: Future[Result] = Future()
        with self._lock:
            self._asked.append((row, future))
            self._begin_if_complete()
        return future

    def leave(self) -> None:
        """Gives up a place, which is then not waited for."""
        with self._lock:
            self._expected -= 1
            self._begin_if_complete()

    def _begin_if_complete(self) -> None:
        if self._asked and len(self._asked) == self._expected:
            self._worker.submit(self._work, self._asked)
            self._worker.shutdown(wait=False)

    def _work(self, asked: list[tuple[Row, Future[Result]]]) -> None:
        self._settle([one for one in asked if one[1].set_running_or_notify_cancel()])

    def _settle(self, waiting: list[tuple[Row, Future[Result]]]) -> None:
        try:
            results = self._answer([row for row, _ in waiting]) if waiting else []
        except BaseException as error:  # noqa: BLE001 (raised by the future)
            if len(waiting) == 1:
                waiting[0][1].set_exception(error)
                return
            for one in waiting:
                self._settle([one])
            return
        for (_, future), result in zip(waiting, results, strict=True):
            future.set_result(result)


class Place(Generic[Row, Result]):
    """Place of one row in a batch: reserved for its owner in a context, taken by `ask`.

    Args:
        owner: The object that may take it.
        together: The batch.
    """

    def __init__(self, owner: object, together: Together[Row, Result]) -> None:
        self._owner = owner
        self._together = together
        self._is_taken = False

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Reserves the place within this context, at whose end it is given up if not taken."""
        token = _place.set(self)
        try:
            yield
        finally:
            _place.reset(token)
            if not self._is_taken:
                self._is_taken = True
                self._together.leave()

    @staticmethod
    def find(owner: object) -> Place[Any, Any] | None:
        """The place that is reserved for this owner in the current context, unless it is taken."""
        place = _place.get()
        if place is None or place._owner is not owner or place._is_taken:
            return None
        return place

    def ask(self, row: Row) -> Future[Result]:
        """Takes the place."""
        self._is_taken = True
        return self._together.ask(row)


_place: ContextVar[Place[Any, Any] | None] = ContextVar("sac_place", default=None)
