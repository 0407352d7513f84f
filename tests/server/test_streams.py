"""A stream is the answer in pieces; who leaves or does not read it holds nobody up."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support.models import PROSE
from support.serving import TIMEOUT, Running, blocked, events_of, running, until

from sac_rag import SacRAG
from sac_rag.gathering import Gatherer
from sac_rag.server.app import make_app
from sac_rag.server.limits import Limits
from sac_rag.server.service import Service

DOCUMENTS = [{"id": "d", "title": "T", "text": PROSE[0]}]
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "What is it?"}]}


def test_the_pieces_joined_are_the_answer(served: Running) -> None:
    for fields in ({"documents": DOCUMENTS}, {"max_tokens": 40}):
        whole = served.ask(**fields).json()
        answer = served.ask(**fields, stream=True, stream_options={"include_usage": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, last, usage = events_of(answer.text)
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(event["choices"][0]["delta"]["content"] for event in events)
        assert text == whole["choices"][0]["message"]["content"]
        assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        cited = [c["document"] for c in last["metadata"]["citations"]]
        assert cited == [c["document"] for c in whole["metadata"]["citations"]]
        assert len({event["id"] for event in events}) == 1


def test_usage_comes_only_if_it_is_asked_for(served: Running) -> None:
    assert all("usage" not in event for event in events_of(served.ask(stream=True).text))


def test_a_stream_that_fails_ends_in_an_error(
    served: Running, rag: SacRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: Any, arguments: Any) -> None:
        if next(countdown, None) is None:
            raise RuntimeError("the secret")

    countdown = iter(range(6))
    handle = rag.generator.model.get_input_embeddings().register_forward_pre_hook(fail)
    answer = served.ask(stream=True, max_tokens=50)
    handle.remove()
    assert answer.status_code == 200
    *_, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert json.loads(last)["error"]["type"] == "server_error"
    assert "secret" not in answer.text


def vanish(served: Running, **fields: Any) -> socket.socket:
    """Sends a request; whoever closes the socket is a client that leaves."""
    body = json.dumps({**BODY, **fields}).encode()
    port = served.client.base_url.port
    assert port is not None
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return client


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_ends_the_work(served: Running, rag: SacRAG, stream: bool) -> None:
    with blocked(rag.generator) as blocker:
        client = vanish(served, stream=stream, max_tokens=1000)
        assert blocker.reached.wait(TIMEOUT)
        client.close()
        until(lambda: served.endpoint.running == 0)
        blocker.released.set()
        # The model is free for the next one, long before a thousand tokens.
        assert served.ask(max_tokens=2).status_code == 200
    assert blocker.passes < 100


def test_a_request_that_waits_for_the_model_is_cancelled_with_its_client(
    served: Running, rag: SacRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    futures: list[Future[Any]] = []
    gatherer = Gatherer(rag.generator)
    submit = gatherer.submit

    def noting(*args: Any) -> Future[Any]:
        futures.append(submit(*args))
        return futures[-1]

    monkeypatch.setattr(gatherer, "submit", noting)
    monkeypatch.setattr(rag, "gatherer", gatherer)
    with blocked(rag.generator) as blocker:
        first = vanish(served)
        assert blocker.reached.wait(TIMEOUT)
        second = vanish(served)
        until(lambda: len(futures) == 2)
        second.close()
        until(futures[1].cancelled)
        blocker.released.set()
        assert first.recv(12) == b"HTTP/1.1 200"
        first.close()


class Stalled:
    """A client that sends a request and reads nothing, for ever.

    Driven below the socket, whose buffers would take a tiny model's whole answer.
    """

    def __init__(self, **fields: Any) -> None:
        self.body = json.dumps({**BODY, "stream": True, **fields}).encode()
        self.is_full = asyncio.Event()

    async def ask(self, app: Any) -> None:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST",
            "http_version": "1.1", "path": "/v1/chat/completions", "raw_path": b"",
            "query_string": b"", "headers": headers, "root_path": "", "scheme": "http",
            "server": ("localhost", 80), "client": ("localhost", 1),
        }  # fmt: skip
        requests = iter([{"type": "http.request", "body": self.body, "more_body": False}])

        async def receive() -> Any:
            return next(requests, None) or await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                self.is_full.set()
                await asyncio.Event().wait()

        await app(scope, receive, send)


@pytest.fixture
def ask() -> Callable[..., Any]:
    async def ask(app: Any, **fields: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(
                "/v1/chat/completions", json={**BODY, **fields}, timeout=TIMEOUT
            )

    return ask


def test_a_client_that_does_not_read_holds_nobody_up(
    service: Service, ask: Callable[..., Any]
) -> None:
    """Eight of them take all places of the batch; their answers end without being read."""
    app = make_app(service, limits=Limits(stall_s=10 * TIMEOUT))
    clients = 8

    async def beside() -> list[httpx.Response]:
        stalled = [Stalled(max_tokens=20) for _ in range(clients)]
        tasks = [asyncio.create_task(client.ask(app)) for client in stalled]
        for client in stalled:
            await asyncio.wait_for(client.is_full.wait(), TIMEOUT)
        answers = [await ask(app), await ask(app, stream=True)]
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=TIMEOUT)
        return answers

    assert [answer.status_code for answer in asyncio.run(beside())] == [200, 200]
    assert app.state.endpoint.running == 0


def test_a_client_that_does_not_read_is_left(service: Service) -> None:
    app = make_app(service, limits=Limits(stall_s=0.2))
    asyncio.run(asyncio.wait_for(Stalled(max_tokens=1000).ask(app), TIMEOUT))
    assert app.state.endpoint.running == app.state.endpoint._answering.used == 0


def test_streams_and_answers_are_rows_of_one_batch(
    served: Running, rag: SacRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rag, "gatherer", Gatherer(rag.generator, size=4))
    rows: list[int] = []
    running, submitted = threading.Event(), threading.Event()

    def seen(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        rows.append(len(keywords["inputs_embeds"]))
        running.set()
        assert submitted.wait(TIMEOUT)

    handle = rag.generator.model.base_model.register_forward_pre_hook(seen, with_kwargs=True)
    with ThreadPoolExecutor(4) as clients:
        first = clients.submit(served.ask, max_tokens=30, stream=True)
        assert running.wait(TIMEOUT)
        others = [
            clients.submit(served.ask, max_tokens=30, stream=stream)
            for stream in (True, False, True)
        ]
        until(lambda: served.endpoint._answering.used == 4)
        until(lambda: len(rag.gatherer._waiting) == 3)
        submitted.set()
        answers = [client.result(TIMEOUT) for client in (first, *others)]
    handle.remove()
    assert max(rows) == 4
    whole = answers[2].json()["choices"][0]["message"]["content"]
    for answer in (answers[0], answers[1], answers[3]):
        *events, _ = events_of(answer.text)
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == whole


def test_a_body_that_does_not_arrive_is_408(service: Service) -> None:
    with running(service, limits=Limits(body_s=0.2)) as served:
        port = served.client.base_url.port
        assert port is not None
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert client.recv(12) == b"HTTP/1.1 408"


def test_many_streams_and_answers_at_the_same_time_are_all_right(served: Running) -> None:
    whole = served.ask(documents=DOCUMENTS).json()["choices"][0]["message"]["content"]
    texts: list[str] = []

    def ask(number: int) -> None:
        answer = served.ask(documents=DOCUMENTS, stream=bool(number % 2))
        if number % 2:
            pieces = [
                event["choices"][0]["delta"].get("content", "") for event in events_of(answer.text)
            ]
            texts.append("".join(pieces))
        else:
            texts.append(answer.json()["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [whole] * 12
