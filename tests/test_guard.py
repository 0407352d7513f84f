"""The guard loads what is faster to load and computes what is faster to compute; same answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from support.clock import Clock
from support.models import PROSE, make_compressor, passes_of

from sac_rag import SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.compressors.base import Compressor
from sac_rag.errors import ChunkMissError
from sac_rag.guard import Guard
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.prompts.generate import Decoding

CHARS, TOKENS, NBYTES = 2000, 500, 2_000_000


def experienced(load_s: float, compute_s: float, loads: int = 8, computed: int = 2) -> Guard:
    """A guard that has seen chunks of one size, each loaded and computed in the same time."""
    guard = Guard()
    for _ in range(loads):
        guard.loaded(CHARS, TOKENS, NBYTES, load_s)
    for _ in range(computed):
        guard.computed(TOKENS, compute_s)
    return guard


class Slow(dict[str, AnchorKV]):
    """A store on a disk that takes its time, by a clock, for every read."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.seconds = 0.0
        self.reads = 0

    def __getitem__(self, key: str) -> AnchorKV:
        kv = super().__getitem__(key)
        self.reads += 1
        self.clock.now += self.seconds
        return kv


def by_the_clock_of(store: Slow, sac: Compressor) -> CachedCompressor:
    return CachedCompressor(sac, store, clock=store.clock)


# --- the decision


@pytest.mark.parametrize(
    ("load_s", "compute_s", "computes"),
    [(0.001, 0.5, False), (0.9, 0.5, True), (0.7, 0.5, False), (0.5, 0.5, False)],
    ids=["fast disk", "slow disk", "not slow enough", "equal"],
)
def test_computing_is_preferred_where_loading_takes_clearly_longer(
    load_s: float, compute_s: float, computes: bool
) -> None:
    assert experienced(load_s, compute_s).prefers_computing(CHARS) is computes


@pytest.mark.parametrize(("loads", "computed"), [(7, 9), (0, 9)])
def test_without_enough_loads_everything_is_loaded(loads: int, computed: int) -> None:
    guard = experienced(9.0, 0.001, loads, computed)
    assert not guard.prefers_computing(CHARS)


def test_loading_costs_something_fixed_and_something_for_each_byte() -> None:
    """A far-away store: half a second to be asked at all, then fast. Short texts are computed."""
    guard = Guard()
    for scale in range(1, 9):
        guard.loaded(100 * scale, 25 * scale, 100_000 * scale, 0.5 + 0.001 * scale)
    for _ in range(2):
        guard.computed(1000, 1.0)  # 0.001 s a token
    assert guard.prefers_computing(100)  # 0.5 s against 0.025
    assert not guard.prefers_computing(8000)  # 0.58 s against 2


def test_noise_never_makes_a_part_of_the_cost_negative() -> None:
    guard = Guard()
    for scale in range(1, 9):
        guard.loaded(100 * scale, 25 * scale, 100_000 * scale, 0.9 - 0.1 * scale)
    for _ in range(2):
        guard.computed(1000, 0.1)
    assert guard.prefers_computing(100_000) is False  # 0.45 s, against 2.5
    assert guard.prefers_computing(100) is True


def test_a_single_hiccup_is_no_slow_disk() -> None:
    guard = experienced(0.001, 0.1, loads=15)
    guard.loaded(CHARS, TOKENS, NBYTES, 60.0)
    assert not guard.prefers_computing(CHARS)


def test_old_evidence_is_forgotten() -> None:
    guard = experienced(9.0, 0.001)
    for _ in range(16):
        guard.loaded(CHARS, TOKENS, NBYTES, 0.0001)
    assert not guard.prefers_computing(CHARS)


# --- trials and probes


def test_slow_loads_are_worth_a_trial_of_computing_one_at_a_time() -> None:
    """A process that only loads does not know how fast it computes."""
    guard = experienced(0.2, 0.01, computed=0)
    assert [guard.prefers_computing(CHARS) for _ in range(3)] == [True, False, False]
    guard.computed(TOKENS, 0.01)
    assert [guard.prefers_computing(CHARS) for _ in range(3)] == [True, False, False]
    guard.computed(TOKENS, 0.01)
    assert [guard.prefers_computing(CHARS) for _ in range(3)] == [True, True, True]


def test_a_trial_that_ended_without_a_measurement_is_repeated() -> None:
    guard = experienced(load_s=2.0, compute_s=0.5, computed=0)
    # Ctrl-C, or a chunk that cannot be computed: the guard is told nothing.
    assert [guard.prefers_computing(CHARS) for _ in range(33)] == [True, *[False] * 15] * 2 + [True]


def test_fast_loads_are_not_worth_a_trial() -> None:
    guard = experienced(0.09, 0.0001, computed=0)
    assert not any(guard.prefers_computing(CHARS) for _ in range(100))


def test_one_of_sixteen_is_loaded_as_a_probe() -> None:
    guard = experienced(9.0, 0.1)
    decisions = []
    for _ in range(64):
        decisions.append(guard.prefers_computing(CHARS))
        if not decisions[-1]:
            guard.loaded(CHARS, TOKENS, NBYTES, 9.0)
    assert [number for number, computes in enumerate(decisions, 1) if not computes] == [
        *(16, 32, 48, 64),
    ]


def test_a_fast_probe_makes_up_for_all_slow_loads() -> None:
    guard = experienced(9.0, 0.1)
    while guard.prefers_computing(CHARS):
        pass
    guard.loaded(CHARS, TOKENS, NBYTES, 0.01)
    assert not any(guard.prefers_computing(CHARS) for _ in range(100))


def test_a_store_that_becomes_slow_again_is_noticed_again() -> None:
    guard = experienced(9.0, 0.1)
    while guard.prefers_computing(CHARS):
        pass
    guard.loaded(CHARS, TOKENS, NBYTES, 0.01)
    for _ in range(7):
        guard.loaded(CHARS, TOKENS, NBYTES, 9.0)
    assert guard.prefers_computing(CHARS)


def test_threads_may_share_a_guard() -> None:
    guard = experienced(0.2, 0.01)

    def work(number: int) -> None:
        for _ in range(200):
            if guard.prefers_computing(CHARS):
                guard.computed(TOKENS, 0.01)
            else:
                guard.loaded(CHARS, TOKENS, NBYTES, 0.2)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [None] * 8
    assert guard.prefers_computing(CHARS) or guard.prefers_computing(CHARS)


# --- behind answers


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    return make_compressor(llama, "sac")


def test_warm_slower_than_recomputing_is_recomputed_counted_and_answered_the_same(
    sac: Compressor,
) -> None:
    store = Slow()
    rag = SacRAG(by_the_clock_of(store, sac), decoding=Decoding(max_new_tokens=8))
    for half in (PROSE[:4], PROSE[4:]):
        rag.precompress(half)
    fast = rag.answer("Who counted the ships?", PROSE)
    assert {chunk.status for chunk in fast.chunks} == {"hit"}
    store.seconds, store.reads = 0.25, 0
    answers = [rag.answer("Who counted the ships?", PROSE) for _ in range(4)]
    assert {answer.text for answer in answers} == {fast.text}
    statuses = [chunk.status for answer in answers for chunk in answer.chunks]
    assert set(statuses) == {"hit", "slow"}
    assert statuses[-8:].count("slow") >= 7  # one may be a probe
    assert store.reads == statuses.count("hit")
    assert rag.metrics().guard_recomputes == statuses.count("slow")
    assert all(
        answer.usage.anchors_computed
        == sum(chunk.num_anchors for chunk in answer.chunks if chunk.status == "slow")
        for answer in answers
    )
    assert len(store) == 8


def test_a_store_that_has_recovered_is_read_again(sac: Compressor) -> None:
    store = Slow()
    cached = by_the_clock_of(store, sac)
    cached.fetch(PROSE)
    assert cached.guard is not None
    for _ in range(16):
        cached.guard.loaded(80, 30, 10_000, 5.0)
        cached.guard.computed(1000, 0.5)  # slower than any load by this clock
    statuses = [miss for _ in range(5) for miss in cached.fetch(PROSE).misses]
    assert "slow" in statuses[:8]
    assert statuses[16:] == [None] * 24


def test_the_guard_can_be_switched_off(sac: Compressor) -> None:
    cached = CachedCompressor(sac, Slow(), guard=False)
    assert cached.guard is None
    cached.fetch(PROSE)
    assert cached.fetch(PROSE).misses == [None] * 8


@pytest.mark.parametrize("on_miss", ["text", "raise"])
def test_only_who_wants_misses_computed_gets_stored_chunks_computed(
    sac: Compressor, on_miss: str
) -> None:
    cached = by_the_clock_of(Slow(), sac)
    cached.fetch(PROSE)
    assert cached.guard is not None
    for _ in range(16):
        cached.guard.loaded(80, 30, 10_000, 5.0)
    cached.guard.computed(1000, 0.5)
    with passes_of(sac.generator) as passes:
        fetched = cached.fetch(PROSE, on_miss=on_miss)  # type: ignore[arg-type]
    assert (fetched.misses, passes) == ([None] * 8, [])


def test_a_chunk_that_is_not_there_is_absent_and_not_slow(sac: Compressor) -> None:
    cached = by_the_clock_of(Slow(), sac)
    cached.fetch(PROSE[:4])
    assert cached.guard is not None
    for _ in range(16):
        cached.guard.loaded(80, 30, 10_000, 5.0)
    cached.guard.computed(1000, 0.5)
    assert cached.fetch(PROSE).misses == ["slow"] * 4 + ["absent"] * 4
    with pytest.raises(ChunkMissError):
        cached.fetch(["not there"], on_miss="raise")
