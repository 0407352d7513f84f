"""Ablation: design choices trained for equal time and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from sac_rag.evaluation.provenance import provenance
from sac_rag.lm.generator import Generator
from sac_rag.training.config import TrainConfig
from sac_rag.training.trainer import HISTORY, OnEvent, open_run_folder, train
from sac_rag.whole_file import whole_file

RESULTS = "results.json"

# Settings of each choice that differ from the base run. Only learned anchors have budgets; with the
# other choices all heads keep the same number of tokens.
_UNIFORM = {"compressor.anchors": "uniform", "compressor.budget": "uniform"}
_MARKED = {**_UNIFORM, "compressor.anchor_embedding": "shared"}
CHOICES: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "anchors: uniform": {**_MARKED},
    "anchors: uniform, not marked": {**_UNIFORM},
    "anchors: surprisal": {**_MARKED, "compressor.anchors": "surprisal"},
    "anchors: attention when read again": {**_UNIFORM, "compressor.anchors": "attention"},
    "scorer: linear": {"compressor.scorer_width": 0},
    "mask: anchors see all": {**_MARKED, "compressor.attention": "anchors"},
    "mask: all see all": {"compressor.attention": "full"},
    "mask: all see all, uniform": {**_MARKED, "compressor.attention": "full"},
    "no sink": {"sink": False},
    "anchor embedding: one a slot": {**_MARKED, "compressor.anchor_embedding": "slot"},
    "no cue": {"compressor.cue": False},
    "LoRA on q, v": {"compressor.lora_targets": ["q_proj", "v_proj"]},
    "LoRA rank 8": {"compressor.lora_rank": 8, "compressor.lora_alpha": 16},
    "LoRA rank 128": {"compressor.lora_rank": 128, "compressor.lora_alpha": 256},
    "LoRA on all projections, rank 16": {
        "compressor.lora_rank": 16,
        "compressor.lora_alpha": 32,
        "compressor.lora_targets": [
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ],
    },
    # The generator is then no longer the frozen LM.
    "generator adapter, rank 16": {"compressor.generator_adapter_rank": 16},
    "match hidden states": {"match": "hidden"},
    "match logits": {"match": "logits"},
    "prose alone for 9 steps, then questions": {"text_first": 9},
    "half prose": {"text_share": 0.5},
    "half prose, also repeated": {"text_share": 0.5, "repeat": True},
}
_OF_PROSE = {"text_share", "text_first"}


@dataclass(frozen=True)
class Outcome:
    """Result of one run of a choice.

    Attributes:
        choice: Name in CHOICES.
        seed: Seed of the run.
        steps: Number of steps in the time.
        tokens: Number of tokens read in them.
        ratio, loss, accuracy, first_accuracy, content: Of the last validation.
        provenance: See `provenance.provenance`; None where it was not recorded.
    """

    choice: str
    seed: int
    steps: int
    tokens: int
    ratio: int
    loss: float
    accuracy: float
    first_accuracy: float
    content: float
    provenance: Mapping[str, Any] | None = None


def compare(
    base: TrainConfig,
    out: Path,
    *,
    names: Iterable[str] = (),
    seeds: Iterable[int] = (0, 1),
    on_event: OnEvent | None = None,
) -> Iterator[Outcome]:
    """Trains every choice for the same time and validates it.

    Finished runs (results.json in `out`) are not repeated; a run that was interrupted starts again,
    since its time must not be split.

    Args:
        base: Shared settings; its `max_minutes` is the time of each run.
        out: Folder of results and runs.
        names: Names in CHOICES. Default: all for which `base` has data.
        seeds: Seeds of the runs; all choices run with the first before any runs with the second.
        on_event: As for `train`.

    Raises:
        ValueError: for an unknown choice, without a time, or if `out` holds runs that shared other
            settings.
        KeyboardInterrupt: after Ctrl-C.
    """
    if not base.max_minutes:
        raise ValueError("max_minutes must be the time of each choice, was: 0")
    feasible = (n for n, c in CHOICES.items() if base.text or not c.keys() & _OF_PROSE)
    chosen = list(names) or list(feasible)
    if unknown := sorted(set(chosen) - set(CHOICES)):
        raise ValueError(f"choices must be among {', '.join(CHOICES)}; unknown: {unknown}")
    open_run_folder(out, base, free=frozenset())
    results = out / RESULTS
    rows = json.loads(results.read_text()) if results.is_file() else []
    outcomes = {(row["choice"], row["seed"]): Outcome(**row) for row in rows}
    for seed in seeds:
        for name in chosen:
            if (name, seed) not in outcomes:
                folder = out / f"{len(outcomes):03d}"
                outcomes[name, seed] = _run(base, name, seed, folder, on_event)
                saved = [asdict(row) for row in outcomes.values()]
                with whole_file(results) as draft:
                    draft.write_text(json.dumps(saved, indent=1) + "\n")
            yield outcomes[name, seed]


def to_markdown(outcomes: Sequence[Outcome]) -> str:
    """A table with one row per choice, seeds side by side, ordered by mean loss."""
    columns = ("choice", "steps", "tokens", "loss", "accuracy", "content")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    by_choice: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_choice.setdefault(outcome.choice, []).append(outcome)
    ordered = sorted(by_choice.items(), key=lambda item: fmean(o.loss for o in item[1]))
    for name, runs in ordered:
        cells = [
            name,
            *(", ".join(str(getattr(run, what)) for run in runs) for what in columns[1:3]),
            *(", ".join(f"{getattr(run, what):.3f}" for run in runs) for what in columns[3:]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _run(
    base: TrainConfig, name: str, seed: int, folder: Path, on_event: OnEvent | None
) -> Outcome:
    if folder.exists():
        shutil.rmtree(folder)
    # Each run loads its own model, since LoRA is never removed from a model.
    generator = Generator.from_pretrained(base.model, dtype=base.dtype or None)
    train(_chosen(base, name, seed), folder, generator=generator, on_event=on_event)
    history = json.loads((folder / HISTORY).read_text())
    steps = history["steps"]
    last = history["validations"][-1] if history["validations"] else {"step": 0}
    if last["step"] < len(steps):
        # The trainer returns after Ctrl-C, too; only a run that had its whole time is validated.
        raise KeyboardInterrupt
    return Outcome(
        choice=name,
        seed=seed,
        steps=len(steps),
        tokens=sum(step["tokens"] for step in steps),
        **{k: last[k] for k in ("ratio", "loss", "accuracy", "first_accuracy", "content")},
        provenance=provenance(base.model, (*base.data, *base.text)),
    )


def _chosen(base: TrainConfig, name: str, seed: int) -> TrainConfig:
    values = base.to_dict()
    for setting, value in CHOICES[name].items():
        table, _, inner = setting.rpartition(".")
        (values[table] if table else values)[inner or setting] = value
    return replace(TrainConfig.from_dict(values), seed=seed)
