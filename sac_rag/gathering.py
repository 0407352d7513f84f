"""Gatherer: prompts of concurrent callers are answered together, as rows that come and go.

A step for eight rows costs about as much as two steps for one, so that callers who wait anyway are
better off together. A prompt that comes while others are answered joins them after the step at
hand, and rows that end give their places to those that wait, some at a time: reading several
prompts in one pass costs less for each. Answers in float32 are the same as alone; in bfloat16 a
batch rounds in another order, as any batch does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sac_rag import forks
from sac_rag.answering import Run
from sac_rag.lm.generator import Generator
from sac_rag.prompts.decode import Decoder
from sac_rag.prompts.decoding import Decoding
from sac_rag.reports import Answer

# Starts prompts of one kind; the ratio is that of chunks without one.
Start = Callable[[Sequence[Any], Decoding, int | None], Run]
# Called with each piece of a text.
OnText = Callable[[str], None]

# Steps that a prompt waits for more places to be free than one.
_PATIENCE = 8


@dataclass(frozen=True, eq=False)
class _Waiting:
    start: Start
    prompt: Any
    decoding: Decoding
    ratio: int | None
    on_text: OnText | None
    context: Context = field(default_factory=copy_context)
    future: Future[Answer] = field(default_factory=Future)

    def fits(self, other: _Waiting) -> bool:
        """Whether both can be started in one pass."""
        # A seed's random numbers are those of a prompt alone.
        is_seeded = self.decoding.temperature > 0 and self.decoding.seed is not None
        mine = (self.start, self.decoding, self.ratio)
        return self is other or (
            not is_seeded and mine == (other.start, other.decoding, other.ratio)
        )

    def hand_over(self, piece: str) -> None:
        """Gives the caller a piece of the text; one who does not take it gets the error."""
        if piece and self.on_text is not None and not self.future.done():
            try:
                self.on_text(piece)
            except Exception as error:  # noqa: BLE001 (raised by the future)
                self.settle(error)

    def settle(self, answer: Answer | BaseException) -> None:
        """Gives the caller an answer or an error, unless the caller has cancelled or has one."""
        has_error = self.future.done() and not self.future.cancelled()
        if has_error or not self.future.set_running_or_notify_cancel():
            return
        if isinstance(answer, BaseException):
            self.future.set_exception(answer)
        else:
            self.future.set_result(answer)


class _Running:
    """Prompts that were started in one pass.

    Attributes:
        rows: Rows of the run that are in the decoder, in its order.
    """

    def __init__(self, members: Sequence[_Waiting], decoder: Decoder) -> None:
        self._members = members
        self._ended: set[int] = set()
        self._account = ExitStack()
        first = members[0]
        self._run = first.start([one.prompt for one in members], first.decoding, first.ratio)
        self._account.enter_context(self._run.accounted())
        try:
            pieces = self._run.begin(decoder)
        except BaseException as error:
            self._account.__exit__(type(error), error, error.__traceback__)
            raise
        self.rows = list(range(len(members)))
        self._settle(pieces)

    def take(self, tokens: Tensor, seconds: float) -> None:
        """Adds a token to each row."""
        self._settle(self._run.take(tokens, self.rows, seconds))

    @property
    def num_open(self) -> int:
        """Rows whose callers wait for their answers."""
        return len(self._members) - len(self._ended)

    def drop(self) -> list[int]:
        """Drops rows that have ended; returns the places, among the rows so far, of the others."""
        places = [place for place, row in enumerate(self.rows) if row not in self._ended]
        # Samples of a pass share random numbers: they leave together.
        if self._run.generation.rows_may_leave or not places:
            self.rows = [self.rows[place] for place in places]
            return places
        return list(range(len(self.rows)))

    def fail(self, error: BaseException) -> None:
        """Gives an error to all that have no answer."""
        for row, member in enumerate(self._members):
            if row not in self._ended:
                member.settle(error)
        self._account.close()

    def _settle(self, pieces: Sequence[str]) -> None:
        """Hands over the new text of every row, and answers the callers whose rows have ended.

        Rows of callers that have left end too.
        """
        for member, piece in zip(self._members, pieces, strict=True):
            member.hand_over(piece)
        open_rows = self._run.generation.open_rows
        new = {
            row
            for row, member in enumerate(self._members)
            if row not in self._ended and (row not in open_rows or member.future.done())
        }
        if not new:
            return
        self._ended |= new
        is_over = len(self._ended) == len(self._members)
        answers = self._run.answers()
        if is_over:
            self._account.close()  # before anyone asks for the counts
        for row in sorted(new):
            self._members[row].settle(answers[row])


class Gatherer:
    """Answers the prompts of concurrent callers in one thread, several at a time.

    The thread is started by a prompt and ends when none is left.

    Args:
        generator: The LM that answers.
        size: Most prompts that are answered at a time.
        window_s: The first prompts are started when no further one has come for this long, in
            seconds.
    """

    def __init__(self, generator: Generator, *, size: int = 16, window_s: float = 0.01) -> None:
        self._generator = generator
        self._size = size
        self._window_s = window_s
        self._waiting: list[_Waiting] = []
        self._waited = 0  # steps
        self._arrival = threading.Condition()
        self._worker: threading.Thread | None = None
        forks.in_child(self, Gatherer._renew)

    def submit(
        self,
        start: Start,
        prompt: Any,
        decoding: Decoding,
        ratio: int | None,
        on_text: OnText | None = None,
    ) -> Future[Answer]:
        """Adds a prompt.

        Args:
            start: Starts such prompts.
            prompt: One of them.
            decoding: How to answer.
            ratio: Of chunks that have none of their own.
            on_text: Called with each piece of the text, in the thread that answers: all others wait
                for it. What it raises is the prompt's error.

        Returns:
            Its answer or error. It can be cancelled at any time before that, which ends its work.
        """
        one = _Waiting(start, prompt, decoding, ratio, on_text)
        with self._arrival:
            self._waiting.append(one)
            self._arrival.notify()
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="sac-rag-gatherer")
                self._worker.start()
        return one.future

    def _renew(self) -> None:
        """No prompt and no thread: those of a parent are answered there."""
        self._waiting = []
        self._arrival = threading.Condition()
        self._worker = None

    def _work(self) -> None:
        decoder = Decoder(self._generator)
        running: list[_Running] = []
        while running or self._has_prompts():
            num_open = sum(run.num_open for run in running)
            others_join = self._others_join(self._size - num_open)
            if others_join or 2 * num_open <= len(decoder):
                running = _without_ended(running, decoder)
            if others_join:
                running += _started(self._take_waiting(self._size - len(decoder)), decoder)
            if not any(run.num_open for run in running):
                continue
            started = time.perf_counter()
            try:
                chosen = decoder.step()
                seconds = time.perf_counter() - started
                tokens = torch.split(chosen, [len(run.rows) for run in running])
                for run, of_run in zip(running, tokens, strict=True):
                    run.take(of_run, seconds)
            except BaseException as error:  # noqa: BLE001 (raised by the futures)
                for run in running:
                    run.fail(error)
                decoder, running = Decoder(self._generator), []

    def _others_join(self, num_free: int) -> bool:
        """Whether prompts that wait are started now, or wait for more places than are free."""
        with self._arrival:
            wanted = min(len(self._waiting), max(1, self._size // 4))
        if 0 < num_free < wanted and self._waited < _PATIENCE:
            self._waited += 1
            return False
        if num_free > 0:
            self._waited = 0
        return num_free > 0 and wanted > 0

    def _has_prompts(self) -> bool:
        """Waits for all that come at the same time; the thread must end if there are none."""
        with self._arrival:
            if not self._waiting:
                self._worker = None
                return False
            while len(self._waiting) < self._size and self._arrival.wait(self._window_s):
                pass
            return True

    def _take_waiting(self, room: int) -> list[_Waiting]:
        """The first prompt that waits with others that fit it, at most as many as there is room."""
        with self._arrival:
            self._waiting = [one for one in self._waiting if not one.future.cancelled()]
            if not self._waiting or room < 1:
                return []
            first = self._waiting[0]
            taken = [one for one in self._waiting if first.fits(one)][:room]
            self._waiting = [one for one in self._waiting if one not in taken]
            return taken


def _without_ended(running: list[_Running], decoder: Decoder) -> list[_Running]:
    """Drops rows that have ended."""
    places, begin = [], 0
    for run in running:
        count = len(run.rows)
        places += [begin + place for place in run.drop()]
        begin += count
    if len(places) < len(decoder):
        decoder.keep(places)
    return [run for run in running if run.rows]


def _started(members: list[_Waiting], decoder: Decoder) -> list[_Running]:
    """Starts prompts; if that fails, each by itself, so that one does not fail others."""
    if not members:
        return []
    try:
        return [members[0].context.run(_Running, members, decoder)]
    except BaseException as error:  # noqa: BLE001 (raised by the future)
        if len(members) == 1:
            members[0].settle(error)
            return []
        return [run for one in members for run in _started([one], decoder)]
