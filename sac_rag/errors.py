"""The few exceptions a caller would catch. Knows nothing else of the package."""


class UnsupportedModel(ValueError):
    """The model's keys cannot be moved to another position, so its chunks cannot be cached."""


class PromptTooLong(ValueError):
    """The prompt would pass the model's last position."""


class ModelUnavailable(RuntimeError):
    """A default model could not be fetched, or its bytes are not the pinned ones."""


class CorruptEntry(KeyError):
    """A store holds bytes under this key, but not the ones that were written.

    A `KeyError`, so that to every user of the mapping the entry is simply not there.

    Attributes:
        reason: Why the entry was refused, one of the miss reasons: "corrupt", "format" or "key".
        detail: What was found and what was expected.
    """

    def __init__(self, detail: str, reason: str = "corrupt") -> None:
        super().__init__(detail)
        self.detail = detail
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class ChunkMiss(KeyError):
    """A chunk is not in the store and the caller asked for `on_miss="raise"`.

    Attributes:
        reasons: Miss reason of every chunk asked for, None where it was found.
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
