"""RedisStore: on a real server that evicts, expires, is killed and comes back."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.clock import Clock
from support.models import PROSE, make_compressor
from support.redis_server import RedisServer
from support.stores import key_of, make_kv

from sac_rag import SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.errors import REASONS, CorruptEntryError, name_of
from sac_rag.lm.generator import Generator
from sac_rag.prompts.generate import Decoding
from sac_rag.stores.backoff import Backoff

pytest.importorskip("redis")
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.redis import RedisStore

KEY, OTHER = "ab" * 32, "cd" * 32
SHORT = Decoding(max_new_tokens=2)
WAIT_S = 120.0


def everything(store: RedisStore) -> bytes:
    """Every byte under the store's prefix, names included."""
    parts = []
    for name in store.client.scan_iter(f"{store.prefix}*"):
        parts.append(name)
        kind = store.client.type(name)
        if kind == b"string":
            parts.append(store.client.get(name))
        elif kind == b"set":
            parts.extend(store.client.smembers(name))
        else:
            parts.extend(part for pair in store.client.hgetall(name).items() for part in pair)
    return b"\n".join(parts)


def entry_name(store: RedisStore, key: str) -> str:
    return f"{store.prefix}e:{key}"


# What the server drops.


def test_an_evicted_entry_is_a_miss_with_that_reason_and_is_counted(tmp_path: Path) -> None:
    options = ("--maxmemory", "6mb", "--maxmemory-policy", "volatile-lru")
    with RedisServer(tmp_path / "full", *options) as server, RedisStore(server.url) as store:
        kv = make_kv(anchors=500)
        count = 300
        for number in range(count):
            store.put(key_of(number), kv, [f"document {number}"])
        store.client.config_set("maxmemory", "1gb")  # from now on nothing more is evicted
        evicted = store.client.info("stats")["evicted_keys"]
        assert 0 < evicted < count
        gone = [key_of(i) for i in range(count) if key_of(i) not in store]
        assert len(gone) == evicted
        assert store.why_absent(gone[0]) == "evicted"
        assert store.why_absent(gone[0]) == "evicted"  # remembered, and counted once
        assert store.evictions == 1
        assert store.gc() == {"evicted": evicted - 1}
        assert store.evictions == evicted
        assert store.counters["miss.evicted"] == 2
        assert len(store) == count - evicted


def test_a_server_that_evicts_records_still_forgets_every_byte(tmp_path: Path) -> None:
    """Under allkeys-* a record may be gone while its entry is there, and the reverse."""
    options = ("--maxmemory", "1gb", "--maxmemory-policy", "allkeys-random")
    with RedisServer(tmp_path / "all", *options) as server, RedisStore(server.url) as store:
        for number in range(4):
            store.put(key_of(number), make_kv(number), ["secret"])
        store.client.delete(f"{store.prefix}k:secret", f"{store.prefix}m:{key_of(0)}")
        with pytest.raises(KeyError):
            store[key_of(0)]  # without its record nothing is served
        assert store.forget("secret") == 3
        assert list(store) == []
        assert b"secret" not in everything(store)


def test_a_full_server_that_evicts_nothing_refuses_and_the_answer_is_given(
    tmp_path: Path, llama: Generator
) -> None:
    options = ("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    with RedisServer(tmp_path / "full", *options) as server, RedisStore(server.url) as store:
        cached = CachedCompressor(make_compressor(llama, "sac"), store)
        assert cached.fetch([PROSE[0]]).misses == ["absent"]
        assert cached.store_failures == 1
        with pytest.raises(OSError, match=r"refused: .*maxmemory"):
            store[KEY] = make_kv()
        assert KEY not in store  # it is asked, not avoided: the server answers


def test_an_entry_expires_and_says_so(redis_url: str, redis_store: RedisStore) -> None:
    with RedisStore(redis_url, prefix=redis_store.prefix, ttl_s=0.001) as store:
        store.put(KEY, make_kv(), ["a"])
        while store.client.exists(entry_name(store, KEY)):
            pass
        assert KEY not in store
        assert store.why_absent(KEY) == "expired"
        assert (store.evictions, store.keys_of("a")) == (0, [])
    redis_store[KEY] = make_kv()
    left = redis_store.client.ttl(entry_name(redis_store, KEY))
    assert 29 * 24 * 3600 < left <= 30 * 24 * 3600
    with RedisStore(redis_url, prefix=redis_store.prefix, ttl_s=None) as store:
        store[OTHER] = make_kv()
        assert store.client.ttl(entry_name(store, OTHER)) == -1


# Bytes.


DAMAGE = {
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "lengthened": lambda data: data + b"\0",
    "flipped in the header": lambda data: data[:60] + bytes([data[60] ^ 4]) + data[61:],
    "flipped in the first tensor": lambda data: data[:800] + bytes([data[800] ^ 4]) + data[801:],
    "flipped at the end": lambda data: data[:-1] + bytes([data[-1] ^ 4]),
    "of a future format": lambda data: data.replace(b'"format":3', b'"format":9'),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
def test_a_damaged_entry_is_a_miss_and_can_be_put_again(
    redis_store: RedisStore, damage: str, partial: bool
) -> None:
    redis_store[KEY], redis_store[OTHER] = make_kv(1), make_kv(2)
    name = entry_name(redis_store, KEY)
    redis_store.client.set(name, DAMAGE[damage](redis_store.client.get(name)))
    with pytest.raises(KeyError) as error:
        redis_store.read(KEY, lambda _: 10**9) if partial else redis_store[KEY]
    if damage != "emptied":
        assert isinstance(error.value, CorruptEntryError)
        reason = "format" if "format" in damage else "corrupt"
        assert error.value.reason == reason
        assert redis_store.counters[f"miss.{reason}"] == 1
        # Bad bytes are deleted; those of another version are its own.
        assert redis_store.client.exists(name) == (reason == "format")
    redis_store[KEY] = make_kv(1)
    assert redis_store[KEY].bit_equal(make_kv(1))
    assert redis_store[OTHER].bit_equal(make_kv(2))


def test_two_entries_that_were_swapped_are_both_misses(redis_store: RedisStore) -> None:
    redis_store[KEY], redis_store[OTHER] = make_kv(1), make_kv(2)
    names = [entry_name(redis_store, key) for key in (KEY, OTHER)]
    one, two = redis_store.client.mget(names)
    redis_store.client.mset({names[0]: two, names[1]: one})
    for key in (KEY, OTHER):
        with pytest.raises(CorruptEntryError, match="this is the entry of key"):
            redis_store[key]


def test_an_entry_replaced_while_it_is_read_is_read_again(redis_url: str) -> None:
    class Replacing(RedisStore):
        def _fetch(self, asked: Mapping[str, int | None]) -> dict[str, Any]:
            pieces = super()._fetch(asked)
            if asked[KEY] is not None and self.rounds == 0:
                RedisStore.__setitem__(self, KEY, make_kv(2, anchors=3000))
            self.rounds += 1
            return pieces

        rounds = 0

    with Replacing(redis_url, prefix="replacing:") as store:
        store[KEY] = make_kv(1, anchors=2000)
        kv = store.read(KEY, lambda _: 10**9)
        assert kv.bit_equal(make_kv(2, anchors=3000))
        assert store.counters["misses"] == 0
        store.clear()


def test_little_more_is_read_than_is_wanted(redis_store: RedisStore) -> None:
    redis_store[KEY] = make_kv(1, anchors=20_000)
    total = redis_store.client.strlen(entry_name(redis_store, KEY))

    def sent() -> int:
        return int(redis_store.client.info("stats")["total_net_output_bytes"])

    before = sent()
    redis_store.read(KEY, lambda _: 10)
    assert sent() - before < total / 2


def test_without_the_key_nothing_is_read_and_no_id_is_seen(
    redis_url: str, redis_store: RedisStore
) -> None:
    prefix = redis_store.prefix
    with RedisStore(redis_url, prefix=prefix, cipher=Cipher(bytes(32))) as sealed:
        sealed.put(KEY, make_kv(), ["board memo"])
        assert sealed[KEY].bit_equal(make_kv())
        assert sealed.documents(KEY) == ("board memo",)
        assert sealed.keys_of("board memo") == [KEY]
        assert b"board memo" not in everything(sealed)
        with pytest.raises(CorruptEntryError) as error:
            redis_store[KEY]
        assert error.value.reason == "secret"
        assert KEY not in redis_store
        assert sealed[KEY].bit_equal(make_kv())  # its owner still reads it
        redis_store.put(KEY, make_kv(1))  # what cannot be read is not there
        assert redis_store[KEY].bit_equal(make_kv(1))
        assert sealed.forget("board memo") == 1


def test_nothing_of_a_forgotten_document_stays_on_the_server(redis_store: RedisStore) -> None:
    redis_store.put(KEY, make_kv(), ["memo-1848"], text_id="5e" * 32, fingerprint="f1" * 32)
    redis_store.put(OTHER, make_kv(1), ["memo-1848", "lexicon"])
    gone = [KEY.encode(), b"memo-1848", b"5e" * 32]
    assert all(needle in everything(redis_store) for needle in gone)
    assert redis_store.forget("memo-1848") == 1
    assert not any(needle in everything(redis_store) for needle in gone)


@pytest.mark.parametrize("settings", [{"prefix": "a*"}, {"prefix": "a b"}, {"ttl_s": 0}])
def test_settings_that_are_none_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RedisStore(**settings)


def test_many_may_put_and_forget_at_once(redis_store: RedisStore) -> None:
    start = threading.Barrier(8)

    def use(worker: int) -> None:
        start.wait()
        for number in range(30):
            redis_store.put(key_of(number), make_kv(number), [f"d{worker % 4}"])
            if number % 5 == worker % 5:
                redis_store.forget(f"d{worker % 4}")

    threads = [threading.Thread(target=use, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in redis_store:
        assert redis_store.documents(key)  # none without a document that can be forgotten
    redis_store.forget(*(f"d{n}" for n in range(4)))
    assert list(redis_store) == []


# A server that fails.


def test_after_a_failure_one_caller_tries_and_the_others_do_not_wait() -> None:
    now = [0.0]
    backoff = Backoff(1.0, 3.0, clock=lambda: now[0])
    assert [backoff.admits() for _ in range(3)] == [True] * 3
    for _ in range(8):  # all that were on their way
        backoff.failed()
    assert not backoff.admits()
    pauses = []
    for _ in range(4):
        began = now[0]
        while not backoff.admits():
            now[0] += 0.25
        pauses.append(now[0] - began)
        assert not backoff.admits()  # one tries
        backoff.failed()
    assert pauses == [1.0, 2.0, 3.0, 3.0]
    backoff.succeeded()
    assert [backoff.admits() for _ in range(3)] == [True] * 3


def test_a_server_that_is_not_there_is_a_miss_and_asked_once(llama: Generator) -> None:
    with RedisStore("redis://127.0.0.1:1/0", first_pause_s=1e6, most_pause_s=1e6) as store:
        cached = CachedCompressor(make_compressor(llama, "sac"), store)
        rag = SacRAG(cached)
        answer = rag.answer("Who counted the ships?", list(PROSE[:3]), SHORT)
        assert [chunk.status for chunk in answer.chunks] == ["unreadable"] * 3
        assert store.counters["failures"] == 1
        assert store.counters["refused"] > 0
        with pytest.raises(OSError, match="has failed"):
            store.forget("a")  # nothing is forgotten silently


def test_chunks_of_an_answer_are_read_in_one_round_trip(
    redis_store: RedisStore, llama: Generator
) -> None:
    cached = CachedCompressor(make_compressor(llama, "sac"), redis_store)
    cached.compress(PROSE)

    def commands() -> int:
        return int(redis_store.client.info("commandstats")["cmdstat_get"]["calls"])

    rounds = []
    fetch = redis_store._fetch
    redis_store._fetch = lambda asked: rounds.append(len(asked)) or fetch(asked)  # type: ignore
    before = commands()
    assert cached.fetch(PROSE).misses == [None] * len(PROSE)
    assert rounds == [len(PROSE)]
    assert commands() - before == len(PROSE)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "server") as server:
        yield server


@pytest.mark.slow
def test_a_server_killed_and_restarted_fails_no_answer(
    server: RedisServer, llama: Generator
) -> None:
    """Eight threads ask throughout; each phase lasts until every thread has met it."""
    store = RedisStore(server.url, first_pause_s=0.02, most_pause_s=0.05)
    rag = SacRAG(CachedCompressor(make_compressor(llama, "sac"), store, guard=False))
    expected = rag.answer("Who counted the ships?", list(PROSE[:2]), SHORT).text
    statuses: Counter[str] = Counter()
    failures: list[BaseException | str] = []
    seen: list[set[str]] = [set() for _ in range(8)]
    changed = threading.Condition()
    stop = threading.Event()

    def ask(worker: int) -> None:
        while not stop.is_set():
            try:
                answer = rag.answer("Who counted the ships?", list(PROSE[:2]), SHORT)
                with changed:
                    if answer.text != expected:
                        failures.append(answer.text)
                    names = [name_of(chunk.status) for chunk in answer.chunks]
                    statuses.update(names)
                    seen[worker].update(names)
                    changed.notify_all()
            except BaseException as error:  # noqa: BLE001 (any is a failed answer)
                with changed:
                    failures.append(error)
                    changed.notify_all()
                return

    def until_all_have(status: str) -> None:
        with changed:
            for names in seen:
                names.clear()
            assert changed.wait_for(
                lambda: bool(failures) or all(status in names for names in seen), WAIT_S
            )

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            until_all_have("hit")
            server.kill()
            until_all_have("unreadable")
            server.start()
        until_all_have("hit")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert statuses.keys() <= {"hit", *REASONS}
    assert statuses["unreadable"] > 0 and store.counters["failures"] > 0
    assert store.counters["miss.unreadable"] >= statuses["unreadable"]


def test_the_guard_switches_over_where_the_server_becomes_slow(
    redis_url: str, llama: Generator
) -> None:
    """Latency is added by the clock that the guard reads, and taken away again."""

    class Far(RedisStore):
        clock = Clock()
        seconds = 0.0

        def _fetch(self, asked: Mapping[str, int | None]) -> dict[str, Any]:
            self.clock.now += self.seconds
            return super()._fetch(asked)

    def compute(*_: object) -> None:
        Far.clock.now += 0.5

    hook = llama.model.base_model.register_forward_hook(compute)
    with Far(redis_url, prefix="far:") as store:
        cached = CachedCompressor(make_compressor(llama, "sac"), store, clock=store.clock)
        chunks = list(PROSE[:4])
        cached.compress(chunks)
        cached.compress(["The first text of another kind."])
        for _ in range(4):
            assert cached.fetch(chunks).misses == [None] * 4
        store.seconds = 60.0
        for _ in range(8):
            far = cached.fetch(chunks).misses
        assert far.count("slow") >= 3
        store.seconds = 0.0
        for _ in range(40):
            near = cached.fetch(chunks).misses
        assert near == [None] * 4
        store.clear()
    hook.remove()
