"""A forked child answers, whatever the threads of its parent were doing."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from support.forks import TIMEOUT_S, exit_of
from support.models import PROSE, make_compressor

from sac_rag import forks
from sac_rag.cached import CachedCompressor
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import DiskStore, MemoryStore

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_children_of_a_process_whose_threads_answer_do_not_hang(
    llama: Generator, kind: str, tmp_path: Path
) -> None:
    store = MemoryStore() if kind == "memory" else DiskStore(tmp_path / "store")
    rag = SacRAG(CachedCompressor(make_compressor(llama, "full"), store))
    short = Decoding(max_new_tokens=1)
    expected = rag.answer("What?", PROSE[:1], short).text
    stop = threading.Event()

    def answers() -> bool:
        return rag.answer("What?", PROSE[:1], short).text == expected

    def load(number: int) -> None:
        while not stop.is_set():
            rag.answer(f"What {number}?", [PROSE[number], f"{number} {time.monotonic()}"], short)

    threads = [threading.Thread(target=load, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        exits = [exit_of(answers) for _ in range(4)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert exits == [0] * 4


def test_a_lock_that_another_thread_holds_is_free_in_the_child(llama: Generator) -> None:
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with llama.running():
            held.set()
            assert leave.wait(TIMEOUT_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(TIMEOUT_S)
    try:
        assert exit_of(lambda: bool(make_compressor(llama, "full").compress(PROSE[:1]))) == 0
    finally:
        leave.set()
        thread.join()


def test_what_is_renewed_is_not_kept_alive() -> None:
    class Owner:
        def __init__(self) -> None:
            self.lock = forks.lock(self, "lock")

    before = len(forks._renewals)
    owners = [Owner() for _ in range(3)]
    assert len(forks._renewals) == before + 3
    owner = owners[0]
    first = owner.lock
    assert exit_of(lambda owner=owner: owner.lock is not first) == 0
    assert owner.lock is first
    del owner, owners
    assert len(forks._renewals) == before
