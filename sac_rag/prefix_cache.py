"""Prefixes, plain text read once for all prompts that begin with it. Knows no template or store."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from sac_rag.compressors.full import read_plain
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Part


@dataclass(frozen=True, eq=False)
class Split:
    """Prompts without the prefix that all of them begin with.

    Attributes:
        prefix: KV of that prefix; None if they do not share one.
        rows: What follows it, one prompt each.
        reused: Tokens of the prefix that were read before, by another call.
    """

    prefix: AnchorKV | None
    rows: list[list[Part]]
    reused: int


class Prefixes:
    """KV of the prefixes read last, kept in memory.

    A prefix is read alone, at position 0 and with every token kept, so that a prompt behind it has
    the logits of reading both in one pass, whoever read it and however often it is used.

    Attributes:
        generator: Reads them.
        capacity: Prefixes kept; the one used longest ago goes first.
    """

    def __init__(self, generator: Generator, capacity: int = 8) -> None:
        self.generator = generator
        self.capacity = capacity
        self._kept: OrderedDict[tuple[int, ...], AnchorKV] = OrderedDict()
        self._lock = threading.Lock()

    def split(self, beginning: Sequence[int], rows: Sequence[Sequence[Part]]) -> Split:
        """Takes off what all prompts begin with.

        Args:
            beginning: Token ids that prompts of this kind begin with. Where a prompt leaves them
                before their end, so much is taken as is common to all.
            rows: One prompt each, any interleaving of text and chunks.

        Returns:
            The prompts as they were if they do not have most of the beginning in common.
        """
        common = min((_common(beginning, row) for row in rows), default=0)
        if 2 * common <= len(beginning):
            return Split(None, [list(row) for row in rows], reused=0)
        kv, was_there = self._read(tuple(beginning))
        # Tokens see only those before them: the first so many are a prefix of their own.
        of_token = kv.num_entries // kv.num_tokens
        prefix = replace(kv.first(common * of_token), num_tokens=common)
        rest = [_without(row, common) for row in rows]
        return Split(prefix, rest, reused=common if was_there else 0)

    def _read(self, ids: tuple[int, ...]) -> tuple[AnchorKV, bool]:
        # Whoever comes second waits, and finds it.
        with self._lock:
            found = self._kept.get(ids)
            if found is not None:
                self._kept.move_to_end(ids)
                return found, True
            kv = self._kept[ids] = read_plain(self.generator, ids)
            while len(self._kept) > self.capacity:
                self._kept.popitem(last=False)
            return kv, False


def _common(beginning: Sequence[int], row: Sequence[Part]) -> int:
    """How many of a prompt's first tokens are the beginning's; never all of a prompt."""
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
