"""Exceptions that a caller may want to catch, and the reasons of misses."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """The model's keys cannot be moved to another position, so its chunks cannot be cached."""


class PromptTooLongError(ValueError):
    """The prompt would pass the model's last position."""


class ModelUnavailableError(RuntimeError):
    """A default model could not be fetched, or its bytes are not the pinned ones."""


class CorruptEntryError(KeyError):
    """A store holds bytes under this key, but not the ones that were written.

    It is a `KeyError`: for every user of the mapping the entry is not there.

    Attributes:
        reason: Why the entry was refused, one of `REASONS`: "corrupt", "format" or "secret".
        detail: What was expected and what was read.
    """

    def __init__(self, detail: str, reason: str = "corrupt") -> None:
        super().__init__(detail)
        self.detail = detail
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class ChunkMissError(KeyError):
    """A chunk is not in the store, and on_miss is "raise".

    Attributes:
        reasons: Miss reason of every chunk asked for, None for a hit.
    """

    def __init__(self, reasons: list[str | None]) -> None:
        missing = {i: reason for i, reason in enumerate(reasons) if reason is not None}
        super().__init__(
            f"{len(missing)} of {len(reasons)} chunks are not in the store "
            f"(chunk number: reason = {missing}); precompress them, or use on_miss='compress'"
        )
        self.reasons = reasons

    def __str__(self) -> str:
        return str(self.args[0])


# Why a chunk was not read from the store; the only list. Details may follow behind a colon, as in
# "fingerprint: config.ratio was 5, is 4"; the name before the colon is one of these.
REASONS = {
    "absent": "was never stored, as far as the store has recorded",
    "evicted": "was dropped to keep the store below its cap",
    "expired": "was older than the store's max_age_s",
    "forgotten": "was deleted with the last document that had this text",
    "fingerprint": "is there, but was made by another model or compressor",
    "ratio": "is there, but with fewer entries than asked for",
    "corrupt": "is there, but its bytes are not the ones written",
    "format": "was written by another version of sac_rag",
    "secret": "is encrypted, and not with the secret that the store was opened with",
    "unreadable": "the store itself could not be read",
    "slow": "is there, but computing it was measured to be faster than reading it",
}


def name_of(reason: str) -> str:
    """The name of a reason, without its details."""
    return reason.partition(":")[0]
