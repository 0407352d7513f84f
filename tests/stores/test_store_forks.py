"""A store in forked children, whatever the threads of their parent were doing."""

from __future__ import annotations

import os
import threading

import pytest
from support.forks import TIMEOUT_S, exit_of
from support.stores import key_of, make_kv

from sac_rag import forks
from sac_rag.stores import DiskStore

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def test_a_fork_waits_for_the_transaction_of_another_thread(disk: DiskStore) -> None:
    index = disk._entries.index
    begun, forking = threading.Event(), threading.Event()
    committed = []

    def write() -> None:
        with forks.held_off(), index.transaction():
            begun.set()
            assert forking.wait(TIMEOUT_S)
            threading.Event().wait(0.2)  # where a fork does not wait, it comes now
            index.set_meta("written", 1)
            committed.append(True)

    def stores() -> bool:
        disk.put(key_of(0), make_kv())
        return committed == [True] and index.meta("written") == 1

    thread = threading.Thread(target=write)
    thread.start()
    assert begun.wait(TIMEOUT_S)
    forking.set()
    assert exit_of(stores) == 0
    thread.join()
    assert key_of(0) in disk


def test_what_a_child_stores_outlives_the_connections_of_its_parent(disk: DiskStore) -> None:
    used = threading.Event()
    (child_has_stored, stored), (parent_has_closed, closed) = os.pipe(), os.pipe()

    def use() -> None:
        assert not len(disk)
        used.set()
        os.read(child_has_stored, 1)
        disk.close()  # of the parent's connections the last one
        disk.put(key_of(0), make_kv())
        os.write(closed, b"1")

    def stores() -> bool:
        disk.put(key_of(1), make_kv())
        os.write(stored, b"1")
        os.read(parent_has_closed, 1)
        disk.put(key_of(2), make_kv())
        return True

    disk.close()
    thread = threading.Thread(target=use)
    thread.start()
    assert used.wait(TIMEOUT_S)
    assert exit_of(stores) == 0
    os.write(stored, b"0")  # for the thread, where the child has failed
    thread.join()
    for end in (child_has_stored, stored, parent_has_closed, closed):
        os.close(end)
    assert set(disk) == {key_of(0), key_of(1), key_of(2)}
