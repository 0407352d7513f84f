"""split, a document to chunks of whole sentences, measured in the generator's tokens."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from sac_rag.chunk import Chunk
from sac_rag.lm.text_tokenizer import TextTokenizer, is_fast, ordinary_tokenizer


def split(document: Chunk, tokenizer: Any, *, max_tokens: int = 256) -> list[Chunk]:
    """Cuts a document into pieces of whole sentences.

    A piece ends where a paragraph does if it is then at least half full, else after its last whole
    sentence. A sentence is cut only if it does not fit on its own: at a line's end or a space, or
    between characters if there is none.

    Args:
        document: With the text that is cut.
        tokenizer: A fast HF tokenizer. Tokens are counted as the generator counts a chunk's:
            without special tokens, and "<|im_end|>" in the text is ordinary characters.
        max_tokens: Most tokens of a piece, tokenized on its own.

    Returns:
        The pieces in order, without white space around them, each with the document's id, title
        and metadata and, if there are several, "part" (from 1) and "parts" in the metadata, unless
        it has its own. Only
        white space is lost; a document of white space has no pieces.

    Raises:
        ValueError: if max_tokens is below 1, or below the tokens of a single character.
        TypeError: for a tokenizer that is not a fast one.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, was: {max_tokens}")
    if not is_fast(tokenizer):
        raise TypeError(
            "tokenizer must be a fast HF tokenizer, one that has the offsets of its tokens in the "
            f"text, was: {type(tokenizer).__name__}; load it with AutoTokenizer"
        )
    texts = list(_Cutter(document.text, ordinary_tokenizer(tokenizer), max_tokens).pieces())
    if len(texts) == 1:
        return [replace(document, text=texts[0])]
    return [
        replace(
            document,
            text=text,
            metadata={"part": part, "parts": len(texts), **document.metadata},
        )
        for part, text in enumerate(texts, 1)
    ]


# Signs that end a sentence, with closing quotes and brackets: "." and the like before white space,
# "\u3002" and the like anywhere. One run of signs is one match, or a line of dots would take
# quadratic time.
_CLOSERS = r"""["'\u2019\u201d\u00bb\u300d\u300f\uff09)\]*_]*"""
_STOP = re.compile(
    rf"(?<![.!?\u2026])[.!?\u2026]+{_CLOSERS}(?=\s)"  # full stop, ellipsis
    rf"|[\u3002\uff01\uff1f\uff61\u061f\u06d4\u0964\u0965]+{_CLOSERS}"  # CJK, Arabic, danda
)
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n|[\f\u2029]")
# A full stop after these does not end a sentence: the number of an item; initials and the like
# (J, U.S, e.g, Ph.D); titles and the like.
_NO_END = re.compile(
    r"(?:^|\n)[ \t]*\d+$|(?<![\w.])(?:(?:[^\W\d_]{1,2}\.)*[^\W\d_]"
    r"|capt|cf|co|col|corp|dr|figs?|gen|inc|jr|ltd?|mrs?|ms|pp|prof|rev|sr|st|vol|vs)$",
    re.I,
)
_SPACE = re.compile(r"\s*")
_BLOCK = 1 << 16  # characters tokenized at a time to see where the tokens are


def _sentence_ends(text: str) -> Iterator[int]:
    for match in _STOP.finditer(text):
        start, end = match.span()
        continues = text[end : end + 1].isspace() and text[end + 1 : end + 2].islower()
        if not continues and not (
            match[0] == "." and _NO_END.search(text, max(0, start - 12), start)
        ):
            yield end


def sentences(text: str) -> list[str]:
    """The sentences of a text in order, without white space around them.

    A paragraph's end ends a sentence too; abbreviations and initials do not.
    """
    paragraphs = (match.start() for match in _PARAGRAPH.finditer(text))
    ends = sorted({0, *paragraphs, *_sentence_ends(text), len(text)})
    pieces = (text[start:end].strip() for start, end in pairwise(ends))
    return [piece for piece in pieces if piece]


class _Cutter:
    """Cuts one text, from its start to its end.

    The offsets of the tokens in the whole text give how far a piece may reach. A piece's first and
    last token can differ once it is tokenized alone, so each piece is tokenized again and, if it is
    too long, cut earlier.
    """

    def __init__(self, text: str, tokenizer: TextTokenizer, max_tokens: int) -> None:
        self._text = text
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._paragraphs = [match.start() for match in _PARAGRAPH.finditer(text)]
        self._sentences = sorted({*self._paragraphs, *_sentence_ends(text)})
        # Of the block tokenized last: its end, and the start of each of its tokens.
        self._read_to = 0
        self._token_starts: list[int] = []

    def pieces(self) -> Iterator[str]:
        start = self._after_space(0)
        while start < len(self._text):
            end = self._end_of_piece(start)
            yield self._text[start:end].rstrip()
            start = self._after_space(end)

    def _after_space(self, position: int) -> int:
        match = _SPACE.match(self._text, position)
        return match.end() if match else position

    def _end_of_piece(self, start: int) -> int:
        end = self._reach(start, self._max_tokens)
        if end < len(self._text):
            end = self._last_sentence_end(start, end)
        if end == start:
            # Tokenized alone it may have fewer tokens than in its place.
            end = self._first_sentence_end(start)
        while end > start:
            if self._excess(start, end) <= 0:
                return end
            end = self._last_sentence_end(start, end - 1)
        room = self._max_tokens
        while True:
            end = self._cut_sentence(start, max(self._reach(start, room), start + 1))
            excess = self._excess(start, end)
            if excess <= 0:
                return end
            if end == start + 1:
                raise ValueError(
                    f"max_tokens must be at least {self._max_tokens + excess}, the tokens of the "
                    f"one character {self._text[start]!r}, was: {self._max_tokens}"
                )
            room = max(room - excess, room // 2)

    def _last_sentence_end(self, start: int, limit: int) -> int:
        """The best end for a piece of whole sentences, or `start` if there is none."""
        paragraph = bisect_right(self._paragraphs, limit) - 1
        if paragraph >= 0 and self._paragraphs[paragraph] > self._half(start):
            return self._paragraphs[paragraph]
        sentence = bisect_right(self._sentences, limit) - 1
        return max(start, self._sentences[sentence]) if sentence >= 0 else start

    def _first_sentence_end(self, start: int) -> int:
        """The end of the sentence at `start`, or `start` if it is certainly too long."""
        sentence = bisect_right(self._sentences, start)
        end = self._sentences[sentence] if sentence < len(self._sentences) else len(self._text)
        return end if end <= self._reach(start, 2 * self._max_tokens) else start

    def _cut_sentence(self, start: int, limit: int) -> int:
        """The best place in a sentence, after `start` and no later than `limit`, to cut it."""
        text = self._text
        if limit == len(text):
            return limit
        line = text.rfind("\n", self._half(start), limit + 1)
        if line > start:
            return line
        for position in range(limit, start, -1):
            if text[position].isspace():
                return position
        for position in range(limit, start, -1):
            if not _is_inside_character(text, start, position):
                return position
        return limit

    def _half(self, start: int) -> int:
        return self._reach(start, self._max_tokens // 2)

    def _reach(self, start: int, tokens: int) -> int:
        """The end of a number of tokens after `start`, as tokenized in the whole text."""
        size = _BLOCK
        while True:
            last = bisect_left(self._token_starts, start) + tokens
            if last < len(self._token_starts):
                return self._token_starts[last]
            if self._read_to == len(self._text):
                return self._read_to
            self._read_to = min(start + size, len(self._text))
            offsets = self._tokenizer.offsets(self._text[start : self._read_to])
            self._token_starts = [start + first for first, _ in offsets]
            size *= 2

    def _excess(self, start: int, end: int) -> int:
        """Tokens by which a piece, tokenized alone, is too long; 0 or less if it fits."""
        end = start + len(self._text[start:end].rstrip())
        return len(self._tokenizer.ids(self._text[start:end])) - self._max_tokens


def _is_inside_character(text: str, start: int, position: int) -> bool:
    """Whether a reader would see one character on both sides of `position`."""
    before, after = text[position - 1], text[position]
    if "\U0001f1e6" <= before <= "\U0001f1ff" and "\U0001f1e6" <= after <= "\U0001f1ff":
        # Two of these are one flag.
        first = position
        while first > start and "\U0001f1e6" <= text[first - 1] <= "\U0001f1ff":
            first -= 1
        return (position - first) % 2 == 1
    return (
        unicodedata.category(after).startswith("M")  # accents, vowel signs, variation selectors
        or after in "\u200c\u200d"  # joiners
        or "\U0001f3fb" <= after <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= after <= "\U000e007f"  # tags, in the flags of regions
        or "\u1160" <= after <= "\u11ff"  # Korean vowels and finals written apart
        or before == "\u200d"
        or unicodedata.combining(before) == 9  # viramas join two letters
    )
