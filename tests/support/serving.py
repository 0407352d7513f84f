"""A server of a tiny model, in a thread, at a port of its own."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from sac_rag.lm.generator import Generator
from sac_rag.server.app import Endpoint, make_app
from sac_rag.server.auth import Tokens
from sac_rag.server.limits import Limits
from sac_rag.server.running import Server, listen, make_server
from sac_rag.server.service import Service

TIMEOUT = 120  # seconds; generous, since the machine may be busy


class WordEmbedder:
    """Bags of words: texts with the same words are near."""

    identity = "words"
    dimension = 64

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        vectors = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        server: Runs in `thread`.
        client: Sends requests to it.
    """

    server: Server
    thread: threading.Thread
    client: httpx.Client

    @property
    def endpoint(self) -> Endpoint:
        return self.server.endpoint

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    def ask(self, token: str | None = None, **fields: Any) -> httpx.Response:
        """Sends a chat completion."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "What is it?"}], **fields}
        return self.send(json.dumps(body).encode(), token)

    def send(self, body: bytes, token: str | None = None) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        return self.client.post("/v1/chat/completions", content=body, headers=headers)


@contextmanager
def running(
    service: Service, tokens: Sequence[str] = (), limits: Limits | None = None
) -> Iterator[Running]:
    app = make_app(service, Tokens(list(tokens)), limits)
    listener = listen("127.0.0.1", 0)
    server = make_server(app, "127.0.0.1")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False) as client:
            yield Running(server, thread, client)
    finally:
        server.should_exit = True
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def events_of(text: str) -> list[Any]:
    """The JSON of a stream's events; the last must be [DONE]."""
    *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


class Blocker:
    """Holds a model before its next forward pass until it is released.

    Attributes:
        reached: Set when a pass waits.
        passes: Number of passes that have begun.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.released = threading.Event()
        self.passes = 0

    def __call__(self, module: Any, arguments: Any) -> None:
        self.passes += 1
        self.reached.set()
        assert self.released.wait(TIMEOUT)


@contextmanager
def blocked(generator: Generator) -> Iterator[Blocker]:
    blocker = Blocker()
    embeddings = generator.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(blocker)
    try:
        yield blocker
    finally:
        blocker.released.set()
        handle.remove()


def until(claim: Callable[[], bool]) -> None:
    """Waits for something that happens in another thread."""
    for _ in range(TIMEOUT * 50):
        if claim():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it did not happen")
