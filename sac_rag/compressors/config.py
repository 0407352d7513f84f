"""What determines a compressor besides its weights. Knows nothing of models or tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Attention = Literal["causal", "anchors", "full"]
StoredDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class CompressorConfig:
    """Everything about a compressor that must be the same for its KV to be the same.

    Raises:
        ValueError: for a value out of range, naming the field, what was got and what is expected.
    """

    method: str = "sac"  # which compression method: a name in `compressors.METHODS`
    ratio: int = 5  # source tokens per anchor
    segment_tokens: int = 510  # longest text encoded in one forward pass, in tokens
    sink: str = ""  # opening of every prompt, read before each segment and dropped ("" = none)
    attention: Attention = "full"  # who sees later tokens: nobody, the anchors, or every token
    cue: bool = True  # whether a learned [LM] embedding follows each chunk in the prompt
    lora_rank: int = 128
    lora_alpha: int = 256  # LoRA is scaled by lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")  # modules that get LoRA; () = none
    stored_dtype: StoredDtype = "bfloat16"  # what keys and values are kept in

    def __post_init__(self) -> None:
        if isinstance(self.lora_targets, str):
            raise ValueError(
                f"lora_targets must be several module names, was one str: {self.lora_targets!r}"
            )
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        if not isinstance(self.cue, bool):
            raise ValueError(f"cue must be true or false, was: {self.cue!r}")
        for name in ("ratio", "segment_tokens", "lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, was: {value!r}")
        for name, choices in (
            ("attention", get_args(Attention)),
            ("stored_dtype", get_args(StoredDtype)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, was: {getattr(self, name)!r}"
                )
        if not isinstance(self.sink, str):
            raise ValueError(f"sink must be a str, was: {self.sink!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return {**asdict(self), "lora_targets": list(self.lora_targets)}

    def to_json(self) -> str:
        """The fields, one a line."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CompressorConfig:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: if it is not a JSON object, or has a field this version does not know.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a compressor's config must be JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"a compressor's config must be a JSON object, was: {values!r:.80}")
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown fields in a compressor's config: {', '.join(unknown)}; "
                "it was written by a newer sac_rag: upgrade, or train it anew"
            )
        return cls(**values)
