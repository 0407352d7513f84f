"""TextTokenizer: text to token ids, without what the users of an HF tokenizer share.

Whether special tokens are recognised, truncation and padding are state of an HF tokenizer: each
call sets them, from any thread and any library. A TextTokenizer has no such state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer

# Added tokens that are words or white space are vocabulary. All others are the template's, whether
# the tokenizer's author has flagged them as special or not: Qwen's <tool_call> is not.
_IS_VOCABULARY = re.compile(r"[\w\s'-]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


class TextTokenizer:
    """An HF tokenizer's model, which is shared, behind an added vocabulary of its own.

    Args:
        tokenizer: An HF tokenizer; later changes of it have no effect. One that is not fast is
            called as it is.
        control: Whether control tokens are recognised: True for a template's own words. In any
            other text "<|im_end|>" is ten characters.

    Attributes:
        control_ids: Tokens that no text becomes; none with control=True.
    """

    def __init__(self, tokenizer: Any, *, control: bool) -> None:
        self._control = control
        added: dict[int, AddedToken] = dict(tokenizer.added_tokens_decoder)
        recognised = {i: token for i, token in added.items() if control or not _is_control(token)}
        self.control_ids = frozenset(added.keys() - recognised.keys() - _unknown(tokenizer))
        self._slow = None if is_fast(tokenizer) else tokenizer
        if self._slow is None:
            self._backend = _twin(tokenizer.backend_tokenizer, recognised)
            # Without gaps; the HF tokenizer's have some where a token is left out.
            twin_ids = {i: self._backend.token_to_id(t.content) for i, t in recognised.items()}
            self._of_twin = {twin: i for i, twin in twin_ids.items() if twin != i}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without any added ones."""
        # Tokenizers reject half a surrogate pair, which a truncated JSON escape may leave.
        return self._ids(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each token in the text; needs a fast HF tokenizer."""
        whole = _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
        encoded = self._backend.encode(whole, add_special_tokens=False)
        offsets: list[tuple[int, int]] = encoded.offsets
        return offsets

    def _ids(self, text: str) -> list[int]:
        ids: list[int]
        if self._slow is not None:
            ids = self._slow(
                text,
                add_special_tokens=False,
                split_special_tokens=not self._control,
                verbose=False,
            ).input_ids
            return ids
        encoded = self._backend.encode(text, add_special_tokens=False)
        ids = [self._of_twin.get(i, i) for i in encoded.ids]
        if self.control_ids.isdisjoint(ids):
            return ids
        # The model itself reads the characters as a control token, as Unigram may: cut inside.
        cuts = [
            start + 1
            for i, (start, end) in zip(ids, encoded.offsets, strict=True)
            if i in self.control_ids and end - start > 1
        ]
        if not cuts:
            return ids
        return [
            i for start, end in pairwise((0, *cuts, len(text))) for i in self._ids(text[start:end])
        ]


def is_fast(tokenizer: Any) -> bool:
    """Whether an HF tokenizer is one of the tokenizers library."""
    return bool(getattr(tokenizer, "is_fast", False))


_Added = tuple[tuple[int, str, bool], ...]
_ordinary: WeakKeyDictionary[Any, tuple[_Added, TextTokenizer]] = WeakKeyDictionary()


def ordinary_tokenizer(tokenizer: Any) -> TextTokenizer:
    """The TextTokenizer of ordinary text, made once per fast HF tokenizer and added vocabulary."""
    if not is_fast(tokenizer):
        return TextTokenizer(tokenizer, control=False)
    added = tuple((i, t.content, t.special) for i, t in tokenizer.added_tokens_decoder.items())
    known = _ordinary.get(tokenizer)
    if known is None or known[0] != added:
        known = _ordinary[tokenizer] = added, TextTokenizer(tokenizer, control=False)
    return known[1]


def _unknown(tokenizer: Any) -> set[int]:
    """The token of words that the vocabulary lacks, unless it has another role too."""
    names = tokenizer.special_tokens_map
    unknown = names.get("unk_token")
    roles = [name for name, token in names.items() if token == unknown]
    return {tokenizer.unk_token_id} if roles == ["unk_token"] else set()


def _is_control(token: AddedToken) -> bool:
    return token.special or not _IS_VOCABULARY.fullmatch(token.content)


def _twin(backend: Tokenizer, added: Mapping[int, AddedToken]) -> Tokenizer:
    """A tokenizer with the same model, in the same memory, and these added tokens."""
    twin = Tokenizer(backend.model)
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    twin.add_tokens(
        [
            AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
            )
            for _, token in sorted(added.items())
        ]
    )
    return twin
