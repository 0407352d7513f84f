"""Trains a compressor on HF's Trainer: steps, checkpoints, resuming."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("accelerate") is None:
    raise ImportError("sac_rag.training needs the 'train' extra: pip install 'sac-rag[train]'")

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.sac import SAC
from sac_rag.evaluation.questions import QAExample
from sac_rag.lm.generator import Generator
from sac_rag.training.batches import Batch, BatchStream, rows_for_scorer, split_examples
from sac_rag.training.config import WATCHING, TrainConfig
from sac_rag.training.fit_scorer import fit_scorer
from sac_rag.training.objective import Objective
from sac_rag.training.plots import draw_curves
from sac_rag.training.processes import (
    Step,
    batches_per_process,
    is_main_process,
    own_device,
    share_weights,
)
from sac_rag.training.rows import Row, RowMaker
from sac_rag.training.validation import Validator
from sac_rag.whole_file import whole_file

CONFIG, HISTORY, CURVES, FINAL = "train.json", "history.json", "curves.png", "compressor"

OnEvent = Callable[[dict[str, Any]], None]


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    generator: Generator | None = None,
    on_event: OnEvent | None = None,
) -> Path:
    """Trains a compressor, or resumes an interrupted run.

    Besides checkpoints the folder gets the config of the run (train.json), losses and validations
    (history.json, curves.png), and at the end the compressor, for
    `SacRAG.from_pretrained(compressor=…)`.

    Ctrl-C and SIGTERM end the run after the current step, with a checkpoint; the same call resumes
    from there, with the same result as an uninterrupted run.

    Args:
        config: Config of the run.
        out: Folder of the run.
        generator: The model, if it is loaded already. Default: `config.model`.
        on_event: Called with {"event": "start" | "scorer" | "step" | "validation" | "interrupted",
            …} during the run.

    Returns:
        The folder of the compressor, its weights in float16.

    Raises:
        ValueError: if the folder holds a run of another config, or the data is unfit.
        FileNotFoundError: for a data file that is not there.
        ImportError: without the extra "train".
    """
    out = Path(out)
    tell = on_event if on_event and is_main_process() else (lambda event: None)
    open_run_folder(out, config)
    examples, held_out = split_examples(config)
    if generator is None:
        generator = Generator.from_pretrained(
            config.model, device=config.device or own_device(), dtype=config.dtype or None
        )
    compressor = new_compressor(config, generator)
    maker = RowMaker(generator, config.formats)
    objective = Objective(
        compressor, maker.prefix_ids, match=config.match, match_weight=config.match_weight
    )
    trainer = CompressorTrainer(
        config, objective, validators(config, compressor, held_out), out, tell
    )
    last = trainer.last_checkpoint()
    if last is None and config.scorer_texts:
        _fit(config, objective, rows_for_scorer(config, maker, examples), tell)
        share_weights(trainer.accelerator, compressor, compressor.fitted)
    trainer.train_dataset = BatchStream(config, maker, examples)
    with trainer.stopping_on_signals():
        trainer.train(resume_from_checkpoint=last)
    final = out / FINAL
    if is_main_process():
        trainer.save_compressor(final)
    trainer.accelerator.wait_for_everyone()
    return final


def validators(
    config: TrainConfig, compressor: Compressor, held_out: Sequence[QAExample]
) -> list[Validator]:
    """One validator per validated prompt; none without held-out questions."""
    if not held_out:
        return []
    formats = config.eval_formats
    makers = [RowMaker(compressor.generator, format) for format in formats.values()]
    return [
        Validator(Objective(compressor, maker.prefix_ids), maker, held_out, config, name=name)
        for name, maker in zip(formats, makers, strict=True)
    ]


class CompressorTrainer(Trainer):  # type: ignore[misc]
    """HF's Trainer for a compressor.

    Args:
        config: Config of the run.
        objective: Gives the loss; the weights of its compressor are trained.
        validators: Run at every evaluation, each in its prompt.
        out: Folder of the run.
        tell: Called with events.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        validators: Sequence[Validator],
        out: Path,
        tell: OnEvent,
    ) -> None:
        self.run_config = config
        self.objective = objective
        self.validators = validators
        self.out = out
        self.tell = tell
        self.stop_wanted = threading.Event()
        self.busy_s = 0.0  # seconds of training alone, without validation
        self.history: dict[str, list[dict[str, Any]]] = {"steps": [], "validations": []}
        self._batches: list[tuple[Tensor, Batch]] = []  # with losses, of the step at hand
        self._pending: list[tuple[str, dict[str, Any]]] = []  # not yet reported
        super().__init__(
            model=Learner(objective),
            args=_arguments(config, out, objective, is_validated=bool(validators)),
            data_collator=lambda batches: {"batch": batches[0]},
            # Never read, but required where evaluation is on.
            eval_dataset=[0] if validators else None,
            callbacks=[Watch(self)],
        )
        for printer in ("PrinterCallback", "ProgressCallback"):
            self.callback_handler.callbacks = [
                c for c in self.callback_handler.callbacks if type(c).__name__ != printer
            ]

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The objective's loss of one batch."""
        batch: Batch = inputs["batch"]
        loss: Tensor = model(batch)
        self._batches.append((loss.detach(), batch))
        return loss

    def take_step(self, seconds: float) -> Step:
        """What is known of a step when it has ended; the same in all processes.

        Args:
            seconds: Its duration in this process.
        """
        losses, batches = zip(*self._batches, strict=True)
        self._batches.clear()
        tokens = sum(row.num_encoded + row.num_decoded for b in batches for row in b.rows)
        step = Step(
            loss=torch.stack(losses).mean(),
            ratio=batches[0].ratio,
            tokens=tokens,
            seconds=seconds,
            is_last=self.stop_wanted.is_set(),
        )
        return step.over_all(self.accelerator)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validates at every ratio of the run."""
        if not self.validators:
            return {}
        ratios = self.run_config.eval_ratios or self.run_config.ratios
        measured = [
            validator.measure(ratio)
            for validator in self.validators
            for ratio in sorted(set(ratios))
        ]
        for validation in measured:
            self.note("validations", "validation", validation.to_dict())
        metrics = {f"eval_loss_{v.prompt}_{v.ratio}x": v.loss for v in measured}
        # Without it HF's trainer would evaluate once more.
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def note(self, kind: str, event: str, what: dict[str, Any]) -> None:
        """Adds figures to the history of the run and reports them as an event."""
        entry = {"step": self.state.global_step, **what}
        self.history[kind].append(entry)
        self._pending.append((event, entry))
        is_on_device = isinstance(entry.get("loss"), Tensor)
        if not is_on_device or self.state.global_step % self.args.logging_steps == 0:
            self.flush()

    def flush(self) -> None:
        """Reads losses that are still on the device, and reports their events."""
        for event, entry in self._pending:
            if isinstance(entry.get("loss"), Tensor):
                entry["loss"] = entry["loss"].item()
            self.tell({"event": event, **entry})
        self._pending.clear()

    def save_compressor(self, folder: Path) -> None:
        """Writes the compressor with the stored dtype of the run's config, and the history."""
        self.flush()
        compressor = self.objective.compressor
        checkpoint.save(
            compressor.storing(self.run_config.compressor.stored_dtype),
            folder,
            prompt_format=self.run_config.prompt_format,
            dtype=torch.float16,
        )
        (self.out / HISTORY).write_text(json.dumps(self.history, indent=1) + "\n")
        draw_curves(self.history, self.out / CURVES)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """The schedule of the config; one that follows the clock computes its rate at each step."""
        config = self.run_config
        if not _follows_the_clock(config):
            return super().create_scheduler(num_training_steps, optimizer)

        def rate(step: int) -> float:
            progress = min(1.0, self.busy_s / (60 * config.max_minutes))
            warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
            return warm * max(0.02, 0.5 * (1 + math.cos(math.pi * progress)))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

    def last_checkpoint(self) -> str | None:
        """The newest complete checkpoint, if there is one."""
        folders = Path(self.args.output_dir).glob("checkpoint-*")
        # The state is written last.
        whole = [folder for folder in folders if (folder / "trainer_state.json").is_file()]
        newest = max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)
        return str(newest) if newest else None

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Turns the first Ctrl-C or SIGTERM into an end after the current step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            self.stop_wanted.set()
            for signal_number, handler in before.items():
                signal.signal(signal_number, handler)

        before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.flush()
        folder = Path(output_dir or self.args.output_dir)
        checkpoint.save(
            self.objective.compressor, folder, prompt_format=self.run_config.prompt_format
        )
        (folder / HISTORY).write_text(json.dumps(self.history))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.objective.compressor.load_weights(checkpoint.read(folder)[1])
        self.history = json.loads((folder / HISTORY).read_text())


class Learner(nn.Module):
    """A module whose parameters are the trained weights of the compressor, for HF's Trainer."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self._objective = objective
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "/"): weight.requires_grad_(True)
                for name, weight in objective.compressor.weights.items()
                if name not in objective.compressor.fitted
            }
        )

    def forward(self, batch: Batch) -> Tensor:
        """The loss. Shape: ()."""
        return self._objective.loss(batch.rows, batch.ratio)


class Watch(TrainerCallback):  # type: ignore[misc]
    """Measures time, and ends a run that is asked to stop or has used its minutes."""

    def __init__(self, trainer: CompressorTrainer) -> None:
        self._trainer = trainer
        self._step_began = 0.0
        self._saved_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports the start; takes intervals from the config, not from the resumed checkpoint."""
        state.eval_steps = state.save_steps = args.eval_steps
        state.logging_steps = args.logging_steps
        self._trainer.tell({"event": "start", "step": state.global_step, "steps": state.max_steps})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the clock; saves or ends the run if it is time."""
        step = self._trainer.take_step(time.perf_counter() - self._step_began)
        config, busy_s = self._trainer.run_config, self._trainer.busy_s + step.seconds
        self._trainer.busy_s = busy_s
        out_of_time = config.max_minutes > 0 and busy_s >= 60 * config.max_minutes
        if config.save_minutes > 0 and busy_s - self._saved_s >= 60 * config.save_minutes:
            self._saved_s = busy_s
            control.should_save = True
        self._trainer.note("steps", "step", step.to_dict())
        # Several processes agree on the end once a step; one alone also ends when its report asks.
        is_alone = self._trainer.accelerator.num_processes == 1
        if step.is_last or out_of_time or (is_alone and self._trainer.stop_wanted.is_set()):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = out_of_time and bool(self._trainer.validators)
            self._trainer.tell({"event": "interrupted", "step": state.global_step})


def open_run_folder(out: Path, config: TrainConfig, *, free: Set[str] = WATCHING) -> None:
    """Creates the folder of a run, or checks that it is that of this run.

    Args:
        out: The folder.
        config: Config of the run.
        free: Names of settings that may differ.

    Raises:
        ValueError: if it is the folder of a run with other settings.
    """
    settings = config.to_dict()
    path = out / CONFIG
    if path.is_file():
        # Through a config, so that settings added by a later version have their default.
        recorded = TrainConfig.from_dict(json.loads(path.read_text())).to_dict()
        mismatches = sorted(
            name
            for name in settings.keys() | recorded.keys()
            if settings.get(name) != recorded.get(name) and name not in free
        )
        if mismatches:
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(mismatches)}); "
                "give another folder, or those settings to resume it"
            )
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        draft.write_text(json.dumps(settings, indent=2) + "\n")


def new_compressor(config: TrainConfig, generator: Generator) -> Compressor:
    """The compressor to train, with keys and values in float32.

    Raises:
        ValueError: if it has no weights to train, or those of `init_from` do not fit.
    """
    made = replace(config.compressor, stored_dtype="float32")
    if config.sink and not made.sink:
        made = replace(made, sink=config.prompt_format.opening(generator.tokenizer))
    with torch.random.fork_rng():
        # LoRA and the scorer's network are initialized at random.
        torch.manual_seed(config.seed)
        compressor = checkpoint.make(generator, made)
    if not set(compressor.weights) - compressor.fitted:
        raise ValueError(f"a compressor of method {made.method!r} has nothing to train")
    if config.init_from:
        folder = checkpoint.find(config.init_from, config.model) or config.init_from
        initial, weights, *_ = checkpoint.read(folder)
        weights = widened(weights, compressor, initial.lora_alpha / initial.lora_rank)
        if config.scorer_texts:
            # The scorer is fitted anyway, so that its weights may be missing.
            missing = compressor.fitted - weights.keys()
            weights |= {name: compressor.weights[name] for name in missing}
        compressor.load_weights(weights)
    return compressor


def widened(
    weights: Mapping[str, Tensor], compressor: Compressor, scale: float
) -> dict[str, Tensor]:
    """Weights whose LoRA of a lower rank is extended to the compressor's, with the same effect.

    Those of other shapes, as of another model, stay as they are.

    Args:
        weights: Weights by name.
        compressor: An untrained compressor; its further columns of LoRA's second matrix are zero.
        scale: lora_alpha / lora_rank of the weights.
    """
    rescale = scale * compressor.config.lora_rank / compressor.config.lora_alpha
    extended = dict(weights)
    for name, untrained in compressor.weights.items():
        if "lora_" not in name or name not in weights:
            continue
        is_second = "lora_B" in name
        weight = (weights[name] * (rescale if is_second else 1)).to(untrained)
        # LoRA's first matrix has a row for each rank, its second one a column.
        ranks = 1 if is_second else 0
        further = untrained.detach().transpose(0, ranks)[weight.shape[ranks] :].transpose(0, ranks)
        if further.shape[1 - ranks] == weight.shape[1 - ranks]:
            extended[name] = torch.cat([weight, further], dim=ranks)
    return extended


def _fit(config: TrainConfig, objective: Objective, rows: list[Row], tell: OnEvent) -> None:
    """Fits the scorer, if there is one, to the attention of the rows' targets."""
    compressor = objective.compressor
    if not isinstance(compressor, SAC) or compressor.config.anchors != "learned":
        return
    share = fit_scorer(
        compressor,
        (chunk for row in rows for chunk in objective.attention(row)),
        seed=config.seed,
        on_progress=lambda count: tell({"event": "scorer", "texts": len(rows), "done": count}),
    )
    tell({"event": "scorer", "kept": share})


def _follows_the_clock(config: TrainConfig) -> bool:
    return config.schedule == "cosine_over_minutes"


def _arguments(
    config: TrainConfig, out: Path, objective: Objective, *, is_validated: bool
) -> TrainingArguments:
    on_cuda = objective.compressor.generator.device.type == "cuda"
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=1,  # of batches, which the stream has already made
        gradient_accumulation_steps=batches_per_process(config.batches_per_step),
        learning_rate=config.learning_rate,
        lr_scheduler_type=(
            "constant_with_warmup" if _follows_the_clock(config) else config.schedule
        ),
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=config.clip,
        logging_steps=config.log_every,
        eval_strategy="steps" if is_validated else "no",
        eval_steps=config.eval_every,  # also of saving
        save_strategy="steps",
        save_steps=config.eval_every,
        save_total_limit=config.keep_checkpoints,
        seed=config.seed,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch_fused" if on_cuda else "adamw_torch",
        # LoRA computes in float32, for which most GPUs have much faster matrix units.
        tf32=True if on_cuda and torch.cuda.get_device_capability() >= (8, 0) else None,
        # The filter would wait for the device at each step to read the loss.
        logging_nan_inf_filter=False,
        dataloader_num_workers=config.workers,
        dataloader_prefetch_factor=4 if config.workers else None,
        # Every process reads its own share, since batches are not tensors that could be sent.
        accelerator_config={"dispatch_batches": False},
        use_cpu=not on_cuda,
    )
