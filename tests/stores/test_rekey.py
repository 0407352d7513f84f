"""The key of a store is changed: half-finished, taken back, and while others have it open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.stores import file_of, index_of, key_of, make_kv

from sac_rag.errors import CorruptEntryError
from sac_rag.stores import DiskStore
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.entry import encode

A, B, C = Cipher(b"a" * 32), Cipher(b"b" * 32), Cipher(b"c" * 32)
ENTRIES = 6


class Stopped(Exception):
    """In place of the end of a process."""


def fill(folder: Path, cipher: Cipher | None) -> None:
    with DiskStore(folder, cipher=cipher) as store:
        for number in range(ENTRIES):
            store.put(key_of(number), make_kv(number), [f"document {number}"])


def stop_half_way(store: DiskStore, new: Cipher | None) -> None:
    seen = 0

    def stop(nbytes: int) -> None:
        nonlocal seen
        seen += 1
        if seen == ENTRIES // 2:
            raise Stopped

    with pytest.raises(Stopped):
        store.rekey(new, on_progress=stop)


def require_all(store: DiskStore) -> None:
    for number in range(ENTRIES):
        assert store[key_of(number)].bit_equal(make_kv(number))
        assert store.documents(key_of(number)) == (f"document {number}",)
    assert store.check() == []


def in_another_key(store: DiskStore, number: int, cipher: Cipher | None = B) -> None:
    """Puts bytes in another key under an entry's row, as an earlier version could."""
    data = encode(key_of(number), make_kv(number), cipher)
    file_of(store, key_of(number)).write_bytes(data)
    with index_of(store) as index:
        update = "UPDATE Cache SET size = ? WHERE key = ?"
        index.execute(update, (len(data), key_of(number)))


# What is there.


@pytest.mark.parametrize("repair", ["read", "put", "check"])
def test_an_entry_in_another_key_is_not_there_for_anybody_and_heals(
    tmp_path: Path, repair: str
) -> None:
    fill(tmp_path, A)
    with DiskStore(tmp_path, cipher=A) as store:
        in_another_key(store, 0)
        assert key_of(0) not in store
        with pytest.raises(KeyError):
            store.extent(key_of(0))
        assert len(store.check()) == 1
        if repair == "read":
            with pytest.raises(CorruptEntryError) as missing:
                store[key_of(0)]
            assert missing.value.reason == "secret"
        elif repair == "check":
            store.check(fix=True)
        if repair != "put":
            assert store.check() == []
            assert store.why_absent(key_of(0)) == "secret"
        store.put(key_of(0), make_kv(0))
        require_all(store)


# Half-finished.


@pytest.mark.parametrize(("old", "new"), [(A, B), (None, B), (A, None)])
def test_a_change_that_was_stopped_is_finished_later_and_nothing_is_lost(
    tmp_path: Path, old: Cipher | None, new: Cipher | None
) -> None:
    fill(tmp_path, old)
    with DiskStore(tmp_path, cipher=old) as store:
        stop_half_way(store, new)
    with pytest.raises(ValueError, match="not finished: repeat"):
        DiskStore(tmp_path, cipher=new)
    with DiskStore(tmp_path, cipher=old) as store:
        there = [number for number in range(ENTRIES) if key_of(number) in store]
        assert there == [n for n in range(ENTRIES) if store.get(key_of(n)) is not None]
        assert 0 < len(there) < ENTRIES
        assert store.quarantined == 0
        assert any("begun and not finished" in problem for problem in store.check(fix=True))
        assert store.gc().nbytes == 0
        assert store.rekey(new) == len(there)
        require_all(store)
    with DiskStore(tmp_path, cipher=new) as store:
        require_all(store)


def test_a_change_to_a_third_key_is_refused_until_the_first_is_finished(tmp_path: Path) -> None:
    fill(tmp_path, A)
    with DiskStore(tmp_path, cipher=A) as store:
        stop_half_way(store, B)
        with pytest.raises(ValueError, match=f"encrypted with key {B.id}.*finish it first"):
            store.rekey(C)
        store.rekey(B)
        assert store.rekey(C) == ENTRIES
        require_all(store)


def test_a_change_is_taken_back_with_the_old_key(tmp_path: Path) -> None:
    fill(tmp_path, A)
    with DiskStore(tmp_path, cipher=A) as store:
        stop_half_way(store, B)
        there = [number for number in range(ENTRIES) if key_of(number) in store]
        assert store.rekey(A) == 0
        assert store.check() == []
        assert sorted(store) == sorted(map(key_of, there))
        for number in set(range(ENTRIES)) - set(there):
            assert store.why_absent(key_of(number)) == "secret"
            store.put(key_of(number), make_kv(number), [f"document {number}"])
        assert store.rekey(C) == ENTRIES
        require_all(store)


def test_what_is_put_in_the_midst_of_a_change_is_changed_too(tmp_path: Path) -> None:
    fill(tmp_path, A)
    with DiskStore(tmp_path, cipher=A) as store, DiskStore(tmp_path, cipher=A) as other:

        def put_again(nbytes: int) -> None:
            other[key_of(0)] = make_kv(0)
            other.put(key_of(ENTRIES), make_kv(ENTRIES), ["new"])

        store.rekey(B, on_progress=put_again)
        require_all(store)
        assert store[key_of(ENTRIES)].bit_equal(make_kv(ENTRIES))
        assert store.keys_of("new") == [key_of(ENTRIES)]


# Others that have it open.

WRITES: dict[str, Callable[[DiskStore], Any]] = {
    "put": lambda store: store.put(key_of(9), make_kv(9), ["late"]),
    "put what is there": lambda store: store.put(key_of(0), make_kv(0), ["late"]),
    "overwrite": lambda store: store.__setitem__(key_of(0), make_kv(9)),
    "offer": lambda store: store.offer(key_of(9), make_kv(9)),
    "forget": lambda store: store.forget("document 0"),
    "replace": lambda store: store.replace_document("document 0", []),
    "documents": lambda store: store.documents(key_of(0)),
    "keys of": lambda store: store.keys_of("document 0"),
    "pin": lambda store: store.pin([key_of(0)]),
    "rekey": lambda store: store.rekey(C),
    "check": lambda store: store.check(fix=True),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(("old", "new"), [(A, B), (None, B), (A, None)])
def test_with_the_old_key_nothing_is_written_missed_or_broken(
    tmp_path: Path, write: str, old: Cipher | None, new: Cipher | None
) -> None:
    fill(tmp_path, old)
    with DiskStore(tmp_path, cipher=old) as stale, DiskStore(tmp_path, cipher=old) as store:
        assert store.rekey(new) == ENTRIES
        with pytest.raises(PermissionError, match=r"by now, .* open it again with its key"):
            WRITES[write](stale)
        with pytest.raises(CorruptEntryError) as missing:
            stale[key_of(1)]
        assert missing.value.reason == "secret"
        assert stale.quarantined == 0
        require_all(store)
        assert store.rekey(C) == ENTRIES
        require_all(store)
        assert store.forget("document 0") == 1


def test_document_ids_that_no_key_opens_do_not_stop_a_change(tmp_path: Path) -> None:
    """As earlier versions could leave them."""
    fill(tmp_path, A)
    with DiskStore(tmp_path, cipher=A) as store:
        with index_of(store) as index:
            sealed = C.seal(b"late")
            index.execute("INSERT INTO Owner VALUES (?, ?)", (sealed, key_of(0)))
        assert store.rekey(B) == ENTRIES
        require_all(store)
