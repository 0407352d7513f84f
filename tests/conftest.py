"""Fixtures: tiny models, stores, a cache folder of the test's own."""

from __future__ import annotations

import os
import signal
import uuid

# As the command line does, and before torch is imported: see sac_rag.cli.main.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import ARCHITECTURES, make_model, make_tokenizer
from support.redis_server import RedisServer
from support.s3_server import S3, s3_bucket
from transformers import (
    PreTrainedTokenizerFast,
)

from sac_rag.lm.generator import Generator
from sac_rag.stores import AnchorStore, DiskStore, MemoryStore, TieredStore

# pytest-xdist's processes ignore Ctrl-C, and what they start would inherit that: there are tests
# that send one.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Matrices this small are slower on two threads than on one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_generator(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Generator]:
    """Makes a generator of a tiny model; equal arguments give equal weights."""

    def make(architecture: str = "llama", attention: str = "sdpa", seed: int = 0) -> Generator:
        return Generator(make_model(architecture, attention, seed), tokenizer)

    return make


@pytest.fixture(scope="session", params=ARCHITECTURES)
def generator(request: pytest.FixtureRequest, make_generator: Any) -> Generator:
    """One tiny generator of every architecture, shared by all tests: they must not change it."""
    made: Generator = make_generator(request.param)
    return made


@pytest.fixture(scope="session")
def llama(make_generator: Any) -> Generator:
    """A tiny Llama for what does not depend on the architecture; tests must not change it."""
    made: Generator = make_generator("llama")
    return made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    """A store on disk that is found to be in order at the end of the test."""
    with DiskStore(tmp_path / "store") as store:
        yield store
        assert store.check() == []


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis server for all tests of a process."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def redis_store(redis_url: str) -> Iterator[Any]:
    """An empty RedisStore of the test's own."""
    from sac_rag.stores.redis import RedisStore

    with RedisStore(redis_url, prefix=f"{uuid.uuid4().hex}:") as store:
        yield store
        store.clear()


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[Any]:
    """Shards of a few entries each, in a folder."""
    from sac_rag.stores.objects import ObjectStore

    with ObjectStore(str(tmp_path / "objects"), shard_bytes=4000) as store:
        yield store


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """URL of an S3 bucket for all tests of a process."""
    with s3_bucket() as url:
        yield url


@pytest.fixture
def s3_objects(bucket: str) -> Iterator[Any]:
    """Shards of a few entries each, in a bucket."""
    from sac_rag.stores.objects import ObjectStore

    with ObjectStore(f"{bucket}/{uuid.uuid4().hex}", shard_bytes=4000) as store:
        yield store


@pytest.fixture
def tiered(disk: DiskStore) -> Iterator[TieredStore]:
    """Memory before a disk."""
    with TieredStore([MemoryStore(), disk]) as store:
        yield store


@pytest.fixture(params=["dict", "memory", "disk", "redis", "tiered", "objects", *S3])
def store(request: pytest.FixtureRequest) -> AnchorStore:
    """Every kind of store, empty."""
    if request.param == "dict":
        return {}
    if request.param == "memory":
        return MemoryStore()
    name = {"redis": "redis_store", "s3": "s3_objects"}.get(request.param, request.param)
    found: AnchorStore = request.getfixturevalue(name)
    return found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, so that no record of another run is believed."""
    monkeypatch.setenv("SAC_RAG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# What tests/faults inflicted on stores, and what came of it: told at the end of the run.
_FAULTS: Counter[str] = Counter()


@pytest.fixture
def counts() -> Counter[str]:
    """What is inflicted, by name."""
    return _FAULTS


@pytest.fixture
def times() -> int:
    """How many times as much to inflict as by default."""
    return int(os.environ.get("SAC_RAG_FAULTS", "1"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # in one of pytest-xdist's processes
        session.config.workeroutput["faults"] = dict(_FAULTS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _FAULTS.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FAULTS:
        terminalreporter.section("faults inflicted on stores")
        for name, count in sorted(_FAULTS.items()):
            terminalreporter.write_line(f"{count:7d}  {name}")


@pytest.fixture(scope="session", autouse=True)
def _no_hub() -> None:
    """No test may need the network; a library that tries fails at once."""
    import huggingface_hub.constants as hub

    hub.HF_HUB_OFFLINE = True
