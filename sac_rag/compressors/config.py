"""CompressorConfig: everything besides weights that determines the KV of a compressor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Attention = Literal["causal", "anchors", "full"]
Anchors = Literal["uniform", "random", "surprisal", "attention", "learned"]
Budget = Literal["shared", "layers", "uniform"]
AnchorEmbedding = Literal["shared", "slot", "none"]
Positions = Literal["appended", "uniform"]
StoredDtype = Literal["float32", "float16", "bfloat16", "int8"]

# Fields that earlier versions, which refuse fields they do not know, do not have.
_LATER = frozenset({"positions"})


@dataclass(frozen=True)
class CompressorConfig:
    """Everything besides the weights that determines the KV of a compressor.

    Raises:
        ValueError: for a value out of range, naming the field, what was got and what is expected.
    """

    method: str = "sac"  # which compression method: a name in `checkpoint.METHODS`
    ratio: int = 5  # source tokens per anchor
    # Which tokens are anchors: every n-th ("uniform"); any, a control ("random"); the least
    # predictable ("surprisal"); or, for each layer and head separately, those that receive the most
    # attention when the text is read again ("attention"), or those to which a fitted scorer
    # predicts it ("learned").
    anchors: Anchors = "uniform"
    # How many entries each head keeps of a text: the same number for all ("uniform"), the same in
    # a layer ("layers"), or as one ranking over all heads gives ("shared"); the last two need
    # learned anchors.
    budget: Budget = "uniform"
    scorer_width: int = 0  # hidden size of the scorer's network; 0 = a linear function only
    segment_tokens: int = 510  # longest text encoded in one forward pass, in tokens
    sink: str = ""  # opening of every prompt, read before each segment and dropped ("" = none)
    # Text before each chunk that is compressed with it; may contain special tokens.
    heading: str = ""
    attention: Attention = "full"  # which tokens attend to later ones: none, anchors, or all
    # What is added to an anchor's input: one learned vector, one per slot, or nothing.
    anchor_embedding: AnchorEmbedding = "shared"
    # Where memory slots of icae and x500 stand: behind the text, or spread over it (EPL).
    positions: Positions = "appended"
    first_position: int = 0  # RoPE index of a prompt's first token; attention sees differences only
    cue: bool = True  # whether a learned [LM] embedding follows each chunk in the prompt
    lora_rank: int = 128
    lora_alpha: int = 256  # LoRA is scaled by lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")  # modules that get LoRA; () = none
    # Rank of a second LoRA, on while prompts with these anchors are read and answered: the
    # generator is then no longer the frozen LM. 0 = none
    generator_adapter_rank: int = 0
    stored_dtype: StoredDtype = "bfloat16"  # of stored keys and values; "int8": see kv.quantize

    def __post_init__(self) -> None:
        if isinstance(self.lora_targets, str):
            raise ValueError(
                f"lora_targets must be several module names, was one str: {self.lora_targets!r}"
            )
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        if not isinstance(self.cue, bool):
            raise ValueError(f"cue must be true or false, was: {self.cue!r}")
        for name, least in (
            ("ratio", 1),
            ("segment_tokens", 1),
            ("scorer_width", 0),
            ("first_position", 0),
            ("generator_adapter_rank", 0),
            ("lora_rank", 1),
            ("lora_alpha", 1),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, was: {value!r}")
        for name, choices in (
            ("attention", get_args(Attention)),
            ("anchors", get_args(Anchors)),
            ("budget", get_args(Budget)),
            ("anchor_embedding", get_args(AnchorEmbedding)),
            ("positions", get_args(Positions)),
            ("stored_dtype", get_args(StoredDtype)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, was: {getattr(self, name)!r}"
                )
        if self.generator_adapter_rank and not self.lora_targets:
            raise ValueError(
                "lora_targets must name the modules of the generator adapter too, was: none, with "
                f"generator_adapter_rank={self.generator_adapter_rank}"
            )
        for name in ("sink", "heading"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a str, was: {getattr(self, name)!r}")
        if self.budget != "uniform" and self.anchors != "learned":
            raise ValueError(
                f"budget={self.budget!r} is fitted together with a scorer: it needs "
                f"anchors='learned', was: {self.anchors!r}"
            )
        if self.anchors in ("attention", "learned") and (
            self.anchor_embedding != "none" or self.attention == "anchors"
        ):
            raise ValueError(
                f"anchors={self.anchors!r} are chosen for each head apart, after reading: they "
                "need anchor_embedding='none' and attention='causal' or 'full', were: "
                f"{self.anchor_embedding!r} and {self.attention!r}"
            )

    @property
    def is_nested(self) -> bool:
        """Whether the entries kept at a ratio contain those kept at every higher ratio.

        They do where the encoder's inputs do not depend on the ratio, and entries are ranked.
        """
        return self.anchors == "learned"

    def fingerprint_fields(self) -> dict[str, str]:
        """The fields that are not at their default, by name: the part of a fingerprint.

        A field that a later version adds therefore changes no fingerprint until it is used; a
        default must never change. Where ratios are nested, one entry serves all of them, and the
        ratio is left out.
        """
        values = self.to_dict()
        return {
            f"config.{f.name}": repr(values[f.name])
            for f in fields(self)
            if getattr(self, f.name) != f.default and not (f.name == "ratio" and self.is_nested)
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without those of `_LATER` that are at their default."""
        values = {**asdict(self), "lora_targets": list(self.lora_targets)}
        defaults = {f.name: f.default for f in fields(self)}
        return {n: v for n, v in values.items() if n not in _LATER or v != defaults[n]}

    def to_json(self) -> str:
        """The fields as JSON, one per line."""
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
                "it was written by a newer sac_rag: upgrade, or train it again"
            )
        return cls(**values)
