"""Limits of requests: bytes, documents, and how many are worked on at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import anyio
from fastapi import Request

from sac_rag.server.refusals import RefusalError


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
        body_bytes: Most bytes of a request's body.
        documents: Most documents, and most chunks, of a request.
        document_bytes: Most bytes of a document's text, in UTF-8.
        queue: Most requests that are read, and most that wait or are answered, at the same time.
        answer_tokens: Longest answer that can be asked for, in tokens.
        body_s: Longest time that a body may take to arrive, in seconds.
        stall_s: How long a stream waits for a client that does not read, in seconds.
        drain_s: How long running requests are waited for at the end, in seconds.

    Raises:
        ValueError: for a limit that is not above 0.
    """

    body_bytes: int = 8 * 2**20
    documents: int = 64
    document_bytes: int = 2**20
    queue: int = 64
    answer_tokens: int = 1024
    body_s: float = 30.0
    stall_s: float = 30.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not (value := getattr(self, field.name)) > 0:
                raise ValueError(f"{field.name} must be above 0, was: {value!r}")


class Slots:
    """Places for requests; used by the thread of the event loop only.

    Attributes:
        used: Places that are taken.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.used = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Takes a place.

        Raises:
            RefusalError: 429, if there is none.
        """
        if self.used >= self._size:
            raise RefusalError(
                429,
                f"{self._size} requests are worked on already, which is the limit; try again",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.used += 1
        try:
            yield
        finally:
            self.used -= 1


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        RefusalError: 413 if it is too long, 408 if it takes too long to arrive, 415 if it is not
            said to be JSON: browsers send other types to any site without asking it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusalError(415, "the Content-Type must be application/json", code="content_type")
    length = request.headers.get("content-length", "")
    body = bytearray()
    try:
        with anyio.fail_after(limits.body_s):
            if length.isascii() and length.isdigit() and int(length[:20]) > limits.body_bytes:
                raise _too_long(limits)
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise _too_long(limits)
    except TimeoutError:
        raise RefusalError(
            408, f"the body did not arrive within {limits.body_s:g} s", code="timeout"
        ) from None
    return bytes(body)


def _too_long(limits: Limits) -> RefusalError:
    return RefusalError(
        413,
        f"the body must have at most {limits.body_bytes} bytes, has more; send fewer documents",
        code="body_too_long",
        headers={"Connection": "close"},
    )
