"""What a corpus takes at scale: a plan by formulas, and a simulation of tiers beside a real run.

The plan is arithmetic over `Assumptions`, which are data sheets and list prices and not measured
here. The simulation is: it predicts, from read times that were measured on one part of a workload,
the hit rates and waits of another part.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sac_rag.benchmarks.store import key_of, small
from sac_rag.kv import AnchorKV
from sac_rag.stores.base import Wanted
from sac_rag.stores.disk import DiskStore
from sac_rag.stores.disk.index import RENEW_SECONDS
from sac_rag.stores.encoded import Read
from sac_rag.stores.memory import MemoryStore
from sac_rag.stores.tiered import TieredStore

MISS = "miss"
_SOURCES = ("memory", "disk", "remote", MISS)


@dataclass(frozen=True)
class Model:
    """What a model's size means here.

    Attributes:
        name: Of the model.
        parameters: Number of weights.
        layers, kv_heads, head_dim: Shape of its KV.
    """

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's KV in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


MODELS = (
    Model("Llama-3.2-1B", 1.24e9, 16, 8, 64),
    Model("Llama-3.1-8B", 8.03e9, 32, 8, 128),
)
CHUNKS = (10**6, 10**8, 10**10)
RATIOS = (5, 15, 51)


@dataclass(frozen=True)
class Assumptions:
    """Of the plan.

    Attributes:
        chunk_tokens: Tokens of a chunk.
        k: Chunks of a request.
        question_tokens, answer_tokens: Of a request.
        batch: Requests that are answered together.
        flops: Peak of a GPU in bfloat16, per second.
        flops_used: Share of it that a prefill reaches.
        bandwidth: Of its memory, in bytes per second.
        bandwidth_used: Share of it that decoding reaches.
        link: From the store to the GPU, in bytes per second.
        gpu_hour: Price of an hour of it.
        gb_month: Price of keeping 10^9 bytes for a month.
    """

    chunk_tokens: int = 510
    k: int = 8
    question_tokens: int = 64
    answer_tokens: int = 64
    batch: int = 32
    flops: float = 989e12
    flops_used: float = 0.4
    bandwidth: float = 3.35e12
    bandwidth_used: float = 0.6
    link: float = 12.5e9
    gpu_hour: float = 2.5
    gb_month: float = 0.023


@dataclass(frozen=True)
class Plan:
    """A corpus for one model at one ratio.

    Attributes:
        model: Its name.
        chunks: Number of chunks.
        ratio: Source tokens per KV entry.
        entry_nbytes: Bytes of a chunk.
        nbytes: Bytes of all.
        gpu_hours: To compress them once.
        compress_cost: Of these hours.
        month_cost: Of keeping the bytes.
        gpu_requests_per_s: What one GPU answers, if the chunks are in its memory.
        link_requests_per_s: What the link to one GPU carries, if every chunk is read over it.
        million_cost: GPU hours of a million requests at the lower of the two.
    """

    model: str
    chunks: int
    ratio: int
    entry_nbytes: int
    nbytes: int
    gpu_hours: float
    compress_cost: float
    month_cost: float
    gpu_requests_per_s: float
    link_requests_per_s: float
    million_cost: float


def plan(model: Model, chunks: int, ratio: int, assumed: Assumptions | None = None) -> Plan:
    """The plan of a corpus; see docs/at_scale.md for the formulas."""
    assumed = assumed or Assumptions()
    entry = model.token_nbytes * (assumed.chunk_tokens // ratio)
    token_s = 2 * model.parameters / (assumed.flops * assumed.flops_used)
    step_nbytes = 2 * model.parameters + assumed.batch * assumed.k * entry
    step_s = step_nbytes / (assumed.bandwidth * assumed.bandwidth_used)
    request_s = assumed.question_tokens * token_s + assumed.answer_tokens * step_s / assumed.batch
    hours = chunks * assumed.chunk_tokens * token_s / 3600
    per_s, over_link = 1 / request_s, assumed.link / (assumed.k * entry)
    return Plan(
        model=model.name,
        chunks=chunks,
        ratio=ratio,
        entry_nbytes=entry,
        nbytes=chunks * entry,
        gpu_hours=hours,
        compress_cost=hours * assumed.gpu_hour,
        month_cost=chunks * entry / 1e9 * assumed.gb_month,
        gpu_requests_per_s=per_s,
        link_requests_per_s=over_link,
        million_cost=1e6 / min(per_s, over_link) / 3600 * assumed.gpu_hour,
    )


def plans() -> list[Plan]:
    """Every model, number of chunks and ratio."""
    return [plan(model, n, ratio) for model in MODELS for n in CHUNKS for ratio in RATIOS]


def to_markdown(rows: Sequence[Plan]) -> str:
    """Plans as a table."""
    lines = [
        "| model | chunks | ratio | bytes | GPU hours, once | their price | storage per month | "
        "requests/s, GPU | requests/s, link | GPU price per million |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        cells = (
            row.model,
            f"10^{len(str(row.chunks)) - 1}",
            f"{row.ratio}x",
            f"{row.nbytes / 2**40:,.2f} TiB",
            f"{row.gpu_hours:,.1f}",
            f"${row.compress_cost:,.0f}",
            f"${row.month_cost:,.0f}",
            f"{row.gpu_requests_per_s:,.0f}",
            f"{row.link_requests_per_s:,.0f}",
            f"${row.million_cost:,.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Workload:
    """Queries for chunks, a few of which are asked for much more often than others.

    Attributes:
        entries: Number of chunks.
        stored: How many of them the last tier has from the beginning.
        memory, disk: How many the first and the second tier have room for.
        warm_up: Queries before those that count; the read times are measured in them.
        queries: Queries that count.
        k: Chunks of a query.
        exponent: Of Zipf's law: the chunk of rank r is asked for r^-exponent times as often as
            the first.
    """

    entries: int = 5000
    stored: int = 4500
    memory: int = 250
    disk: int = 1000
    warm_up: int = 1000
    queries: int = 10_000
    k: int = 4
    exponent: float = 1.0

    def reads(self, seed: int) -> Iterator[tuple[list[int], bool]]:
        """Chunks that are read together, and whether they count: one by one in the warm-up."""
        weights = np.arange(1, self.entries + 1, dtype=float) ** -self.exponent
        # Popular chunks are stored or not as others are.
        names = np.random.default_rng(0).permutation(self.entries)
        size = (self.warm_up + self.queries, self.k)
        ranks = np.random.default_rng(seed).choice(self.entries, size, p=weights / weights.sum())
        for place, query in enumerate(names[ranks]):
            chunks = list(dict.fromkeys(query.tolist()))
            if place >= self.warm_up:
                yield chunks, True
            else:
                yield from (([chunk], False) for chunk in chunks)


@dataclass(frozen=True)
class Waits:
    """What came of the queries that count.

    Attributes:
        shares: Share of the chunks that each tier had, and of those that none had.
        hit_rate: Share that a tier had.
        mean_ms, p50_ms, p99_ms: Time to the first token of a query.
    """

    shares: dict[str, float]
    hit_rate: float
    mean_ms: float
    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, sources: Counter[str], seconds: Sequence[float]) -> Waits:
        """The figures of chunks by source, and of queries by their time."""
        total = sources.total()
        p50, p99 = np.percentile(seconds, (50, 99))
        return cls(
            shares={name: count / total for name, count in sources.items()},
            hit_rate=1 - sources[MISS] / total,
            mean_ms=1000 * float(np.mean(seconds)),
            p50_ms=1000 * float(p50),
            p99_ms=1000 * float(p99),
        )


def simulate(
    workload: Workload,
    read_s: Mapping[str, float],
    *,
    first_token_s: float = 0.0,
    renew_s: float = RENEW_SECONDS,
    seed: int = 1,
) -> Waits:
    """Predicts hit rates and waits over tiers that evict the least recently used.

    The clock is that of the predicted waits: queries come one after the other.

    Args:
        workload: What is asked for.
        read_s: Mean seconds per chunk from "memory", "disk" and "remote", and of a "miss".
        first_token_s: Seconds from the last chunk to the first token.
        renew_s: Seconds after which the disk records again that an entry was used.
        seed: Of the queries.
    """
    tiers = [_Recent(workload.memory), _Recent(workload.disk, renew_s), _Recent(workload.entries)]
    for number in range(workload.stored):
        tiers[-1].put(number, 0.0)
    sources: Counter[str] = Counter(dict.fromkeys(_SOURCES, 0))
    seconds = []
    now = 0.0
    for chunks, counts in workload.reads(seed):
        # As a TieredStore: all are looked up, tier by tier, before any of them fills one.
        tier_of = {n: _first_with(tiers, n) for n in chunks}
        for number, tier in sorted(tier_of.items(), key=lambda item: item[1]):
            if tier < len(tiers):
                tiers[tier].use(number, now)
            for earlier in tiers[:tier]:
                earlier.put(number, now)
        of_query = [_SOURCES[tier] for tier in tier_of.values()]
        wait = first_token_s + sum(read_s[name] for name in of_query)
        now += wait
        if counts:
            sources.update(of_query)
            seconds.append(wait)
    return Waits.of(sources, seconds)


def _first_with(tiers: Sequence[_Recent], number: int) -> int:
    return next((place for place, tier in enumerate(tiers) if number in tier), len(tiers))


class _Recent:
    """The most recently used of some numbers; a use is recorded if the last one is long ago."""

    def __init__(self, room: int, renew_s: float = 0.0) -> None:
        self._room = room
        self._renew_s = renew_s
        self._used: OrderedDict[int, float] = OrderedDict()

    def __contains__(self, number: int) -> bool:
        return number in self._used

    def use(self, number: int, now: float) -> None:
        if now - self._used[number] >= self._renew_s:
            self.put(number, now)

    def put(self, number: int, now: float) -> None:
        self._used[number] = now
        self._used.move_to_end(number)
        if len(self._used) > self._room:
            self._used.popitem(last=False)


@dataclass(frozen=True)
class ScaleReport:
    """A prediction beside a measurement.

    Attributes:
        workload: What was asked for.
        read_ms: Milliseconds per chunk from each source, measured in the warm-up.
        predicted: By the simulation, of other queries of the same workload.
        measured: In a TieredStore.
    """

    workload: Workload
    read_ms: dict[str, float]
    predicted: Waits
    measured: Waits

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as JSON holds them."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Prediction and measurement as a table."""
        lines = ["| | predicted | measured |", "| --- | --- | --- |"]
        for name in _SOURCES:
            shares = (waits.shares[name] for waits in (self.predicted, self.measured))
            cells = " | ".join(f"{share:.1%}" for share in shares)
            lines.append(f"| {name}, {self.read_ms[name]:.2f} ms per chunk | {cells} |")
        for name in ("mean_ms", "p50_ms", "p99_ms"):
            times = (getattr(waits, name) for waits in (self.predicted, self.measured))
            row = " | ".join(f"{time_ms:.2f} ms" for time_ms in times)
            lines.append(f"| {name.removesuffix('_ms')} of a query | {row} |")
        return "\n".join(lines) + "\n"


class _Remote(DiskStore):
    """A store behind a network, with a round trip per chunk."""

    round_trip_s = 0.0

    def read_many(self, wanted: Mapping[str, Wanted | None]) -> dict[str, Read]:
        time.sleep(self.round_trip_s * len(wanted))
        return super().read_many(wanted)


def measure_scale(
    folder: Path,
    workload: Workload,
    *,
    round_trip_s: float = 0.005,
    compute_s: float = 0.05,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> ScaleReport:
    """Reads small synthetic entries out of memory, a disk and a second disk that is far away.

    Args:
        folder: On the disk to measure; what is written there stays.
        workload: What is asked for.
        round_trip_s: Added to each chunk that is asked of the last tier, in seconds; slept.
        compute_s: Of a chunk that no tier has, in seconds; slept.
        seed: Of the queries that are measured; the prediction is of other ones.
        on_progress: Called with the number of reads since the last call.
    """
    kv = small()
    with _Remote(folder / "remote") as remote:
        remote.round_trip_s = round_trip_s
        for number in range(workload.stored):
            remote[key_of(number)] = kv
        nbytes = remote.nbytes // len(remote)
        disk = DiskStore(folder / "disk", max_bytes=workload.disk * nbytes)
        with TieredStore([MemoryStore(workload.memory * kv.nbytes), disk, remote]) as store:
            reader = _Reader(store, kv, compute_s)
            for chunks, counts in workload.reads(seed):
                reader.read(chunks, counts=counts)
                if on_progress is not None:
                    on_progress(1)
    read_s = reader.mean_s()
    return ScaleReport(
        workload=workload,
        read_ms={name: 1000 * value for name, value in read_s.items()},
        predicted=simulate(workload, read_s, seed=seed + 1),
        measured=Waits.of(reader.sources, reader.waits),
    )


class _Reader:
    """Reads chunks, computes those that are missing, and counts where they came from."""

    def __init__(self, store: TieredStore, kv: AnchorKV, compute_s: float) -> None:
        self._store = store
        self._kv = kv
        self._compute_s = compute_s
        self._seconds: dict[str, list[float]] = {name: [] for name in _SOURCES}
        self.sources: Counter[str] = Counter(dict.fromkeys(_SOURCES, 0))
        self.waits: list[float] = []

    def read(self, numbers: Sequence[int], *, counts: bool) -> None:
        """Waits until all chunks are there."""
        wanted: dict[str, Wanted | None] = dict.fromkeys(map(key_of, numbers))
        before = list(self._store.hits)
        started = time.perf_counter()
        entries = self._store.read_many(wanted)
        missing = [key for key, entry in entries.items() if not isinstance(entry, AnchorKV)]
        for key in missing:
            time.sleep(self._compute_s)
            self._store[key] = self._kv
        seconds = time.perf_counter() - started
        hits = [after - count for after, count in zip(self._store.hits, before, strict=True)]
        of_read = dict(zip(_SOURCES, (*hits, len(missing)), strict=True))
        if counts:
            self.sources.update(of_read)
            self.waits.append(seconds)
        else:
            (source,) = (name for name, count in of_read.items() if count)
            self._seconds[source].append(seconds)

    def mean_s(self) -> dict[str, float]:
        """Mean seconds per chunk, of the warm-up."""
        return {
            name: float(np.mean(seconds)) if seconds else 0.0
            for name, seconds in self._seconds.items()
        }
