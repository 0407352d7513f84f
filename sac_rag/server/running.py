"""Runs the app with uvicorn until a signal, and ends without losing a request."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from sac_rag.server.app import Endpoint
from sac_rag.server.auth import TOKENS_VARIABLE, Tokens, is_loopback

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A server that refuses new requests with 503 from a first signal on, and answers the others.

    A second signal ends it at once.

    Attributes:
        endpoint: Knows which requests are running.
    """

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.endpoint: Endpoint = app.state.endpoint
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the end, at a signal."""
        if self.endpoint.is_draining:
            super().handle_exit(sig, frame)
            return
        self._deadline = time.monotonic() + self.endpoint.limits.drain_s
        self.endpoint.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every 0.1 s; returns whether it must end."""
        if self.endpoint.is_draining:
            is_late = time.monotonic() > self._deadline
            self.should_exit = self.should_exit or is_late or not self.endpoint.running
        return await super().on_tick(counter)


def serve(
    app: FastAPI,
    host: str,
    port: int,
    *,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    on_start: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        app: The app of `make_app`.
        host: Address or name to listen at. Others than this machine's need tokens.
        port: Port; 0 for a free one.
        tls_cert: File with the certificate and its chain; None for HTTP.
        tls_key: File with its key, if it is not in the same file.
        on_start: Called with the URL when connections are accepted.

    Raises:
        ValueError: for a host that needs tokens where there are none.
        OSError: if the port is not free.
    """
    server = make_server(app, host, tls_cert=tls_cert, tls_key=tls_key)
    listener = listen(host, port)
    scheme = "https" if server.config.is_ssl else "http"
    name = f"[{host}]" if ":" in host else host
    on_start(f"{scheme}://{name}:{listener.getsockname()[1]}/v1")
    server.run(sockets=[listener])


def make_server(
    app: FastAPI, host: str, *, tls_cert: Path | None = None, tls_key: Path | None = None
) -> Server:
    """The server of an app; see `serve`."""
    endpoint: Endpoint = app.state.endpoint
    require_tokens(host, endpoint.tokens)
    if tls_key is not None and tls_cert is None:
        raise ValueError("a TLS key needs its certificate: give both")
    if tls_cert is None and not is_loopback(host):
        log.warning("%s is served without TLS: tokens and texts travel unencrypted", host)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=2,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )
    config.load()
    return Server(app, config)


def require_tokens(host: str, tokens: Tokens) -> None:
    """Raises ValueError for a host that others than this machine reach, without tokens."""
    if not is_loopback(host) and not tokens:
        raise ValueError(
            f"{host} can be reached from other machines, which needs bearer tokens: set "
            f"{TOKENS_VARIABLE}, or give a file of them (--tokens), or serve on 127.0.0.1"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: if the address cannot be listened at, naming it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error
