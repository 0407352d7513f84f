"""The disk is full, at any step of whatever a store does."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from scenes import SCENES, make, require
from support.models import PROSE, make_compressor
from support.stores import key_of, make_kv
from test_kill import child

from sac_rag import SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.lm.generator import Generator
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import DiskStore
from sac_rag.stores.disk.database import Connection

QUESTION = "Who counted the ships?"
SHORT = Decoding(max_new_tokens=4)
# What takes room: the others work on a full disk.
WRITES = re.compile(r"INSERT|UPDATE|REPLACE|DELETE|COMMIT|VACUUM|REINDEX", re.IGNORECASE)


class FullDisk:
    """From one step on, everything that takes room fails; counts the steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.full_from = sys.maxsize

    def step(self) -> None:
        self.steps += 1
        if self.steps >= self.full_from:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk_space(monkeypatch: pytest.MonkeyPatch) -> Iterator[FullDisk]:
    space = FullDisk()

    class FullConnection(Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if WRITES.match(sql):
                try:
                    space.step()
                except OSError as error:
                    raise sqlite3.OperationalError("database or disk is full") from error
            return super().execute(sql, *parameters)

        def __exit__(self, *error: Any) -> Any:  # COMMIT, where there was no error
            if error == (None, None, None):
                try:
                    space.step()
                except OSError as full:
                    self.rollback()
                    raise sqlite3.OperationalError("database or disk is full") from full
            return super().__exit__(*error)

    def failing(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            if name != "open" or arguments[1] & os.O_CREAT:
                space.step()
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, name, call)

    connect = sqlite3.connect

    def connect_full(*arguments: Any, **keywords: Any) -> sqlite3.Connection:
        return connect(*arguments, **{**keywords, "factory": FullConnection})

    monkeypatch.setattr(sqlite3, "connect", connect_full)
    for name in ("open", "fsync", "replace", "mkdir"):
        failing(name)
    yield space
    space.full_from = sys.maxsize


@pytest.mark.parametrize("name", [name for name in SCENES if name != "quarantine"])
def test_a_full_disk_is_an_os_error_and_leaves_the_store_as_it_was_or_as_it_should_be(
    name: str, tmp_path: Path, disk_space: FullDisk, counts: Counter[str]
) -> None:
    scene = SCENES[name]
    make(tmp_path / "before", scene)

    def run(full_from: int) -> bool:
        disk_space.full_from = sys.maxsize
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "store")
        with DiskStore(tmp_path / "store", scene.max_bytes, cipher=scene.cipher) as store:
            disk_space.steps, disk_space.full_from = 0, full_from
            try:
                scene.act(store)
            except OSError as error:
                assert str(store.folder) in str(error)
                return False
            finally:
                disk_space.full_from = sys.maxsize
            return True

    assert run(sys.maxsize)
    steps = disk_space.steps
    assert steps >= 2
    for step in range(1, steps + 1):
        finished = run(step)
        require(tmp_path / "store", name, finished)
        counts["steps at which the disk was full, store in order"] += 1


def test_every_question_is_answered_on_a_full_disk(
    llama: Generator, tmp_path: Path, disk_space: FullDisk, counts: Counter[str]
) -> None:
    compressor = make_compressor(llama, "sac")
    expected = SacRAG(CachedCompressor(compressor, {})).answer(QUESTION, PROSE[:2], SHORT).text
    for full_from in range(1, 40, 3):
        with DiskStore(tmp_path / str(full_from)) as store:
            rag = SacRAG(CachedCompressor(compressor, store))
            rag.answer(QUESTION, PROSE[:1], SHORT)
            for path in store.folder.glob("entries/*/*.kv"):
                path.write_bytes(path.read_bytes()[:-1])  # which must be quarantined, too
            disk_space.steps, disk_space.full_from = 0, full_from
            assert rag.answer(QUESTION, PROSE[:2], SHORT).text == expected
            disk_space.full_from = sys.maxsize
            assert rag.answer(QUESTION, PROSE[:2], SHORT).text == expected
            store.check(fix=True)
            assert store.check() == []
            counts["questions answered right on a full disk"] += 1


# --- a disk that is really full, or really read-only


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of its own, seen by this process alone; yields a function that remounts it."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user = 0x00020000, 0x10000000
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_namespace | (new_user if user else 0)):
        raise NotImplementedError
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    private, remount, read_only = 0x40000 | 0x4000, 32, 1

    def mount(flags: int, options: str) -> None:
        target = b"/" if flags & private else bytes(place)
        if libc.mount(b"tmpfs", target, b"tmpfs", flags, options.encode()):
            raise NotImplementedError

    mount(private, "")
    mount(0, f"size={size}")
    yield lambda how: mount(remount | (read_only if how == "read-only" else 0), f"size={size}")


def on_small_disk(place: Path, work: Callable[[Callable[[str], None]], None]) -> None:
    def do(pipe: int) -> None:
        try:
            with small_disk(place, "1m") as remount:
                work(remount)
        except NotImplementedError:
            os.write(pipe, b"impossible")

    status, said = child(do)
    if said == b"impossible":
        pytest.skip("this system lets us mount nothing")
    assert status == 0


def test_a_disk_that_really_is_full(tmp_path: Path, counts: Counter[str]) -> None:
    def work(remount: Callable[[str], None]) -> None:
        with DiskStore(tmp_path / "store") as store:
            stored = set()
            for number in range(30):
                with suppress(OSError):
                    store.put(key_of(number), make_kv(number, anchors=512), ["a"])
                    stored.add(number)
            assert 2 < len(stored) < 15
            for number in range(30):
                kv = store.get(key_of(number))
                assert (kv is not None) == (number in stored)
                assert kv is None or kv.bit_equal(make_kv(number, anchors=512))
            for number in stored - {0}:
                del store[key_of(number)]  # which makes room again
            store[key_of(50)] = make_kv(50, anchors=512)
            assert store[key_of(50)].bit_equal(make_kv(50, anchors=512))
            assert store[key_of(0)].bit_equal(make_kv(0, anchors=512))
            assert store.check() == []

    on_small_disk(tmp_path, work)
    counts["writes to a disk of 1 MiB, refused or kept"] += 30


def test_a_read_only_mount_is_read(tmp_path: Path) -> None:
    def work(remount: Callable[[str], None]) -> None:
        with DiskStore(tmp_path / "store") as store:
            store.put(key_of(0), make_kv(), ["a"])
        remount("read-only")
        with DiskStore(tmp_path / "store", read_only=True) as store:
            assert store[key_of(0)].bit_equal(make_kv())
            assert store.check() == []
            assert store.stats().entries == 1
        with pytest.raises(OSError, match=re.escape(str(tmp_path))):
            DiskStore(tmp_path / "store")

    on_small_disk(tmp_path, work)
