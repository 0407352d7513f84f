"""A store under load: processes that read, write and forget while they are killed and stopped.

Each process has keys of its own, which only it writes, and appends to a log what the store has
acknowledged; a kill does not undo that. What a read must find is therefore known: any other value
is wrong, and an acknowledged entry that is not there is lost. Meanwhile a keeper changes the key of
the store and collects garbage, and the folder is moved away and back.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.stores.cipher import Cipher
from sac_rag.stores.disk import DiskStore
from sac_rag.whole_file import one_writer

_CIPHERS = (None, Cipher(b"a" * 32), Cipher(b"b" * 32))
_KEYS = 40  # of each process
_RECORD = 8  # bytes in a log: what happened, the key's number, a line end
_INCIDENT_EVERY = 40  # operations of all processes together
_STOP_SECONDS = 1.0
_AWAY_SECONDS = 0.05
_HUNG_SECONDS = 120.0  # of one operation; the longest wait inside of a store is 60


@dataclass(frozen=True)
class LoadReport:
    """What came of it.

    Attributes:
        seconds: Of the run.
        operations: Of all processes.
        hits: Reads that gave the right value.
        writes: Entries written and acknowledged.
        forgotten: Documents forgotten and acknowledged.
        rekeys: Changes of the store's key that were finished.
        refused: Operations that raised an OSError or a ValueError, or met an entry in another key.
        kills: Processes killed.
        stops: Processes stopped for a while.
        moves: Times the folder was moved away and back.
        wrong: Reads that gave another value.
        lost: Acknowledged entries that were not there.
        hung: Processes without progress for two minutes.
        problems: Of the store at the end, after a repair; unexpected ends of processes.
    """

    seconds: float
    operations: int
    hits: int
    writes: int
    forgotten: int
    rekeys: int
    refused: int
    kills: int
    stops: int
    moves: int
    wrong: int
    lost: int
    hung: int
    problems: tuple[str, ...]

    @property
    def is_in_order(self) -> bool:
        """Whether nothing was wrong, lost or hung, and the store has no problem."""
        return not (self.wrong or self.lost or self.hung or self.problems)


def measure_load(
    folder: Path,
    *,
    seconds: float = float("inf"),
    operations: int | None = None,
    processes: int = 6,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> LoadReport:
    """Runs the load in an empty folder until the time or the operations are over.

    Args:
        folder: For the store and the logs, which stay. Processes are forked: nothing of this one
            may have a store open.
        seconds: Longest time; the check at the end comes on top.
        operations: Of each process. Default: no limit.
        processes: Number that read, write and forget; there is one more, the keeper.
        seed: Of everything that is drawn at random.
        on_progress: Called with the number of operations since the last call.

    Raises:
        ValueError: if the folder is not empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} must be empty")
    DiskStore(folder / "store").close()
    load = _Load(folder, operations, processes, seed)
    started = time.monotonic()
    try:
        while time.monotonic() - started < seconds and load.is_running():
            before = load.operations
            load.step()
            if on_progress is not None:
                on_progress(load.operations - before)
    finally:
        load.end()
    return load.report(time.monotonic() - started)


class _Load:
    """The processes, and what befalls them."""

    def __init__(self, folder: Path, limit: int | None, processes: int, seed: int) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.operations = 0
        self._limit = limit
        self._random = random.Random(seed)
        self._next_incident = _INCIDENT_EVERY
        self._logs = [_Log(folder / f"{number}.log") for number in range(processes + 1)]
        self._pids: dict[int, int] = {}  # of each log
        self._progress = [(0, time.monotonic()) for _ in self._logs]
        self._started = 0

    def is_running(self) -> bool:
        """Whether a process has operations left to do; the keeper runs as long as others do."""
        return self._limit is None or any(log.count < self._limit for log in self._logs[1:])

    def step(self) -> None:
        """Starts what has ended, and lets something happen where it is time."""
        for number, log in enumerate(self._logs):
            is_due = self._limit is None or number == 0 or log.count < self._limit
            if number not in self._pids and is_due:
                self._start(number)
        time.sleep(0.01)
        self.operations = sum(log.count for log in self._logs)
        self._reap()
        self._end_hung()
        if self.operations >= self._next_incident:
            self._next_incident = self.operations + _INCIDENT_EVERY
            self._random.choice((self._kill, self._kill, self._stop, self._move))()

    def end(self) -> None:
        """Ends all processes, between two operations."""
        (self.folder / "end").touch()
        deadline = time.monotonic() + _HUNG_SECONDS
        while self._pids and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.01)
        self.counts["hung"] += len(self._pids)
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids.clear()

    def report(self, seconds: float) -> LoadReport:
        """Reads the logs, and every entry; repairs what killed processes left."""
        happened = sum((log.happened() for log in self._logs), Counter[str]())
        lost = happened["L"]
        with _opened(self.folder) as store:
            _rekey(store, self._random)  # finishes a change that was interrupted
            store.check(fix=True)
            self.problems += store.check()
            for log in self._logs[1:]:
                for number, last in log.state().items():
                    kv = store.get(_key(number))
                    lost += last == "P" and kv is None
                    happened["W"] += kv is not None and not kv.bit_equal(_value(number))
                    happened["W"] += last == "G" and kv is not None
        return LoadReport(
            seconds=seconds,
            operations=sum(log.count for log in self._logs),
            hits=happened["R"],
            writes=happened["P"],
            forgotten=happened["G"],
            rekeys=happened["K"],
            refused=happened["E"],
            kills=self.counts["kills"],
            stops=self.counts["stops"],
            moves=self.counts["moves"],
            wrong=happened["W"],
            lost=lost,
            hung=self.counts["hung"],
            problems=tuple(self.problems),
        )

    def _start(self, number: int) -> None:
        self._started += 1
        seed = self._started
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                work = _keep if number == 0 else _work
                work(self.folder, self._logs[number], number, random.Random(seed), self._limit)
                os._exit(0)
            except BaseException as error:  # noqa: BLE001 (what is above this is the parent's)
                os.write(2, f"process {number}: {error!r}\n".encode())
                os._exit(1)
        self._pids[number] = pid
        self._progress[number] = (self._logs[number].count, time.monotonic())

    def _reap(self) -> None:
        for number, pid in list(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._pids[number]
                code = os.waitstatus_to_exitcode(status)
                if code not in (0, -signal.SIGKILL):
                    self.problems.append(f"process {number} ended with {code}")

    def _end_hung(self) -> None:
        for number, pid in self._pids.items():
            count, since = self._progress[number]
            if self._logs[number].count != count:
                self._progress[number] = (self._logs[number].count, time.monotonic())
            elif time.monotonic() - since > _HUNG_SECONDS:
                self.counts["hung"] += 1
                os.kill(pid, signal.SIGKILL)

    def _kill(self) -> None:
        if self._pids:
            os.kill(self._random.choice(list(self._pids.values())), signal.SIGKILL)
            self.counts["kills"] += 1

    def _stop(self) -> None:
        if self._pids:
            pid = self._random.choice(list(self._pids.values()))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(_STOP_SECONDS * self._random.random())
            os.kill(pid, signal.SIGCONT)
            self.counts["stops"] += 1

    def _move(self) -> None:
        with one_writer(self.folder / "opening"):
            (self.folder / "store").rename(self.folder / "away")
            time.sleep(_AWAY_SECONDS)
            (self.folder / "away").rename(self.folder / "store")
        self.counts["moves"] += 1


class _Log:
    """What happened to each key, appended to a file before anything else happens.

    B: putting it has begun; P: put; F: forgetting it has begun; G: forgotten; R: read; M: not
    there, and need not be; E: refused; W: wrong; L: lost; K: the key of the store was changed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    @property
    def count(self) -> int:
        """Number of records."""
        return self._path.stat().st_size // _RECORD

    def add(self, what: str, number: int = 0) -> None:
        """Appends a record, whole or not at all."""
        with self._path.open("ab", buffering=0) as file:
            file.write(f"{what}{number:06d}\n".encode())

    def happened(self) -> Counter[str]:
        """Number of records of each kind."""
        return Counter(what for what, _ in self._records())

    def state(self) -> dict[int, str]:
        """The last change of each key."""
        return {number: what for what, number in self._records() if what in "BPFGL"}

    def _records(self) -> Iterator[tuple[str, int]]:
        for line in self._path.read_text().splitlines():
            yield line[0], int(line[1:])


def _work(folder: Path, log: _Log, process: int, draw: random.Random, limit: int | None) -> None:
    """Reads, writes and forgets, until it is killed or all is over."""
    state = log.state()
    finished = log.count
    while not (folder / "end").exists():
        with contextlib.suppress(OSError, ValueError), _opened(folder) as store:
            while not (folder / "end").exists():
                if limit is not None and finished >= limit:
                    return
                finished += 1
                number = process * _KEYS + draw.randrange(_KEYS)
                try:
                    _operate(store, log, state, number, draw)
                except (OSError, ValueError):
                    log.add("E", number)
                    raise


def _operate(
    store: DiskStore, log: _Log, state: dict[int, str], number: int, draw: random.Random
) -> None:
    kind = draw.random()
    if kind < 0.3:
        state[number] = "B"
        log.add("B", number)
        store.put(_key(number), _value(number), [f"document {number}"])
        state[number] = "P"
        log.add("P", number)
    elif kind < 0.36:
        state[number] = "F"
        log.add("F", number)
        store.forget(f"document {number}")
        state[number] = "G"
        log.add("G", number)
    else:
        is_own = kind < 0.8
        if not is_own:
            number = draw.randrange(_KEYS, 4 * _KEYS)
        last = state.get(number) if is_own else None
        try:
            right = store[_key(number)].bit_equal(_value(number)) and last != "G"
            what = "R" if right else "W"
        except CorruptEntryError as refused:
            # Its key is being changed; anything else should not befall an entry here.
            what = "E" if refused.reason == "secret" else "W"
        except KeyError:
            what = "L" if last == "P" else "M"
        if what == "L":
            state[number] = "L"
        log.add(what, number)


def _keep(folder: Path, log: _Log, process: int, draw: random.Random, limit: int | None) -> None:
    """Changes the store's key and collects garbage, now and then."""
    while not (folder / "end").exists():
        with contextlib.suppress(OSError, ValueError), _opened(folder) as store:
            if draw.random() < 0.5:
                _rekey(store, draw)
                log.add("K")
            else:
                store.gc()
                log.add("M")
        time.sleep(0.2)


def _opened(folder: Path) -> DiskStore:
    """The store, whichever key it has by now; not while it is away: it would be made again."""
    for cipher in _CIPHERS[1:]:
        with contextlib.suppress(ValueError), one_writer(folder / "opening"):
            return DiskStore(folder / "store", cipher=cipher)
    with one_writer(folder / "opening"):
        return DiskStore(folder / "store")


def _rekey(store: DiskStore, draw: random.Random) -> None:
    """Gives the store another key, or finishes a change to one that was interrupted."""
    recorded = store.stats().cipher
    # Never its own, which would take such a change back.
    others = [cipher for cipher in _CIPHERS if (cipher and cipher.id) != recorded]
    draw.shuffle(others)
    try:
        store.rekey(others[0])
    except ValueError:
        store.rekey(others[1])


def _key(number: int) -> str:
    return xxhash.xxh3_128_hexdigest(str(number).encode())


def _value(number: int) -> AnchorKV:
    tensor = torch.full((2, 2, 4, 16), float(number))
    return AnchorKV.uniform(tensor, tensor, torch.arange(4, dtype=torch.int32), 20)
