"""What determines a training run. Knows nothing of how it is carried out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sac_rag.compressors.config import CompressorConfig
from sac_rag.prompts.format import SPANS, PromptFormat
from sac_rag.training.objective import Match
from sac_rag.training.prompts import named_prompt

_LISTS = (
    "data",
    "data_shares",
    "text",
    "instructions",
    "validation",
    "prompts",
    "ratios",
    "chunks",
    "eval_ratios",
    "eval_prompts",
)

# Settings that change nothing about what is learned.
WATCHING = frozenset(
    {
        "max_minutes",
        "save_minutes",
        "device",
        "log_every",
        "eval_every",
        "eval_ratios",
        "eval_examples",
        "eval_answers",
        "eval_prompts",
        "keep_checkpoints",
    }
)

# The last follows the clock: its learning rate ends with `max_minutes`, however many steps that is.
Schedule = Literal["cosine", "linear", "constant_with_warmup", "cosine_over_minutes"]

_COMPRESSOR: dict[str, Any] = {
    "anchors": "learned",
    "budget": "shared",
    "scorer_width": 128,
    "anchor_embedding": "none",
    "attention": "causal",
    "lora_rank": 32,
    "lora_alpha": 64,
    "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything about a training run that must be the same for its result to be the same.

    Raises:
        ValueError: for a value out of range, naming the field, what was got and what is expected.
    """

    # What is trained, and on what
    model: str = "smollm2-135m"  # a default model's name, a local folder or a hub id
    device: str = ""  # "cpu", "cuda", …; "" = CUDA if there is one
    dtype: str = ""  # what the frozen LM computes in; "" = the fastest the device has
    data: tuple[str, ...] = ()  # question files: SQuAD JSON, MRQA JSONL, JSONL with ctxs; also .gz
    text: tuple[str, ...] = ()  # prose, a blank line between documents; also .gz
    data_shares: tuple[
        float, ...
    ] = ()  # how often each file of `data` is drawn from; none = by size
    instructions: tuple[str, ...] = ()  # files that `sac-rag train-instructions` wrote; also .gz
    validation: tuple[str, ...] = ()  # question files; none = the last articles of `data`
    held_out_share: float = 0.1  # of each data file's articles, its last, kept for validation
    init_from: str = ""  # "shipped", or a folder whose weights to begin with; "" = untrained
    compressor: CompressorConfig = field(default_factory=lambda: CompressorConfig(**_COMPRESSOR))
    prompt_format: PromptFormat = SPANS  # the prompt saved beside the weights
    prompts: tuple[str, ...] = ()  # names (training.prompts) or files, one drawn for each passage
    sink: bool = True  # whether chunks are read behind the format's opening, if no sink is given

    # What a step learns from
    text_share: float = 0.0  # share of batches that are prose (stage 1 is 1.0, stage 2 is 0.0)
    text_first: int = 0  # steps of prose alone before all others: stage 1, then what comes
    repeat: bool = False  # whether prose is also to be repeated (a reconstruction term)
    instruction_share: float = 0.0  # share of batches that are answers to open instructions
    text_tokens: int = 256  # longest compressed part of prose, and longest continuation, in tokens
    ratios: tuple[int, ...] = (2, 3, 5, 15)  # one of them is drawn for each step
    curriculum: float = 0.0  # share of the run over which the higher ratios join, low to high
    chunks: tuple[int, ...] = (1,)  # numbers of chunks, one drawn for each example
    close_distractors: float = 0.0  # share of examples among lexically close passages of the data
    distractors_learn: bool = True  # whether chunks that do not answer get gradients too
    questions_per_context: int = 5  # questions that share one encoding
    longest_chunk: int = 400  # longer passages are left out, in tokens
    match: Match = "none"  # what is matched besides: the compressor's own ratio 1, or full text
    match_weight: float = 1.0  # of that term beside the cross-entropy
    scorer_texts: int = 500  # passages that the scorer is fitted on at first; 0 = it stays as it is

    # How
    steps: int = 1000
    max_minutes: float = 0.0  # ends the run early, at a step; 0 = no limit
    batch_tokens: int = 1200  # most padded tokens in a step, encoded and decoded together
    learning_rate: float = 5e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of a step's gradient
    workers: int = 0  # processes that make batches ahead, each a stream of its own; 0 = none
    seed: int = 0

    # What is looked at meanwhile: may change when a run goes on
    log_every: int = 10  # steps
    eval_every: int = 200  # steps between validations, which also save a checkpoint
    eval_ratios: tuple[int, ...] = ()  # ratios validated; none = those trained
    eval_examples: int = 24  # validation contexts, with up to questions_per_context each
    eval_answers: int = 40  # validation questions answered in full for F1; 0 = none
    eval_prompts: tuple[str, ...] = ()  # names or files of prompts validated; none = `format`
    save_minutes: float = 0.0  # between checkpoints, besides those of validations; 0 = none
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in _LISTS:
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name} must be a list, was one str: {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name, choices in (("match", get_args(Match)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, was: {getattr(self, name)!r}"
                )
        for name, good, expected in (
            ("ratios", all(type(r) is int and r >= 1 for r in self.ratios), "integers from 1"),
            ("ratios", bool(self.ratios), "at least one ratio"),
            ("eval_ratios", all(type(r) is int and r >= 1 for r in self.eval_ratios), "integers"),
            ("chunks", all(type(k) is int and k >= 1 for k in self.chunks), "integers from 1"),
            ("chunks", bool(self.chunks), "at least one number"),
            *(
                (name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
                for name in (
                    "text_share",
                    "instruction_share",
                    "curriculum",
                    "close_distractors",
                    "held_out_share",
                )
            ),
            (
                "instruction_share",
                self.instruction_share + self.text_share <= 1,
                "with text_share 1 at most",
            ),
            (
                "schedule",
                self.max_minutes > 0 or self.schedule != "cosine_over_minutes",
                "another one without max_minutes",
            ),
            (
                "instructions",
                bool(self.instructions) or self.instruction_share == 0,
                "files of instructions, or instruction_share 0",
            ),
            (
                "data_shares",
                len(self.data_shares) in (0, len(self.data))
                and all(share >= 0 for share in self.data_shares)
                and (not self.data_shares or sum(self.data_shares) > 0),
                f"one number for each file of data ({len(self.data)}), above 0 in all",
            ),
            ("data", bool(self.data) or self.text_share == 1, "question files, or text_share 1"),
            ("text", bool(self.text) or self.text_share == 0, "files of prose, or text_share 0"),
            ("text", bool(self.text) or self.text_first == 0, "files of prose, or text_first 0"),
            *(
                (name, getattr(self, name) >= 1, "at least 1")
                for name in (
                    "steps",
                    "batch_tokens",
                    "questions_per_context",
                    "longest_chunk",
                    "text_tokens",
                    "log_every",
                    "eval_every",
                    "eval_examples",
                    "keep_checkpoints",
                )
            ),
            *(
                (name, getattr(self, name) >= 0, "at least 0")
                for name in (
                    "scorer_texts",
                    "text_first",
                    "warmup_steps",
                    "eval_answers",
                    "weight_decay",
                    "match_weight",
                    "max_minutes",
                    "save_minutes",
                    "workers",
                )
            ),
            *((name, getattr(self, name) > 0, "above 0") for name in ("learning_rate", "clip")),
        ):
            if not good:
                raise ValueError(f"{name} must be {expected}, was: {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @property
    def formats(self) -> tuple[PromptFormat, ...]:
        """The prompts that answers are learned in.

        Raises:
            ValueError: for a name that is no prompt's and no file's.
        """
        return tuple(map(named_prompt, self.prompts)) or (self.prompt_format,)

    @property
    def eval_formats(self) -> dict[str, PromptFormat]:
        """The prompts validated, by name; "" is `format`. Raises as `formats` does."""
        return {name: named_prompt(name) for name in self.eval_prompts} or {"": self.prompt_format}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Reads what `to_dict` gives, or a part of it: what is left out has its default.

        Raises:
            ValueError: for a field that does not exist, or a value out of range.
        """
        given = dict(values)
        unknown = sorted(given.keys() - {f.name for f in fields(cls)})
        compressor = _inside(given, "compressor", CompressorConfig, unknown)
        prompt = _inside(given, "prompt_format", PromptFormat, unknown)
        if unknown:
            raise ValueError(f"unknown settings of a training run: {', '.join(unknown)}")
        given["compressor"] = CompressorConfig(**{**_COMPRESSOR, **compressor})
        given["prompt_format"] = replace(SPANS, **prompt)
        return cls(**given)

    @classmethod
    def complete(cls, values: Mapping[str, Any], overrides: Iterable[str]) -> TrainConfig:
        """Settings of a file with some of them given anew, as on a command line.

        Args:
            values: As `read` gives them.
            overrides: "name=value" each: JSON, or a text as it is; "compressor.attention=full" for
                what is inside a table; one value stands for a list of one.

        Raises:
            ValueError: as `from_dict`, or for what is no "name=value".
        """
        given: dict[str, Any] = {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
        }
        lists = {f.name for f in fields(cls) if isinstance(f.default, tuple)}
        for override in overrides:
            name, equals, text = override.partition("=")
            if not name or not equals:
                raise ValueError(f"a setting must be given as name=value, was: {override!r}")
            try:
                value = json.loads(text)
            except json.JSONDecodeError:
                value = text
            if name in lists and not isinstance(value, list):
                value = [value]
            table, dot, inner = name.rpartition(".")
            if dot:
                given.setdefault(table, {})[inner] = value
            else:
                given[name] = value
        return cls.from_dict(given)

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """The settings in a .json or .toml file, to be completed and given to `from_dict`.

        Raises:
            ValueError: if it is neither, or cannot be parsed.
            FileNotFoundError: if it is not there.
        """
        path = Path(path)
        try:
            if path.suffix == ".toml":
                if sys.version_info >= (3, 11):
                    import tomllib
                else:  # of the extra "train"
                    import tomli as tomllib
                return tomllib.loads(path.read_text(encoding="utf-8"))
            if path.suffix == ".json":
                values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                return values
        except ValueError as error:  # of either parser
            raise ValueError(f"{path} cannot be parsed: {error}") from error
        raise ValueError(f"a training config must be a .toml or .json file, was: {str(path)!r}")


def _inside(
    given: Mapping[str, Any], name: str, kind: type[Any], unknown: list[str]
) -> dict[str, Any]:
    """The settings in one table; what `kind` has no field for is added to `unknown`."""
    inside = given.get(name, {})
    if not isinstance(inside, Mapping):
        raise ValueError(f"{name} must be a table of settings, was: {inside!r:.80}")
    unknown += sorted(f"{name}.{key}" for key in inside.keys() - {f.name for f in fields(kind)})
    return dict(inside)
