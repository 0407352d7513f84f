"""A Redis server of the test's own, on a free port and in its own folder."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

import pytest


def binary() -> str:
    """The server that is installed; the test is skipped where there is none."""
    pytest.importorskip("redis")
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    pytest.skip("neither redis-server nor valkey-server is installed")


class RedisServer:
    """A server that can be killed and started again on the same port; it saves nothing.

    Attributes:
        url: Where it listens, as RedisStore takes it.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self._binary = binary()
        self._folder = folder
        self._options = options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and returns when it answers."""
        import redis

        self._folder.mkdir(exist_ok=True)
        command = [self._binary, "--port", str(self._port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "no", "--dir", str(self._folder), *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            for _ in range(600):
                assert self._process.poll() is None, "the server has ended"
                try:
                    client.ping()
                    return
                except redis.exceptions.ConnectionError:
                    time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        """Ends it without a word, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
