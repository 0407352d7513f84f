"""A server on this machine that speaks S3's protocol, in the environment that `make s3` sets up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import fsspec
import pytest

# A parameter of fixtures, where the server is installed.
S3 = ["s3"] if find_spec("moto") and find_spec("s3fs") else []


@contextmanager
def s3_bucket() -> Iterator[str]:
    """Starts the server; yields the URL of a bucket, which fsspec can open."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    address, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{address}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        fsspec.filesystem("s3").mkdir("anchors")
        yield "s3://anchors"
    server.stop()
