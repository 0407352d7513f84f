"""Prefixes: KV of plain text that many prompts begin with, read once and kept in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from sac_rag import forks
from sac_rag.compressors.full import read_plain
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Part


@dataclass(frozen=True, eq=False)
class Split:
    """Prompts split into their common prefix and the rest.

    Attributes:
        prefix: KV of the prefix; None if there is no common one.
        rows: The rest of each prompt.
        reused: Tokens of the prefix that an earlier call has read.
    """

    prefix: AnchorKV | None
    rows: list[list[Part]]
    reused: int


class Prefixes:
    """KV of the most recently used prefixes.

    A prefix is read alone, at position 0, and every token is kept: a prompt behind it then has the
    same logits as in one pass over both.

    Attributes:
        generator: The LM that reads the prefixes.
        capacity: Most prefixes kept; the least recently used is dropped first.
        max_bytes: Most bytes of their KV; a longer prefix is read for each call.
    """

    def __init__(self, generator: Generator, capacity: int = 8, max_bytes: int = 256 << 20) -> None:
        self.generator = generator
        self.capacity = capacity
        self.max_bytes = max_bytes
        self._prefixes: OrderedDict[tuple[int, ...], AnchorKV] = OrderedDict()
        self._lock = forks.lock(self, "_lock")

    @property
    def nbytes(self) -> int:
        """Bytes of the KV of all prefixes kept."""
        return sum(kv.nbytes for kv in self._prefixes.values())

    def split(self, beginning: Sequence[int], rows: Sequence[Sequence[Part]]) -> Split:
        """Splits off the prefix that all prompts have in common.

        Args:
            beginning: Token ids that prompts of this kind begin with. Where a prompt differs before
                their end, the prefix ends there.
            rows: One prompt each, any interleaving of text and chunks.

        Returns:
            The prompts unchanged unless more than half of the beginning is common to all.
        """
        common = min((_common(beginning, row) for row in rows), default=0)
        if 2 * common <= len(beginning):
            return Split(None, [list(row) for row in rows], reused=0)
        kv, was_cached = self._read(tuple(beginning))
        # Tokens attend only to earlier ones: the first ones are a complete shorter prefix.
        per_token = kv.num_entries // kv.num_tokens
        prefix = replace(kv.first(common * per_token), num_tokens=common)
        rest = [_without(row, common) for row in rows]
        return Split(prefix, rest, reused=common if was_cached else 0)

    def _read(self, ids: tuple[int, ...]) -> tuple[AnchorKV, bool]:
        # Under the lock, so that a second thread waits instead of reading the same prefix.
        with self._lock:
            cached = self._prefixes.get(ids)
            if cached is not None:
                self._prefixes.move_to_end(ids)
                return cached, True
            kv = self._prefixes[ids] = read_plain(self.generator, ids)
            while len(self._prefixes) > self.capacity or self.nbytes > self.max_bytes:
                self._prefixes.popitem(last=False)
            return kv, False


def _common(beginning: Sequence[int], row: Sequence[Part]) -> int:
    """Number of first tokens that a prompt shares with the beginning; never all of the prompt."""
    plain = list(takewhile(lambda part: not isinstance(part, AnchorKV), row))
    ids = [token for part in plain for token in part]  # type: ignore[union-attr]
    if len(plain) == len(row):
        ids = ids[:-1]  # the model answers from the last token
    same = takewhile(lambda pair: pair[0] == pair[1], zip(beginning, ids, strict=False))
    return sum(1 for _ in same)


def _without(row: Sequence[Part], count: int) -> list[Part]:
    """A prompt without its first tokens."""
    rest: list[Part] = []
    for part in row:
        if count and not isinstance(part, AnchorKV):
            part, count = part[count:], max(0, count - len(part))
            if not part:
                continue
        rest.append(part)
    return rest
