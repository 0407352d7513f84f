"""Generates the text of answers to a Prompt, token by token, for all rows of a batch.

White space before an answer is not part of it, and a stop text in it does not end the answer:
after "Answer:" models begin with a space or a new line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sac_rag.lm.attention import as_inputs
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Prompt

FinishReason = Literal["eos", "stop", "length"]

# Decoded text of an incomplete character in a byte-level tokenizer.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


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


class Generation:
    """Running generation of one answer per row: an iterator over the new text of every row.

    Leaving the loop ends the generation; the text so far stays readable.

    Args:
        generator: The LM.
        prompt: One row per answer.
        decoding: How to answer.
        stops: Stop texts of each row if the decoding has none. Default: none.

    Attributes:
        texts: Text of each row so far, without leading white space.
        num_tokens: Tokens of each row so far, its end token included.
        finish_reasons: Why each row ended; None for a row that has not.
    """

    def __init__(
        self,
        generator: Generator,
        prompt: Prompt,
        decoding: Decoding,
        stops: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self._generator = generator
        self._prompt = prompt
        self._decoding = decoding
        rows = len(prompt.num_tokens)
        if decoding.stop is not None or stops is None:
            stops = [decoding.stop or ()] * rows
        if len(stops) != rows:
            raise ValueError(f"expected stop texts of {rows} rows, got those of {len(stops)}")
        self._writers = [_Writer(generator.tokenizer, stop) for stop in stops]
        self.num_tokens = [0] * rows
        self.finish_reasons: list[FinishReason | None] = [None] * rows
        self._steps = self._write()

    @property
    def texts(self) -> list[str]:
        """Text of each row so far, without leading white space."""
        return [writer.text for writer in self._writers]

    def __iter__(self) -> Iterator[list[str]]:
        return self._steps

    def _write(self) -> Iterator[list[str]]:
        for step, tokens in enumerate(next_tokens(self._generator, self._prompt, self._decoding)):
            last = step + 1 == self._decoding.max_new_tokens
            yield [self._take(row, token, last) for row, token in enumerate(tokens.tolist())]
            if all(self.finish_reasons):
                return

    def _take(self, row: int, token: int, last: bool) -> str:
        if self.finish_reasons[row]:
            return ""
        self.num_tokens[row] += 1
        writer = self._writers[row]
        if token in self._generator.eos_ids:
            piece = writer.flush()
            self.finish_reasons[row] = "stop" if writer.stopped else "eos"
            return piece
        piece = writer.feed(token)
        if writer.stopped:
            self.finish_reasons[row] = "stop"
        elif last:
            piece += writer.flush()
            self.finish_reasons[row] = "stop" if writer.stopped else "length"
        return piece


def next_tokens(generator: Generator, prompt: Prompt, decoding: Decoding) -> Iterator[Tensor]:
    """Reads a prompt in one forward pass, then generates token by token.

    Yields:
        The next token of every row. Shape: (rows,)
    """
    choose = _chooser(decoding, generator.device)
    inputs = prompt.inputs()
    next_positions = prompt.next_positions[:, None]
    masks = prompt.masks.of_next(decoding.max_new_tokens)
    for step in range(decoding.max_new_tokens):
        # The model is locked for each step only: a slow consumer must not block other threads.
        with generator.running(prompt.adapter) as model, torch.no_grad():
            logits: Tensor = model(**inputs, logits_to_keep=1).logits[:, -1]
        tokens = choose(logits)
        yield tokens
        remaining = decoding.max_new_tokens - step - 1
        inputs |= {
            "inputs_embeds": generator.embed(tokens[:, None]),
            "position_ids": next_positions + step,
            **as_inputs([mask[..., : mask.shape[-1] - remaining] for mask in masks]),
        }


def _chooser(decoding: Decoding, device: torch.device) -> Any:
    if decoding.temperature == 0:
        return lambda logits: logits.argmax(dim=-1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(decoding.temperature))])
    if decoding.top_k:
        warpers.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        warpers.append(TopPLogitsWarper(decoding.top_p))
    random: torch.Generator | None = None
    if decoding.seed is not None:
        random = torch.Generator(device).manual_seed(decoding.seed)

    def sample(logits: Tensor) -> Tensor:
        probabilities = warpers(None, logits.float()).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=random)[:, 0]

    return sample


class _Writer:
    """Decodes tokens to text that is final: whole characters, and no part of a stop text.

    Leading white space is dropped; stop texts in it are ignored.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._context = 0  # decoding starts here, some tokens back: spaces depend on them
        self._read = 0  # tokens whose text is in `_held` or returned
        self._held = ""  # may be the beginning of a stop text
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Adds a token; returns the text that is final now."""
        self._ids.append(token)
        known = self._decode(self._ids[self._context : self._read])
        text = self._decode(self._ids[self._context :])
        if text.endswith(_INCOMPLETE):
            return ""
        self._held += text[len(known) :]
        self._context, self._read = self._read, len(self._ids)
        return self._release_until_stop(len(self._held) - self._may_become_stop())

    def flush(self) -> str:
        """Returns the text held back, after the last token."""
        known = self._decode(self._ids[self._context : self._read])
        self._held += self._decode(self._ids[self._context :])[len(known) :]
        self._context = self._read = len(self._ids)
        return self._release_until_stop(len(self._held))

    def _release_until_stop(self, length: int) -> str:
        blank = 0 if self.text else len(self._held) - len(self._held.lstrip())
        # Where a stop text must begin at least to end behind the leading white space.
        starts = [max(0, blank + 1 - len(stop)) for stop in self._stop]
        matches = [at for at in map(self._held.find, self._stop, starts) if at >= 0]
        if matches:
            self.stopped = True
            return self._release(min(matches), keep=False)
        return self._release(length)

    def _release(self, length: int, keep: bool = True) -> str:
        piece, rest = self._held[:length], self._held[length:]
        if not self.text:
            piece = piece.lstrip()
        self._held = rest if keep else ""
        self.text += piece
        return piece

    def _may_become_stop(self) -> int:
        """Length of the longest suffix of the held text that begins a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
