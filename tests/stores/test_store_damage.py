"""Damaged entries of a DiskStore are misses, and everything that is wrong is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.stores import file_of, index_of, key_of, make_kv

from sac_rag.errors import CorruptEntryError
from sac_rag.stores import DiskStore
from sac_rag.stores.disk.files import Files
from sac_rag.stores.disk.index import IndexRow

KEY = "ab" * 32
OTHER = "cd" * 32


def edited(edit: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        edit(data)
        path.write_bytes(data)

    return damage


def flipped(place: int) -> Callable[[Path], None]:
    def edit(data: bytearray) -> None:
        data[place] ^= 4

    return edited(edit)


def future(data: bytearray) -> None:
    data[:] = data.replace(b'"format":3', b'"format":9')


DAMAGE = {
    "truncated to a half": edited(lambda data: data.__delitem__(slice(len(data) // 2, None))),
    "truncated by a byte": edited(lambda data: data.pop()),
    "emptied": edited(lambda data: data.clear()),
    "lengthened": edited(lambda data: data.append(0)),
    "bit flipped in the magic": flipped(12),
    "bit flipped in the key": flipped(60),
    "bit flipped in the first tensor": flipped(800),
    "bit flipped at the end": flipped(-1),
    "zeroed": edited(lambda data: data.__setitem__(slice(None), bytes(len(data)))),
    "of a future format": edited(future),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_a_miss_and_is_quarantined(disk: DiskStore, damage: str) -> None:
    disk[KEY], disk[OTHER] = make_kv(1), make_kv(2)
    DAMAGE[damage](file_of(disk, KEY))
    damaged = file_of(disk, KEY).read_bytes()
    assert len(disk.check()) >= 1

    with pytest.raises(CorruptEntryError) as error:
        disk[KEY]
    assert error.value.reason == ("format" if "format" in damage else "corrupt")
    assert disk.quarantined == 1
    assert (disk.folder / "quarantine" / KEY).read_bytes() == damaged
    with pytest.raises(KeyError) as absent:  # gone, and no longer called corrupt
        disk[KEY]
    assert not isinstance(absent.value, CorruptEntryError)
    assert KEY not in disk

    disk.put(KEY, make_kv(1))
    assert disk[KEY].bit_equal(make_kv(1))
    assert disk[OTHER].bit_equal(make_kv(2))


def test_a_file_grown_to_a_terabyte_is_not_read(disk: DiskStore) -> None:
    disk[KEY] = make_kv()
    os.truncate(file_of(disk, KEY), 2**40)  # of holes, which take no room
    with pytest.raises(CorruptEntryError, match="its file has 1099511627776 bytes"):
        disk[KEY]


def test_two_entries_whose_files_were_swapped_are_both_misses(disk: DiskStore) -> None:
    disk[KEY], disk[OTHER] = make_kv(1), make_kv(2)
    first, second = file_of(disk, KEY), file_of(disk, OTHER)
    swapped = second.read_bytes(), first.read_bytes()
    first.write_bytes(swapped[0])
    second.write_bytes(swapped[1])
    for key in (KEY, OTHER):
        with pytest.raises(CorruptEntryError, match="this is the entry of key"):
            disk[key]
    assert disk.quarantined == 2


def test_two_entries_whose_rows_were_swapped_are_misses_and_no_file_is_lost(
    disk: DiskStore,
) -> None:
    disk[KEY], disk[OTHER] = make_kv(1), make_kv(2)
    with index_of(disk) as index:
        (theirs,) = index.execute("SELECT filename FROM Cache WHERE key = ?", (OTHER,)).fetchone()
        (mine,) = index.execute("SELECT filename FROM Cache WHERE key = ?", (KEY,)).fetchone()
        index.execute("UPDATE Cache SET filename = ? WHERE key = ?", (theirs, KEY))
    with pytest.raises(CorruptEntryError, match="its row is not one of a DiskStore"):
        disk[KEY]
    assert disk[OTHER].bit_equal(make_kv(2))
    (disk.folder / "entries" / mine).unlink()  # nobody's now


def test_an_entry_whose_file_was_deleted_is_a_miss_and_can_be_put_again(disk: DiskStore) -> None:
    disk.put(KEY, make_kv(), documents=["a"])
    file_of(disk, KEY).unlink()
    assert f"{KEY}: its file is gone" in disk.check()
    with pytest.raises(CorruptEntryError, match="its file is gone"):
        disk[KEY]
    disk.put(KEY, make_kv(), documents=["a"])
    assert disk[KEY].bit_equal(make_kv())


def test_an_entry_replaced_while_it_is_being_read_is_read_again(disk: DiskStore) -> None:
    class ReplacedMeanwhile(Files):
        @contextmanager
        def opened(self, row: IndexRow) -> Iterator[Callable[[int], memoryview]]:
            disk._entries.files = files
            disk[KEY] = make_kv(2)
            with super().opened(row) as first:
                yield first

    files = disk._entries.files
    disk[KEY] = make_kv(1)
    disk._entries.files = ReplacedMeanwhile(disk.folder)
    assert disk[KEY].bit_equal(make_kv(2))
    assert disk.quarantined == 0


def test_check_names_what_is_wrong_and_changes_nothing(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        for i in range(4):
            store.put(key_of(i), make_kv(i), documents=[f"document {i}"])
        flipped(-1)(file_of(store, key_of(0)))
        file_of(store, key_of(1)).unlink()
        stray = file_of(store, key_of(2)).with_name("stray")
        stray.write_bytes(b"?")
        with index_of(store) as index:
            index.execute("INSERT INTO Owner VALUES (x'ff', ?)", (key_of(3),))
            index.execute("UPDATE Settings SET value = 7 WHERE key = 'count'")
        problems = "\n".join(store.check())
        assert f"{key_of(0)}: checksum" in problems
        assert f"{key_of(1)}: its file is gone" in problems
        assert f"unknown file: {stray}" in problems
        assert f"{key_of(3)}: its document ids cannot be read" in problems
        assert "the count of all entries is noted as 7, is 4" in problems
        assert key_of(2) not in problems.replace(str(stray), "")
        assert "\n".join(store.check()) == problems
        assert store.quarantined == 0
