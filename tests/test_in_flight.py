"""Each chunk is computed by one of the threads that miss it; the others wait, and never hang."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.interrupts import interruptions
from support.models import PROSE, elsewhere, make_compressor, passes_of

from sac_rag.cached import CachedCompressor
from sac_rag.in_flight import InFlight
from sac_rag.lm.generator import Generator
from sac_rag.stores import AnchorStore, DiskStore

TIMEOUT_S = 60


def test_what_one_thread_computes_is_computed_once_and_reaches_all() -> None:
    in_flight: InFlight[str, int] = InFlight()
    entered, leave = threading.Event(), threading.Event()
    calls: list[list[str]] = []

    def slow(keys: list[str]) -> dict[str, int]:
        calls.append(keys)
        entered.set()
        assert leave.wait(TIMEOUT_S)
        return {key: len(key) for key in keys}

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(in_flight.compute, ["a", "bb"], slow)
        assert entered.wait(TIMEOUT_S)
        # Its own comes first, so two threads never wait for each other.
        second = threads.submit(
            in_flight.compute, ["bb", "ccc"], lambda keys: leave.set() or slow(keys)
        )
        assert first.result(TIMEOUT_S) == ({"a": 1, "bb": 2}, {})
        assert second.result(TIMEOUT_S) == ({"ccc": 3}, {"bb": 2})
    assert sorted(calls) == [["a", "bb"], ["ccc"]]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_one_thread_fails_at_another_computes(error: type[BaseException]) -> None:
    in_flight: InFlight[str, int] = InFlight()
    entered, leave = threading.Event(), threading.Event()

    def fail(keys: list[str]) -> dict[str, int]:
        entered.set()
        assert leave.wait(TIMEOUT_S)
        raise error

    failures: list[BaseException] = []

    def run() -> None:
        try:
            in_flight.compute(["a"], fail)
        except error as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(TIMEOUT_S)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(in_flight.compute, ["a"], lambda keys: {"a": 1})
        leave.set()
        assert waiting.result(TIMEOUT_S) == ({"a": 1}, {})
    thread.join(TIMEOUT_S)
    assert len(failures) == 1


def test_an_interrupt_at_any_line_leaves_nothing_that_others_wait_for() -> None:
    in_flight: InFlight[str, int] = InFlight()

    def work() -> None:
        in_flight.compute(["a", "b"], lambda keys: dict.fromkeys(keys, 1))

    for line in interruptions(work, [InFlight]):
        got = elsewhere(lambda: in_flight.compute(["a", "b"], lambda keys: dict.fromkeys(keys, 2)))
        assert got == ({"a": 2, "b": 2}, {}), line


def together(threads: int, work: Callable[[int], object]) -> list[object]:
    barrier = threading.Barrier(threads)

    def run(number: int) -> object:
        barrier.wait(TIMEOUT_S)
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def test_concurrent_misses_of_a_chunk_are_one_pass_of_the_model(
    llama: Generator, store: AnchorStore
) -> None:
    cached = CachedCompressor(make_compressor(llama, "full"), store)
    (expected,) = make_compressor(llama, "full").compress(PROSE[:1])
    with passes_of(llama) as passes:
        fetched = together(6, lambda i: cached.fetch(PROSE[:1], documents=[f"d{i}"]))
    assert len(passes) == 1
    assert all(f.kvs[0].bit_equal(expected) for f in fetched)  # type: ignore[attr-defined]
    assert sum(f.computed for f in fetched) == 1  # type: ignore[attr-defined]
    if isinstance(store, DiskStore):
        assert store.documents(cached.key(PROSE[0])) == tuple(f"d{i}" for i in range(6))


def test_a_chunk_asked_for_at_several_ratios_serves_each_of_them(llama: Generator) -> None:
    cached = CachedCompressor(make_compressor(llama, "learned"), {})
    ratios = [1, 2, 3, 6] * 2
    fetched = together(8, lambda i: cached.fetch(PROSE[:1], ratios=[ratios[i]]).kvs[0])
    for ratio, kv in zip(ratios, fetched, strict=True):
        (expected,) = cached.at_ratio(ratio).compress(PROSE[:1])
        assert kv.bit_equal(expected)  # type: ignore[attr-defined]


def test_a_failure_reaches_each_thread_and_the_next_call_works(llama: Generator) -> None:
    compressor = make_compressor(llama, "full")

    class Failing(type(compressor)):  # type: ignore[misc]
        fails = True

        def compress(self, texts: Sequence[str]) -> object:
            if self.fails:
                raise RuntimeError("on purpose")
            return super().compress(texts)

    compressor.__class__ = Failing
    cached = CachedCompressor(compressor, {})

    def failure(number: int) -> str:
        with pytest.raises(RuntimeError, match="on purpose") as caught:
            cached.compress(PROSE[:1])
        return str(caught.value)

    assert together(4, failure) == ["on purpose"] * 4
    Failing.fails = False
    assert cached.compress(PROSE[:1])[0].is_finite
