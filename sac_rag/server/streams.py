"""Streams: an answer that is generated with others, handed to a client as server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeAlias

import anyio
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from sac_rag.gathering import OnText
from sac_rag.reports import Answer
from sac_rag.server.refusals import RefusalError
from sac_rag.server.service import refusal_of

log = logging.getLogger(__name__)

# A piece of the text; last the answer with its account, or what ended it.
Item: TypeAlias = str | Answer | RefusalError


class Stream:
    """A running answer, whose pieces wait for their reader: the generation does not.

    At most one answer is held, whose length is limited.

    Args:
        submit: Starts the answer.
    """

    def __init__(self, submit: Callable[[OnText], Future[Answer]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        self._started: Item | None = None
        self._future = submit(self._put)
        self._future.add_done_callback(self._end)

    async def start(self) -> None:
        """Waits for the first piece.

        Raises:
            RefusalError: if the answer could not be started.
        """
        first = await self._items.get()
        if isinstance(first, RefusalError):
            raise first
        self._started = first

    async def items(self) -> AsyncIterator[Item]:
        """The text, piece by piece; last the answer with its account, or what ended it."""
        item = self._started
        while True:
            if item is not None:
                yield item
            if isinstance(item, Answer | RefusalError):
                return
            item = await self._items.get()

    def close(self) -> None:
        """Ends the generation at its next token."""
        self._future.cancel()

    def _put(self, item: Item) -> None:
        """Called in the thread that generates."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def _end(self, future: Future[Answer]) -> None:
        if not future.cancelled():
            error = future.exception()
            self._put(future.result() if error is None else refusal_of(error))


class EventResponse(StreamingResponse):
    """Sends events; ends when the client leaves or does not read.

    Args:
        events: What is sent.
        stall_s: How long the client may take to read an event, in seconds.
        on_end: Called at the end, however it comes.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[str], stall_s: float, on_end: Callable[[], None]
    ) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._stall_s = stall_s
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""

        async def send_in_time(message: Message) -> None:
            with anyio.move_on_after(self._stall_s) as waiting:
                await send(message)
            if waiting.cancelled_caught:
                log.warning("a stream was ended: its client has not read for %g s", self._stall_s)
                left.cancel()

        try:
            with anyio.CancelScope() as left:
                await super().__call__(scope, receive, send_in_time)
        finally:
            self._on_end()
