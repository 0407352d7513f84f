"""Where a store takes several strings, one string is refused: its letters are nobody's keys."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.stores import bytes_in, key_of, make_kv

from sac_rag import archive
from sac_rag.compressors.full import Full
from sac_rag.origin import Origin
from sac_rag.stores import DiskStore, DocumentStore, MemoryStore
from sac_rag.stores.base import MappingStore

FINGERPRINT = "ef" * 32
CONFIG = Full.default_config()
ORIGIN = Origin(CONFIG.fingerprint_fields(), CONFIG)

CALLS: dict[str, Callable[[DiskStore], Any]] = {
    "gc": lambda store: store.gc(keep_fingerprints=FINGERPRINT),
    "gc, a number": lambda store: store.gc(keep_fingerprints=[FINGERPRINT, 7]),  # type: ignore[list-item]
    "gc, bytes": lambda store: store.gc(keep_fingerprints=b"ef"),  # type: ignore[arg-type]
    "pin": lambda store: store.pin(key_of(0)),
    "unpin": lambda store: store.unpin(key_of(0)),
    "put": lambda store: store.put(key_of(0), make_kv(), "abc"),
    "put a new one": lambda store: store.put(key_of(5), make_kv(), "abc"),
    "offer": lambda store: store.offer(key_of(5), make_kv(), "abc"),
    "put a number": lambda store: store.put(key_of(0), make_kv(), [7]),  # type: ignore[list-item]
    "forget a list": lambda store: store.forget(["a", "b"]),  # type: ignore[arg-type]
    "forget a path": lambda store: store.forget(Path("a")),  # type: ignore[arg-type]
    "replace": lambda store: store.replace_document("a", key_of(0)),
    "replace several": lambda store: store.replace_documents({"a": [], "b": key_of(0)}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_disk_store_refuses_it_and_changes_nothing(disk: DiskStore, call: str) -> None:
    disk.put(key_of(0), make_kv(), ["a"], fingerprint=FINGERPRINT)
    disk.stats()
    before = bytes_in(disk.folder / "entries")
    with pytest.raises(TypeError, match=r"must be (several )?str, .*was"):
        CALLS[call](disk)
    assert bytes_in(disk.folder / "entries").keys() == before.keys()
    assert disk[key_of(0)].bit_equal(make_kv())
    assert disk.documents(key_of(0)) == ("a",)


@pytest.mark.parametrize("store", [MemoryStore(), MappingStore({})], ids=["memory", "dict"])
@pytest.mark.parametrize("name", ["put", "offer"])
def test_every_other_store_does_too(store: DocumentStore, name: str) -> None:
    with pytest.raises(TypeError, match="documents must be several str, was one str: 'abc'"):
        getattr(store, name)(key_of(0), make_kv(), "abc")
    assert len(store) == 0


def test_an_archive_does_too_when_it_is_written_and_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    with pytest.raises(TypeError, match="documents must be several str, was one str: 'abc'"):
        archive.write(path, ORIGIN, [(key_of(0), make_kv(), "abc", None)])
    assert not path.exists()
    archive.write(path, ORIGIN, [(key_of(0), make_kv(), ["a.txt"], None)])
    planted = path.read_bytes()
    listed = planted[planted.rindex(b'"documents": [') :].partition(b"]")[0] + b"]"
    letters = b'"documents": "a.txt"'.ljust(len(listed))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "other", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(listed, letters))
    with pytest.raises(ValueError, match="documents must be several str, was one str"):
        archive.Archive(tmp_path / "other")


def test_a_pipe_is_no_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no plain file"):
        archive.Archive(tmp_path / "pipe")
