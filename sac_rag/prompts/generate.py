"""Generates the text of answers to a Prompt, token by token, for all rows of a batch.

White space before an answer is not part of it, and a stop text in it does not end the answer:
after "Answer:" models begin with a space or a new line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import Tensor

from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Prompt
from sac_rag.prompts.decode import Decoder
from sac_rag.prompts.decoding import Decoding

__all__ = ["Decoding", "FinishReason", "Generation"]

FinishReason = Literal["eos", "stop", "length"]

# Decoded text of an incomplete character in a byte-level tokenizer.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


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

    @property
    def open_rows(self) -> list[int]:
        """Rows that have not ended."""
        return [row for row, reason in enumerate(self.finish_reasons) if reason is None]

    def __iter__(self) -> Iterator[list[str]]:
        return self._steps

    def begin(self, decoder: Decoder) -> list[str]:
        """Reads the prompt, as rows of a decoder; returns the first text of every row."""
        return self.take(decoder.join(self._prompt, self._decoding), range(len(self._writers)))

    def take(self, tokens: Tensor, rows: Sequence[int]) -> list[str]:
        """Adds a token to some rows; those that have ended ignore it.

        Args:
            tokens: Shape: (rows,)
            rows: The row of each token.

        Returns:
            The new text of every row.
        """
        pieces = [""] * len(self._writers)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            pieces[row] = self._take(row, token)
        return pieces

    def _write(self) -> Iterator[list[str]]:
        decoder = Decoder(self._generator)
        rows = list(range(len(self._writers)))
        yield self.begin(decoder)
        while self.open_rows:
            # Copying the cache costs as much as some steps of the rows that it drops.
            if self.rows_may_leave and 2 * len(self.open_rows) <= len(rows):
                decoder.keep([place for place, row in enumerate(rows) if row in self.open_rows])
                rows = self.open_rows
            yield self.take(decoder.step(), rows)

    @property
    def rows_may_leave(self) -> bool:
        """Whether the other rows' tokens stay the same: samples share random numbers."""
        return self._decoding.temperature == 0

    def _take(self, row: int, token: int) -> str:
        if self.finish_reasons[row]:
            return ""
        self.num_tokens[row] += 1
        last = self.num_tokens[row] == self._decoding.max_new_tokens
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
