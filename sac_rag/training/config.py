"""TrainConfig: everything that determines a training run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
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

_SHARES = (
    "text_share",
    "instruction_share",
    "curriculum",
    "close_distractors",
    "held_out_share",
)

_FROM_1 = (
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

_FROM_0 = (
    "scorer_texts",
    "text_first",
    "warmup_steps",
    "eval_answers",
    "weight_decay",
    "match_weight",
    "max_minutes",
    "save_minutes",
    "workers",
    "batches_per_step",
)

# Settings that do not change what is learned.
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

# The last follows the clock: its learning rate reaches its end after `max_minutes`.
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
    """Everything that determines the result of a training run.

    Raises:
        ValueError: for a value out of range, naming the field, what was got and what is expected.
    """

    # Model and data
    model: str = "smollm2-135m"  # a default model's name, a local folder or a hub id
    device: str = ""  # "cpu", "cuda", …; "" = CUDA if there is one
    dtype: str = ""  # of the frozen LM's computation; "" = the fastest the device has
    data: tuple[str, ...] = ()  # question files: SQuAD JSON, MRQA JSONL, JSONL with ctxs; also .gz
    text: tuple[str, ...] = ()  # prose, a blank line between documents; also .gz
    # Relative frequency of each file of `data`; none = by size
    data_shares: tuple[float, ...] = ()
    instructions: tuple[str, ...] = ()  # files that `sac-rag train-instructions` wrote; also .gz
    validation: tuple[str, ...] = ()  # question files; none = the last articles of `data`
    held_out_share: float = 0.1  # of each data file's articles, its last, kept for validation
    init_from: str = ""  # "shipped", or a folder with initial weights; "" = untrained
    compressor: CompressorConfig = field(default_factory=lambda: CompressorConfig(**_COMPRESSOR))
    prompt_format: PromptFormat = SPANS  # the prompt saved beside the weights
    prompts: tuple[str, ...] = ()  # names (training.prompts) or files, one drawn for each passage
    sink: bool = True  # whether the sink is the format's opening, if the compressor has none

    # Batches and loss
    text_share: float = 0.0  # share of batches that are prose (stage 1 is 1.0, stage 2 is 0.0)
    text_first: int = 0  # number of initial steps of prose only (stage 1)
    repeat: bool = False  # whether prose is also repeated (a reconstruction term)
    instruction_share: float = 0.0  # share of batches that are answers to open instructions
    text_tokens: int = 256  # longest compressed part of prose, and longest continuation, in tokens
    ratios: tuple[int, ...] = (2, 3, 5, 15)  # one of them is drawn for each step
    curriculum: float = 0.0  # share of the run over which the higher ratios join, low to high
    chunks: tuple[int, ...] = (1,)  # numbers of chunks, one of them drawn per example
    close_distractors: float = 0.0  # share of examples among lexically close passages of the data
    distractors_learn: bool = True  # whether distractors get gradients too
    questions_per_context: int = 5  # questions that share one encoding
    longest_chunk: int = 400  # longer passages are left out, in tokens
    match: Match = "none"  # additional target: the compressor's ratio 1, or full text
    match_weight: float = 1.0  # weight of that term; 1 is that of the cross-entropy
    scorer_texts: int = 500  # passages on which the scorer is fitted first; 0 = not fitted

    # Optimization
    steps: int = 1000
    max_minutes: float = 0.0  # ends the run early, at a step; 0 = no limit
    batch_tokens: int = 1200  # most padded tokens in a batch, encoded and decoded together
    batches_per_step: int = 0  # shared out among processes; 0 = one for each process
    learning_rate: float = 5e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of a step's gradient
    workers: int = 0  # processes that make batches ahead, each a stream of its own; 0 = none
    seed: int = 0

    # Logging and validation: may change when a run is resumed
    log_every: int = 10  # steps
    eval_every: int = 200  # steps between validations, which also save a checkpoint
    eval_ratios: tuple[int, ...] = ()  # ratios validated; none = those trained
    eval_examples: int = 24  # validation contexts, with up to questions_per_context each
    eval_answers: int = 40  # validation questions answered in full for F1; 0 = none
    eval_prompts: tuple[str, ...] = ()  # prompts validated; none = `prompt_format`
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
        for name, is_met, expected in (*self._bounds(), *self._dependencies()):
            if not is_met:
                raise ValueError(f"{name} must be {expected}, was: {getattr(self, name)!r}")

    def _bounds(self) -> Iterator[tuple[str, bool, str]]:
        """Name of a field, whether a condition on its value is met, and the condition in words."""
        for name in _SHARES:
            yield name, 0 <= getattr(self, name) <= 1, "from 0 to 1"
        for name in _FROM_1:
            yield name, getattr(self, name) >= 1, "at least 1"
        for name in _FROM_0:
            yield name, getattr(self, name) >= 0, "at least 0"
        for name in ("learning_rate", "clip"):
            yield name, getattr(self, name) > 0, "above 0"
        yield "ratios", all(type(r) is int and r >= 1 for r in self.ratios), "integers from 1"
        yield "ratios", bool(self.ratios), "at least one ratio"
        yield "eval_ratios", all(type(r) is int and r >= 1 for r in self.eval_ratios), "integers"
        yield "chunks", all(type(k) is int and k >= 1 for k in self.chunks), "integers from 1"
        yield "chunks", bool(self.chunks), "at least one number"

    def _dependencies(self) -> Iterator[tuple[str, bool, str]]:
        """The same for conditions on several fields."""
        has_time = self.max_minutes > 0 or self.schedule != "cosine_over_minutes"
        yield "schedule", has_time, "another one without max_minutes"
        shares = self.instruction_share + self.text_share
        yield "instruction_share", shares <= 1, "with text_share 1 at most"
        has_instructions = bool(self.instructions) or self.instruction_share == 0
        yield "instructions", has_instructions, "files of instructions, or instruction_share 0"
        fits_files = len(self.data_shares) in (0, len(self.data))
        is_positive = not self.data_shares or sum(self.data_shares) > 0
        is_drawable = fits_files and is_positive and all(share >= 0 for share in self.data_shares)
        numbers = f"one number for each file of data ({len(self.data)}), above 0 in all"
        yield "data_shares", is_drawable, numbers
        yield "data", bool(self.data) or self.text_share == 1, "question files, or text_share 1"
        yield "text", bool(self.text) or self.text_share == 0, "files of prose, or text_share 0"
        yield "text", bool(self.text) or self.text_first == 0, "files of prose, or text_first 0"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @property
    def formats(self) -> tuple[PromptFormat, ...]:
        """The prompts that answers are learned in.

        Raises:
            ValueError: for a name that is neither a prompt's nor a file's.
        """
        return tuple(map(named_prompt, self.prompts)) or (self.prompt_format,)

    @property
    def eval_formats(self) -> dict[str, PromptFormat]:
        """The prompts validated, by name; "" is `prompt_format`. Raises as `formats` does."""
        return {name: named_prompt(name) for name in self.eval_prompts} or {"": self.prompt_format}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Reads the result of `to_dict`, or a part of it; the rest has its default.

        Raises:
            ValueError: for a field that does not exist, or a value out of range.
        """
        settings = dict(values)
        unknown = sorted(settings.keys() - {f.name for f in fields(cls)})
        compressor = _table(settings, "compressor", CompressorConfig, unknown)
        prompt = _table(settings, "prompt_format", PromptFormat, unknown)
        if unknown:
            raise ValueError(f"unknown settings of a training run: {', '.join(unknown)}")
        settings["compressor"] = CompressorConfig(**{**_COMPRESSOR, **compressor})
        settings["prompt_format"] = replace(SPANS, **prompt)
        return cls(**settings)

    @classmethod
    def complete(cls, values: Mapping[str, Any], overrides: Iterable[str]) -> TrainConfig:
        """Settings of a file with some of them overridden, as on a command line.

        Args:
            values: Result of `read`.
            overrides: "name=value" each, the value as JSON or plain text;
                "compressor.attention=full" for a setting in a table; a single value stands for a
                list of one.

        Raises:
            ValueError: as `from_dict`, or for an override that is not "name=value".
        """
        settings: dict[str, Any] = {
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
                settings.setdefault(table, {})[inner] = value
            else:
                settings[name] = value
        return cls.from_dict(settings)

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """The settings of a .json or .toml file, for `complete` or `from_dict`.

        Raises:
            ValueError: if it is neither, or cannot be parsed.
            FileNotFoundError: if it does not exist.
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


def _table(
    settings: Mapping[str, Any], name: str, kind: type[Any], unknown: list[str]
) -> dict[str, Any]:
    """The settings of one table; names that are not fields of `kind` are added to `unknown`."""
    table = settings.get(name, {})
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} must be a table of settings, was: {table!r:.80}")
    unknown += sorted(f"{name}.{key}" for key in table.keys() - {f.name for f in fields(kind)})
    return dict(table)
