"""Decoding: how tokens are chosen and when an answer ends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and when an answer ends.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the most likely token (greedy); above 0 samples.
        top_p: Sample from the most likely tokens that together have this probability.
        top_k: Sample from this number of most likely tokens; 0 for no limit.
        stop: Texts at which an answer ends; they are not part of it. None for those of the prompt
            format after its own prompts and none after any other; () for none. A stop text in the
            white space before the first word does not end an answer.
        seed: Makes sampling repeatable. None uses torch's global state.

    Raises:
        ValueError: for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.stop is not None:
            stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
            object.__setattr__(self, "stop", stop)
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or above"),
            ("stop", all(self.stop or ()), "made of texts that are not empty"),
        ):
            if not good:
                raise ValueError(f"{name} must be {expected}, was: {getattr(self, name)!r}")
