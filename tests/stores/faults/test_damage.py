"""Bits flip and files are cut short, anywhere in a store."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from support.models import PROSE, make_compressor
from support.stores import file_of, key_of, make_kv

from sac_rag import SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.errors import CorruptEntryError
from sac_rag.lm.generator import Generator
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import DiskStore
from sac_rag.stores.cipher import Cipher

QUESTION = "Who counted the ships?"
SHORT = Decoding(max_new_tokens=4)


def damaged(data: bytes, order: random.Random) -> bytes:
    """With one bit flipped, or cut short."""
    if order.random() < 0.5:
        return data[: order.randrange(len(data))]
    place = order.randrange(len(data))
    flipped = data[place] ^ 1 << order.randrange(8)
    return data[:place] + bytes([flipped]) + data[place + 1 :]


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no power cut in these tests, and flushing takes most of the time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.usefixtures("unflushed")
@pytest.mark.parametrize("cipher", [None, Cipher(b"k" * 32)], ids=["plain", "encrypted"])
def test_no_damage_to_an_entry_goes_unseen(
    cipher: Cipher | None, tmp_path: Path, counts: Counter[str], times: int
) -> None:
    order = random.Random(1)
    with DiskStore(tmp_path, cipher=cipher) as store:
        for number in range(20):
            store.put(key_of(number), make_kv(number), ["a"])
        for attempt in range(600 * times):
            number = order.randrange(20)
            path = file_of(store, key_of(number))
            path.write_bytes(damaged(path.read_bytes(), order))
            with pytest.raises(CorruptEntryError) as refused:
                store[key_of(number)]
            assert refused.value.reason in ("corrupt", "format", "secret")
            if refused.value.reason == "secret":
                del store[key_of(number)]  # as its owner would have to
            assert store.get(key_of(number)) is None
            store.put(key_of(number), make_kv(number), ["a"])
            if attempt % 50 == 0:
                assert all(store[key_of(n)].bit_equal(make_kv(n)) for n in range(20))
        assert store.check() == []
    counts["bit flips and truncations of entries, all refused"] += 600 * times


@pytest.mark.usefixtures("unflushed")
def test_no_damage_to_the_index_gives_a_wrong_value(
    tmp_path: Path, counts: Counter[str], times: int
) -> None:
    order = random.Random(2)
    with DiskStore(tmp_path / "before") as store:
        for number in range(10):
            store.put(key_of(number), make_kv(number), [str(number)], text_id="aa")
    index = (tmp_path / "before" / "entries" / "cache.db").read_bytes()
    survived = 0
    for _ in range(150 * times):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "store")
        (tmp_path / "store" / "entries" / "cache.db").write_bytes(damaged(index, order))
        with suppress(OSError, ValueError), DiskStore(tmp_path / "store") as store:
            for number in range(10):
                with suppress(KeyError, OSError):
                    assert store[key_of(number)].bit_equal(make_kv(number))
                    survived += 1
                with suppress(OSError):
                    store.why_absent(key_of(number))
            with suppress(OSError):
                store.put(key_of(50), make_kv(), ["x"])
    assert survived > 0
    counts["bit flips and truncations of the index, no wrong value"] += 150 * times


@pytest.mark.usefixtures("unflushed")
def test_every_question_is_answered_as_without_damage(
    llama: Generator, tmp_path: Path, counts: Counter[str], times: int
) -> None:
    """Whether an entry is bad, or the index under a store that is open."""
    order = random.Random(3)
    compressor = make_compressor(llama, "sac")
    expected = SacRAG(CachedCompressor(compressor, {})).answer(QUESTION, PROSE[:3], SHORT).text
    hits = 0
    for attempt in range(60 * times):
        if attempt % 10 == 0:
            shutil.rmtree(tmp_path / "store", ignore_errors=True)
            store = DiskStore(tmp_path / "store")
            rag = SacRAG(CachedCompressor(compressor, store))
        assert rag.answer(QUESTION, PROSE[:3], SHORT).text == expected
        files = sorted(store.folder.glob("entries/*/*.kv"))
        for path in order.sample(files, min(2, len(files))):
            path.write_bytes(damaged(path.read_bytes(), order))
        if attempt % 10 == 8:
            path = store.folder / "entries" / order.choice(["cache.db", "cache.db-wal"])
            path.write_bytes(damaged(path.read_bytes(), order))
        answer = rag.answer(QUESTION, PROSE[:3], SHORT)
        assert answer.text == expected
        hits += sum(chunk.status == "hit" for chunk in answer.chunks)
        if attempt % 10 == 9:
            store.close()
    assert hits >= 30 * times
    counts["questions answered right from damaged stores"] += 60 * times
