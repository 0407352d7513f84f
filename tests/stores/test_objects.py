"""ObjectStore: shards, ranged reads, compaction, several readers beside one writer, damage."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from support.models import PROSE, make_compressor
from support.s3_server import S3
from support.stores import key_of, make_kv

from sac_rag.cached import CachedCompressor
from sac_rag.errors import CorruptEntryError
from sac_rag.lm.generator import Generator
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.objects import ObjectStore

KEY = "ab" * 32
SHARD = 10_000  # about five entries of `make_kv`


@pytest.fixture(params=["memory", "local", *S3])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "store")
        return
    base = "memory:/" if request.param == "memory" else request.getfixturevalue("bucket")
    url = f"{base}/{uuid.uuid4().hex}"
    yield url
    fs, root = fsspec.core.url_to_fs(url)
    if fs.exists(root):
        fs.rm(root, recursive=True)


def objects_at(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    return {path: fs.cat_file(path) for path in fs.find(root)}


def shards_at(url: str) -> list[str]:
    return [path for path in objects_at(url) if path.endswith(".shard")]


def filled(url: str, count: int = 20, **options: object) -> ObjectStore:
    store = ObjectStore(url, shard_bytes=SHARD, **options)  # type: ignore[arg-type]
    for number in range(count):
        store.put(key_of(number), make_kv(number), [f"document {number}"], fingerprint="f1")
    store.flush()
    return store


def test_many_entries_are_few_objects_and_each_read_is_one_request(url: str) -> None:
    filled(url)
    assert 2 <= len(shards_at(url)) <= 10
    with ObjectStore(url, read_only=True) as reader:
        before = reader.objects.requests
        for number in range(20):
            assert reader[key_of(number)].bit_equal(make_kv(number))
        assert reader.objects.requests - before == 20
        assert reader.documents(key_of(3)) == ("document 3",)
        assert reader.origin_of(key_of(3)) == (None, "f1")


def test_of_a_large_entry_little_more_is_read_than_is_wanted(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ObjectStore(url) as store:
        store[KEY] = make_kv(1, anchors=20_000)
        store.flush()
        read: list[int] = []
        cat = store.objects.fs.cat_ranges

        def counting(paths: list[str], starts: list[int], ends: list[int], **options: str) -> list:
            read.extend(end - start for start, end in zip(starts, ends, strict=True))
            return cat(paths, starts, ends, **options)

        # The instance is fsspec's, shared by all tests.
        with monkeypatch.context() as patch:
            patch.setattr(store.objects.fs, "cat_ranges", counting)
            kv = store.read(KEY, lambda _: 10)
        assert kv.bit_equal(make_kv(1, anchors=20_000).first(10))
        assert len(read) == 2
        assert sum(read) < store._places()[0][1].nbytes / 2


def test_nothing_of_a_forgotten_document_is_left_after_compaction(url: str) -> None:
    with filled(url) as store:
        data = store._fetch({key_of(3): None})[key_of(3)]
        assert data is not None
        gone = [key_of(3).encode(), b"document 3", data.data[-200:]]
        everything = b"".join(objects_at(url).values())
        assert all(needle in everything for needle in gone)
        assert store.forget("document 3") == 1
        with pytest.raises(KeyError):
            store[key_of(3)]
        assert store.compact() > 0
        everything = b"".join(objects_at(url).values())
        assert not any(needle in everything for needle in gone)
        assert store.compact() == 0
    with ObjectStore(url, read_only=True) as reader:
        assert len(reader) == 19
        assert reader.why_absent(key_of(3)) == "forgotten"
        for number in set(range(20)) - {3}:
            assert reader[key_of(number)].bit_equal(make_kv(number))


def test_small_shards_become_one(url: str) -> None:
    with ObjectStore(url, shard_bytes=10**6) as store:
        for number in range(6):
            store[key_of(number)] = make_kv(number)
            store.flush()
        assert len(shards_at(url)) == 6
        store.compact()
        assert len(shards_at(url)) == 1
        assert all(store[key_of(n)].bit_equal(make_kv(n)) for n in range(6))


def test_readers_see_what_is_written_and_read_on_while_shards_are_compacted(url: str) -> None:
    with filled(url) as writer:
        readers = [ObjectStore(url, read_only=True) for _ in range(3)]
        writer[key_of(50)] = make_kv(50)
        assert KEY not in readers[0]
        with pytest.raises(KeyError):
            readers[0][key_of(50)]  # not written yet
        writer.flush()
        writer.forget(*(f"document {number}" for number in range(10)))
        writer.compact()
        for reader in readers:
            assert reader[key_of(15)].bit_equal(make_kv(15))  # its shard is another now
            assert reader[key_of(50)].bit_equal(make_kv(50))
            with pytest.raises(KeyError):
                reader[key_of(5)]
            with pytest.raises(OSError, match="read_only"):
                reader[KEY] = make_kv()


def test_a_second_writer_is_refused_and_overwrites_nothing(url: str) -> None:
    with filled(url, 3) as one, ObjectStore(url) as two:
        one[key_of(10)] = make_kv(10)
        one.flush()
        two[key_of(11)] = make_kv(11)
        with pytest.raises(OSError, match="another writer"):
            two.flush()
        two._pending.clear()
        for shard in two._shards.values():
            shard.changed = False
        two._shards.clear()
        two.refresh()
        assert key_of(10) in two


def test_what_a_killed_writer_left_is_swept(url: str) -> None:
    with filled(url, 3) as store:
        store.objects.write("shards/0badc0de.shard", b"left")
        assert len(store) == 3
        store.compact()
        assert b"left" not in objects_at(url).values()


@pytest.mark.parametrize("place", [12, 800, -1])
def test_a_damaged_entry_is_a_miss_and_can_be_put_again(url: str, place: int) -> None:
    with ObjectStore(url) as store:
        store[KEY] = make_kv()
        store.flush()
        (path,) = shards_at(url)
        data = bytearray(objects_at(url)[path])
        data[place] ^= 4
        store.objects.fs.pipe_file(path, bytes(data))
        with ObjectStore(url, read_only=True) as reader, pytest.raises(CorruptEntryError):
            reader[KEY]
        with pytest.raises(CorruptEntryError):
            store[KEY]
        assert (KEY in store, store.why_absent(KEY)) == (False, "corrupt")
        store.put(KEY, make_kv())
        assert store[KEY].bit_equal(make_kv())


@pytest.mark.parametrize("name", ["manifest.json", "indexes"])
@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 10_000, b'{"magic": "sac_rag.ObjectStore"}'])
def test_a_manifest_or_index_that_is_none_is_refused(url: str, name: str, data: bytes) -> None:
    filled(url, 2)
    fs, _ = fsspec.core.url_to_fs(url)
    (path,) = [path for path in objects_at(url) if name in path]
    fs.pipe_file(path, data)
    with pytest.raises(ValueError, match=r"magic|say|format|JSON|Expecting|nested|read"):
        ObjectStore(url)


def test_a_store_that_cannot_be_read_is_a_miss(url: str, llama: Generator) -> None:
    with ObjectStore(url) as store:
        cached = CachedCompressor(make_compressor(llama, "sac"), store)
        cached.compress(PROSE[:2])
        store.flush()
        for path in shards_at(url):
            store.objects.fs.rm_file(path)
        assert cached.fetch(PROSE[:2]).misses == ["unreadable"] * 2


def test_without_the_key_nothing_is_read_and_no_id_is_seen(url: str) -> None:
    cipher = Cipher(bytes(32))
    with ObjectStore(url, cipher=cipher) as store:
        store.put(KEY, make_kv(), ["board memo"])
        store.flush()
        assert b"board memo" not in b"".join(objects_at(url).values())
    with ObjectStore(url, cipher=cipher, read_only=True) as reader:
        assert reader[KEY].bit_equal(make_kv())
        assert reader.keys_of("board memo") == [KEY]
    with ObjectStore(url, read_only=True) as reader:
        assert KEY not in reader
        with pytest.raises(CorruptEntryError) as error:
            reader[KEY]
        assert error.value.reason == "secret"


def test_a_local_store_is_owner_only(tmp_path: Path) -> None:
    with ObjectStore(str(tmp_path / "store")):
        assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
