"""Requests per second of the endpoint: many clients at the same time, in turn with one alone."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import httpx

from sac_rag.chunk import Chunk
from sac_rag.server.app import make_app
from sac_rag.server.limits import Limits
from sac_rag.server.running import listen, make_server
from sac_rag.server.service import Service

_ALONE = 0.2  # share of the time with one client
_TIMEOUT_S = 600.0
_DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class ServingReport:
    """What clients got from the endpoint.

    Attributes:
        clients: Clients at the same time.
        seconds: Wall time, both parts.
        requests: Requests of these clients, and of the one alone.
        failed: Those without an answer, by HTTP status or type of error.
        alone_per_s: Answers per second with one client, which waits for each.
        together_per_s: Answers per second with all clients.
        speedup: together_per_s over alone_per_s: the median over rounds, each of which measures
            both, one after the other.
        alone_s: Seconds that one client waits for an answer, the median.
        together_s, together_p99_s: The same with all clients, and the 99th percentile.
    """

    clients: int
    seconds: float
    requests: int
    failed: dict[str, int]
    alone_per_s: float
    together_per_s: float
    speedup: float
    alone_s: float
    together_s: float
    together_p99_s: float


@dataclass
class _Part:
    """Requests of some clients over some time."""

    seconds: float = 0.0
    waits: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def per_s(self) -> float:
        return len(self.waits) / self.seconds


def measure_serving(
    service: Service,
    chunks: Sequence[Chunk],
    *,
    clients: int = 32,
    seconds: float = 600.0,
    rounds: int = 5,
    answer_tokens: int = 24,
    on_progress: Callable[[int], None] | None = None,
) -> ServingReport:
    """Serves a pipeline in a thread and asks it over HTTP.

    Each request brings two titled chunks, which are in the store, and asks about the second. Every
    second answer is streamed.

    Args:
        service: What is served; its store is closed at the end.
        chunks: At least two; they are compressed first.
        clients: Clients at the same time.
        seconds: Wall time of all rounds together; requests that are running are waited for.
        rounds: Times that one client alone and all clients are measured, in turn.
        answer_tokens: Longest answer, in tokens.
        on_progress: Called with the number of requests since the last call.
    """
    service.rag.precompress(chunks)
    pairs = zip(chunks, (*chunks[1:], chunks[0]), strict=True)
    bodies = [
        {**_body(service.name, pair, answer_tokens), "stream": bool(number % 2)}
        for number, pair in enumerate(pairs)
    ]
    alone: list[_Part] = []
    together: list[_Part] = []
    started = time.perf_counter()
    with _serving(service, clients) as url:
        asyncio.run(_ask(url, cycle(bodies[:2]), 1, 0.0, on_progress))  # sets up the kernels
        for _ in range(rounds):
            for parts, count, share in ((alone, 1, _ALONE), (together, clients, 1 - _ALONE)):
                limit_s = seconds / rounds * share
                parts.append(asyncio.run(_ask(url, cycle(bodies), count, limit_s, on_progress)))
    failed = sum((part.failed for part in (*alone, *together)), Counter[str]())
    waits = [wait for part in together for wait in part.waits] or [float("nan")]
    waits_alone = [wait for part in alone for wait in part.waits] or [float("nan")]
    return ServingReport(
        clients=clients,
        seconds=time.perf_counter() - started,
        requests=sum(len(part.waits) for part in (*alone, *together)) + failed.total(),
        failed=dict(failed),
        alone_per_s=_per_s(alone),
        together_per_s=_per_s(together),
        speedup=statistics.median(
            many.per_s / one.per_s if one.waits else float("nan")
            for one, many in zip(alone, together, strict=True)
        ),
        alone_s=statistics.median(waits_alone),
        together_s=statistics.median(waits),
        together_p99_s=sorted(waits)[int(0.99 * (len(waits) - 1))],
    )


def _per_s(parts: Sequence[_Part]) -> float:
    return sum(len(part.waits) for part in parts) / sum(part.seconds for part in parts)


def _body(model: str, chunks: Sequence[Chunk], answer_tokens: int) -> dict[str, Any]:
    documents = [{"id": c.id, "title": c.title, "text": c.text} for c in chunks]
    question = f"What is {chunks[-1].title}?"
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "documents": documents,
        "max_tokens": answer_tokens,
    }


@contextmanager
def _serving(service: Service, clients: int) -> Iterator[str]:
    """The URL of a server in a thread, which closes the store at its end."""
    app = make_app(service, limits=Limits(queue=2 * clients))
    server = make_server(app, "127.0.0.1")
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


async def _ask(
    url: str,
    bodies: Iterator[dict[str, Any]],
    clients: int,
    seconds: float,
    on_progress: Callable[[int], None] | None,
) -> _Part:
    """Lets clients ask one question after the other until the time is over."""
    part = _Part()
    started = time.perf_counter()

    async def work(client: httpx.AsyncClient) -> None:
        is_first = True
        while is_first or time.perf_counter() - started < seconds:
            is_first, asked, body = False, time.perf_counter(), next(bodies)
            try:
                answer = await client.post("/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                part.failed[type(error).__name__] += 1
            else:
                if answer.status_code != 200:
                    part.failed[str(answer.status_code)] += 1
                elif body["stream"] and not answer.text.endswith(_DONE):
                    part.failed["stream"] += 1
                else:
                    part.waits.append(time.perf_counter() - asked)
            if on_progress is not None:
                on_progress(1)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=_TIMEOUT_S, limits=limits, trust_env=False
    ) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    part.seconds = time.perf_counter() - started
    return part
