"""Fetched: chunks as a CachedCompressor has found or computed them."""

from __future__ import annotations

from dataclasses import dataclass

from sac_rag.kv import AnchorKV


@dataclass(frozen=True)
class Fetched:
    """Result of `CachedCompressor.fetch`; `kvs` and `misses` have one item per text.

    Attributes:
        kvs: AnchorKVs at the ratios asked for; None for a miss that is left to be read as text.
        misses: Why a chunk was not read from the store (see `errors.REASONS`); None for a hit.
        load_s: Seconds spent reading the store.
        compress_s: Seconds spent computing and storing what was missing.
        loads: Entries read that were hits.
        load_bytes: Bytes read of them.
        computed: Chunks computed.
        computed_tokens: Their source tokens.
        failed_writes: Computed chunks that could not be stored.
    """

    kvs: list[AnchorKV | None]
    misses: list[str | None]
    load_s: float
    compress_s: float
    loads: int
    load_bytes: int
    computed: int
    computed_tokens: int
    failed_writes: int


@dataclass(frozen=True)
class Lookup:
    """What the store has of chunks, before anything is computed.

    Attributes:
        keys: Of each chunk asked for.
        ratios: At which each is asked for.
        misses: Why each is not a hit; None for a hit. An entry that is stored at too high a ratio
            is a hit for some chunks and a miss for others.
        loaded: Entries read, by key.
        missing: Texts of the misses, by key.
        lowest: The lowest ratio asked for, by key.
        ended: Computations of the process that had ended before.
    """

    keys: list[str]
    ratios: list[int]
    misses: list[str | None]
    loaded: dict[str, AnchorKV]
    missing: dict[str, str]
    lowest: dict[str, int]
    ended: int
