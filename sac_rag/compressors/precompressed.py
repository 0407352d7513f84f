"""Stored: stands in for the compressor that precompressed a store, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NoReturn

from torch import Tensor
from typing_extensions import Self

from sac_rag.compressors.base import KV_FORMAT, Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.lm.generator import Generator


class Stored(Compressor):
    """The fingerprint, tokens and cue of a compressor, without LoRA and other weights.

    With a store that has all chunks, answers equal the compressor's, at every ratio that the stored
    entries serve; a chunk that is missing can be read as text, but not compressed.

    Args:
        generator: The frozen LM.
        config: Config of the compressor.
        fields: Fingerprint fields of the compressor.
        cue: Cue of the compressor, if it has one. Shape: (hidden,)

    Raises:
        ValueError: if the generator is not that of the fingerprint, naming what differs.
    """

    method: ClassVar[str] = "stored"
    computes: ClassVar[bool] = False

    def __init__(
        self,
        generator: Generator,
        config: CompressorConfig,
        fields: Mapping[str, str],
        cue: Tensor | None,
    ) -> None:
        super().__init__(generator, replace(config, method=self.method))
        self.config = config
        self.cue = cue
        self._fields = dict(fields)
        self._require_generator()
        if cue is not None and tuple(cue.shape) != (generator.hidden_size,):
            raise ValueError(
                f"the cue must have shape {(generator.hidden_size,)}, was: {tuple(cue.shape)}"
            )

    def fingerprint_fields(self) -> dict[str, str]:
        """Fingerprint fields of the compressor that made the stored entries."""
        return dict(self._fields)

    def layout(self, tokens: Tensor) -> NoReturn:
        """Raises RuntimeError, naming the remedy."""
        raise RuntimeError(
            "a chunk is not in the store, and the compressor is not here to compress it; use "
            "on_miss='text' or 'raise', or precompress the chunk where the compressor is"
        )

    def _with(self, **changes: Any) -> Self:
        if self.is_nested and changes.keys() == {"ratio"}:
            return super()._with(**changes)
        raise ValueError(
            f"what is stored was made with its own config, asked for: {changes}; "
            "compress the text again with the compressor itself"
        )

    def _require_generator(self) -> None:
        expected = {"kv_format": str(KV_FORMAT), **self.generator_fields()}
        mismatches = [
            f"{name} was {self._fields.get(name, 'unknown'):.16}, is {value:.16}"
            for name, value in expected.items()
            if self._fields.get(name) != value
        ]
        if mismatches:
            raise ValueError(
                f"the chunks were compressed for another model: {'; '.join(mismatches)}; "
                "load the model they were compressed for, in the same dtype"
            )
