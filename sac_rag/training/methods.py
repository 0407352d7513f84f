"""Methods of the SAC paper trained alike: the same data, steps and seeds.

Each learns from prose first, then from questions. SAC predicts what follows a text; ICAE and
500xCompressor also repeat it, which their papers call autoencoding. The paper's claims to compare
with: SAC has the lowest perplexity, takes 31 % less training time than ICAE and 26 % less than
500xCompressor, and answers better than EPL, 500xCompressor and ICAE, in this order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from sac_rag.benchmarks.timing import time_in_turn
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.checkpoint import load
from sac_rag.evaluation.perplexity import measure_perplexity
from sac_rag.evaluation.provenance import provenance
from sac_rag.lm.generator import Generator
from sac_rag.training.batches import Batch, BatchStream, read_documents, split_examples
from sac_rag.training.config import TrainConfig
from sac_rag.training.objective import Objective
from sac_rag.training.rows import Row, RowMaker
from sac_rag.training.trainer import (
    HISTORY,
    Learner,
    OnEvent,
    new_compressor,
    open_run_folder,
    train,
)
from sac_rag.whole_file import whole_file

RESULTS = "results.json"

_DOCUMENTS = 100  # most documents whose perplexity is measured

_PAPER: dict[str, Any] = {
    "method": "sac",
    "anchors": "uniform",
    "budget": "uniform",
    "anchor_embedding": "shared",
    "attention": "full",
    "scorer_width": 0,
}
_SLOTS = {**_PAPER, "anchor_embedding": "slot", "attention": "causal"}
# Settings of each compressor, and whether prose is also repeated.
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    "SAC": (_PAPER, False),
    "SAC, causal": ({**_PAPER, "attention": "causal"}, False),
    "SAC, anchors not marked": ({**_PAPER, "anchor_embedding": "none"}, False),
    "SAC, text also repeated": (_PAPER, True),
    "SAC, random anchors": ({**_PAPER, "anchors": "random"}, False),
    "SAC, as shipped": ({}, False),
    "ICAE": ({**_SLOTS, "method": "icae"}, True),
    "ICAE with EPL": ({**_SLOTS, "method": "icae", "positions": "uniform"}, True),
    "500xCompressor": ({**_SLOTS, "method": "x500"}, True),
    "500xCompressor with EPL": ({**_SLOTS, "method": "x500", "positions": "uniform"}, True),
}


@dataclass(frozen=True)
class MethodOutcome:
    """Result of one run of a method.

    Attributes:
        method: Name in METHODS.
        seed: Of the run.
        ratio: Source tokens per anchor.
        tokens: Tokens that were read in all steps.
        perplexity: Of held-out continued text, from the anchors of the text before it, after the
            stage of prose.
        loss, accuracy, content, f1: Of the last validation on held-out questions.
        provenance: See `provenance.provenance`; None where it was not recorded.
    """

    method: str
    seed: int
    ratio: int
    tokens: int
    perplexity: float
    loss: float
    accuracy: float
    content: float
    f1: float
    provenance: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class MethodSpeed:
    """Times of a method, measured in turn with the others on the same texts.

    Attributes:
        method: Name in METHODS.
        step_s: Median time of a training step on prose, in seconds, without the optimizer.
        relative: That, relative to SAC's.
        compress_s: Median time of compressing the texts of that step, in seconds.
        slots: Slots that the encoder reads per token of text.
    """

    method: str
    step_s: float
    relative: float
    compress_s: float
    slots: float


def compare_methods(
    base: TrainConfig,
    held_out_text: Sequence[str],
    out: Path,
    *,
    prose_steps: int,
    names: Iterable[str] = (),
    seeds: Iterable[int] = (0, 1),
    layers: int | None = None,
    on_event: OnEvent | None = None,
) -> Iterator[MethodOutcome]:
    """Trains methods one after the other, and measures each.

    Args:
        base: Data, text, one ratio, and everything else that methods share; its steps are those of
            the stage of questions.
        held_out_text: Files of prose for the perplexity, of which the first 100 documents count.
        out: Folder of the runs and results; the same call resumes.
        prose_steps: Steps of the stage of prose.
        names: Some of METHODS. Default: all.
        seeds: Runs of each method.
        layers: Number of the model's first layers to use. Default: all.
        on_event: As for `train`.

    Yields:
        Outcomes, those of an earlier call first.

    Raises:
        ValueError: for an unknown method, several ratios, or as `train` does.
        KeyboardInterrupt: after Ctrl-C.
    """
    chosen = _require_methods(names)
    if len(base.ratios) != 1:
        raise ValueError(f"methods are compared at one ratio, ratios were: {list(base.ratios)}")
    if not base.text:
        raise ValueError("text must be files of prose for the first stage, was: none")
    documents = list(islice(read_documents(held_out_text), _DOCUMENTS))
    open_run_folder(out, base, free=frozenset())
    results = out / RESULTS
    saved = json.loads(results.read_text()) if results.is_file() else []
    outcomes = {(row["method"], row["seed"]): MethodOutcome(**row) for row in saved}
    for seed in seeds:
        for name in chosen:
            if (name, seed) not in outcomes:
                folder = out / f"{len(outcomes):03d}"
                run = _Run(base, name, seed, prose_steps, layers, folder, on_event)
                outcomes[name, seed] = run.outcome(documents)
                with whole_file(results) as draft:
                    rows = [asdict(row) for row in outcomes.values()]
                    draft.write_text(json.dumps(rows, indent=1) + "\n")
            yield outcomes[name, seed]


@dataclass(frozen=True)
class _Run:
    """Both stages of one method with one seed."""

    base: TrainConfig
    name: str
    seed: int
    prose_steps: int
    layers: int | None
    folder: Path
    on_event: OnEvent | None

    def outcome(self, documents: Sequence[str]) -> MethodOutcome:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        config = _configured(self.base, self.name, self.seed)
        first, of_prose = self._train(_prose(config, self.name, self.prose_steps), "prose")
        generator = _generator(self.base, self.layers)
        prefix_ids = RowMaker(generator, self.base.prompt_format).prefix_ids
        measured = measure_perplexity(
            load(first, generator), documents, prefix_ids, half_tokens=self.base.text_tokens
        )
        config = replace(config, init_from=str(first), scorer_texts=0)
        _, of_questions = self._train(config, "questions")
        last = of_questions["validations"][-1]
        return MethodOutcome(
            method=self.name,
            seed=self.seed,
            ratio=self.base.ratios[0],
            tokens=sum(step["tokens"] for step in (*of_prose["steps"], *of_questions["steps"])),
            perplexity=measured.perplexity,
            **{name: last[name] for name in ("loss", "accuracy", "content", "f1")},
            provenance=provenance(self.base.model, (*self.base.data, *self.base.text)),
        )

    def _train(self, config: TrainConfig, stage: str) -> tuple[Path, dict[str, Any]]:
        """The compressor of a stage, and its history."""
        # Each stage loads its own model, since it leaves LoRA in it.
        generator = _generator(self.base, self.layers)
        folder = self.folder / stage
        trained = train(config, folder, generator=generator, on_event=self.on_event)
        history: dict[str, Any] = json.loads((folder / HISTORY).read_text())
        if len(history["steps"]) < config.steps:
            # The trainer returns after Ctrl-C, too.
            raise KeyboardInterrupt
        return trained, history


def time_methods(
    base: TrainConfig,
    *,
    names: Iterable[str] = (),
    layers: int | None = None,
    batches: int = 4,
    repeats: int = 5,
) -> list[MethodSpeed]:
    """Times steps on prose, and compressing, of all methods in turn.

    Args:
        base: As for `compare_methods`.
        names: Some of METHODS. Default: all.
        layers: Number of the model's first layers to use. Default: all.
        batches: Number of the run's first batches.
        repeats: Measurements of each; the median counts.
    """
    generator = _generator(base, layers)
    examples, _ = split_examples(base)
    chosen = _require_methods(names)
    steps: list[Callable[[], None]] = []
    compressions: list[Callable[[], None]] = []
    slots = []
    for name in chosen:
        config = _prose(_configured(base, name, 0), name, base.steps)
        compressor = new_compressor(config, generator)
        maker = RowMaker(generator, config.formats)
        learner = Learner(Objective(compressor, maker.prefix_ids))
        drawn = list(islice(BatchStream(config, maker, examples), batches))
        texts = [source.ids for batch in drawn for row in batch.rows for source in row.sources]
        steps.append(partial(_step_over, learner, drawn))
        compressions.append(partial(_compress, compressor.at_ratio(base.ratios[0]), texts))
        slots.append(_slots_per_token(compressor, drawn[0].rows))
    step_times = time_in_turn(steps, repeats, warm_up=True)
    compress_times = time_in_turn(compressions, repeats, warm_up=True)
    medians = [timed.median / batches for timed in step_times]
    reference = medians[chosen.index("SAC")] if "SAC" in chosen else medians[0]
    return [
        MethodSpeed(name, median, median / reference, timed.median / batches, count)
        for name, median, timed, count in zip(chosen, medians, compress_times, slots, strict=True)
    ]


def to_markdown(outcomes: Sequence[MethodOutcome], speeds: Sequence[MethodSpeed] = ()) -> str:
    """A table with one row per method, seeds side by side, ordered by mean F1."""
    columns = (
        "method",
        "perplexity",
        "F1",
        "accuracy",
        "content",
        "step, relative",
        "compress, ms",
    )
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    by_method: dict[str, list[MethodOutcome]] = {speed.method: [] for speed in speeds}
    for outcome in outcomes:
        by_method.setdefault(outcome.method, []).append(outcome)
    timed = {speed.method: speed for speed in speeds}
    ordered = sorted(by_method.items(), key=lambda item: -_mean_f1(item[1]))
    for name, runs in ordered:
        speed = timed.get(name)
        cells = [name, ", ".join(f"{run.perplexity:.1f}" for run in runs)]
        cells += [
            ", ".join(f"{getattr(run, what):.3f}" for run in runs)
            for what in ("f1", "accuracy", "content")
        ]
        cells += [f"{speed.relative:.2f}", f"{1000 * speed.compress_s:.0f}"] if speed else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_f1(outcomes: Sequence[MethodOutcome]) -> float:
    return fmean(outcome.f1 for outcome in outcomes) if outcomes else 0.0


def _require_methods(names: Iterable[str]) -> list[str]:
    chosen = list(names) or list(METHODS)
    if unknown := sorted(set(chosen) - set(METHODS)):
        raise ValueError(f"methods must be among {', '.join(METHODS)}; unknown: {unknown}")
    return chosen


def _configured(base: TrainConfig, name: str, seed: int) -> TrainConfig:
    settings, _ = METHODS[name]
    compressor = replace(base.compressor, ratio=base.ratios[0], **settings)
    is_scored = compressor.anchors == "learned"
    return replace(
        base, compressor=compressor, seed=seed, scorer_texts=base.scorer_texts if is_scored else 0
    )


def _prose(config: TrainConfig, name: str, steps: int) -> TrainConfig:
    """The stage of prose of a method."""
    _, repeats = METHODS[name]
    return replace(config, text_share=1.0, repeat=repeats, steps=steps, eval_every=steps)


def _generator(base: TrainConfig, layers: int | None) -> Generator:
    changes: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    return Generator.from_pretrained(
        base.model, device=base.device or None, dtype=base.dtype or None, **changes
    )


def _step_over(learner: Learner, batches: Sequence[Batch]) -> None:
    for batch in batches:
        learner(batch).backward()
        learner.zero_grad()


def _compress(compressor: Compressor, texts: Sequence[tuple[int, ...]]) -> None:
    for _ in compressor.compress_each(texts):
        pass


def _slots_per_token(compressor: Compressor, rows: Sequence[Row]) -> float:
    sources = [torch.tensor(source.ids) for row in rows for source in row.sources]
    device = compressor.generator.device
    slots = sum(len(compressor.layout(ids.to(device)).embeds) for ids in sources)
    return slots / sum(map(len, sources))
