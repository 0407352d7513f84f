"""Fits a scorer and budgets to a frozen model: a compressor for any model, in minutes.

Neither weights of the model nor LoRA are trained: a chunk is compressed to the model's own keys and
values of the tokens that questions attend to.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sac_rag.compressors import checkpoint
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.sac import SAC
from sac_rag.evaluation.provenance import provenance
from sac_rag.evaluation.questions import QAExample, read_questions
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import SPANS, PromptFormat
from sac_rag.training.batches import read_documents
from sac_rag.training.fit_figures import FitFigure, OnEvent, measure
from sac_rag.training.fit_scorer import fit_scorer
from sac_rag.training.objective import Objective
from sac_rag.training.rows import SHORTEST_TEXT, Row, RowMaker

# Passages with questions that come with the package; README.md beside them names their licence.
PASSAGES = Path(__file__).parents[1] / "data" / "passages.json.gz"
FIGURES = "figures.json"

_SOURCE = "240 passages of SQuAD v1.0 train (CC BY-SA 4.0)"
# Every tenth passage is held out for figures.
_HELD_OUT = 10
_QUESTIONS = 10  # most questions per passage
_MEASURED = 200  # most questions of validation files, rounded up to a passage
_TEXT_TOKENS = 256  # most tokens of a text that is repeated
# Documents read for each passage of prose, so that passages come from all over a long file.
_DOCUMENTS = 50


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted compressor with its figures.

    Attributes:
        compressor: The compressor, its weights rounded as in the file.
        figures: Figures on held-out passages.
        model: Name of the model it was fitted for.
        data: Names of the data it was fitted on.
        passages: Number of passages fitted on.
        held_out: Number of passages measured on.
        seconds: Time to read the passages and fit.
        bytes_per_token: Bytes kept per source token, at the compressor's ratio.
        provenance: Of the figures, with the seed: see `provenance.provenance`.
        folder: Folder in which it was saved; None if it was not.
    """

    compressor: SAC
    figures: tuple[FitFigure, ...]
    model: str
    data: tuple[str, ...]
    passages: int
    held_out: int
    seconds: float
    bytes_per_token: float
    provenance: Mapping[str, Any]
    folder: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything except the compressor, as JSON values."""
        return {
            "model": self.model,
            "dtype": self.compressor.generator.dtype_name,
            "ratio": self.compressor.config.ratio,
            "data": list(self.data),
            "passages": self.passages,
            "held_out": self.held_out,
            "seconds": round(self.seconds, 1),
            "bytes_per_token": round(self.bytes_per_token, 1),
            "provenance": dict(self.provenance),
            "figures": [asdict(figure) for figure in self.figures],
        }


def fit(
    model: str | os.PathLike[str] | Generator,
    out: str | os.PathLike[str] | None = None,
    *,
    data: Sequence[str | os.PathLike[str]] = (),
    text: Sequence[str | os.PathLike[str]] = (),
    validation: Sequence[str | os.PathLike[str]] = (),
    compressor: str | os.PathLike[str] | None = None,
    keep_scorer: bool = False,
    passages: int = 100,
    ratio: int = 5,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    on_event: OnEvent | None = None,
) -> Fitted:
    """Fits a compressor to an unchanged model: which tokens to keep, and how many in each head.

    Passages alternate between a plain prompt and a chat, if the tokenizer has a chat template; the
    compressor serves other prompts, ratios and numbers of chunks too.

    Args:
        model: A default model's name, a local folder, a hub id, or a loaded generator.
        out: Folder for the compressor and figures.json: a new or empty one, or one that `fit`
            wrote, which is replaced. Default: nothing is written.
        data: Question files, see `read_questions`. Default: passages that come with the package.
        text: Files of prose without questions, a blank line between documents, also .gz; the
            compressor is then fitted to the attention of a text that is repeated.
        validation: Question files for the figures, 200 questions of them. Default: every tenth
            passage is held out for the figures.
        compressor: A trained compressor to fit again, in the prompt it was trained for: "shipped",
            a folder or a hub id. Its LoRA does not change, its scorer is fitted further. Default:
            a new one, without LoRA.
        keep_scorer: Whether only budgets are fitted; needs a compressor.
        passages: Most passages used, taken in turn from several files.
        ratio: Default ratio of the compressor, which serves any other too.
        seed: Equal seeds fit equal compressors on the same machine.
        device: Default: CUDA if there is one, else CPU.
        dtype: What the model computes in. Default: the fastest the device has.
        on_event: Called with {"event": "read" | "measure", "done", "total"} after each passage,
            and with {"event": "fit"} when all passages are read.

    Returns:
        The compressor with figures on held-out passages.

    Raises:
        ValueError: for an unknown model, a number out of range, data without a passage of fitting
            length, or a folder that holds something else.
        TypeError: if `data` or `text` is one path.
        FileNotFoundError: for a file that does not exist.
    """
    tell = on_event or (lambda event: None)
    if type(passages) is not int or passages < 1:
        raise ValueError(f"passages must be an integer of at least 1, was: {passages!r}")
    if keep_scorer and compressor is None:
        raise ValueError("keep_scorer=True needs a compressor whose scorer to keep, was: None")
    config = _config(ratio)
    folder = None if out is None else _free(Path(out).expanduser())
    data_files = _read(data, text)
    validation_set = _questions("validation", validation)
    generator = _generator(model, device, dtype)
    name = generator.model.name_or_path if isinstance(model, Generator) else model
    if compressor is None:
        fitting, prompts = _unfitted(generator, config, seed), _prompts(generator)
    else:
        fitting, prompts = _trained(generator, compressor, name, ratio, keep_scorer)
    makers = {prompt: RowMaker(generator, form) for prompt, form in prompts.items()}
    learned, held_out = _passages(
        data_files, validation_set, makers, passages, config.segment_tokens, seed
    )
    objectives = {prompt: Objective(fitting, maker.prefix_ids) for prompt, maker in makers.items()}
    started = time.perf_counter()
    fit_scorer(fitting, _attention(objectives, learned, tell), seed=seed, budget_only=keep_scorer)
    seconds = time.perf_counter() - started
    saved_dtype = _round(fitting)
    figures, bytes_per_token = measure(fitting, objectives, held_out, tell)
    fitted = Fitted(
        compressor=fitting,
        figures=figures,
        model=os.fspath(name),
        data=tuple(os.fspath(path) for path in data or text) or (_SOURCE,),
        passages=len(learned),
        held_out=len(held_out),
        seconds=seconds,
        bytes_per_token=bytes_per_token,
        provenance={**provenance(name, validation or data or text or [PASSAGES]), "seed": seed},
        folder=folder,
    )
    if folder is not None:
        _save(fitted, folder, saved_dtype, prompts.get("own"))
    return fitted


def _passages(
    data: tuple[list[list[QAExample]], Iterator[str]],
    validation: Sequence[QAExample],
    makers: Mapping[str, RowMaker],
    count: int,
    most_tokens: int,
    seed: int,
) -> tuple[list[dict[str, Row]], list[dict[str, Row]]]:
    """Rows to fit on and rows to measure on, each in every prompt.

    Raises:
        ValueError: if no passage has a fitting length.
    """
    examples, documents = data
    rng = random.Random(f"{seed} fit")
    rows = _asked(examples, makers, rng) if examples else _repeated(documents, makers, rng, count)
    used = list(islice(_short(rows, most_tokens), count))
    if not used:
        lengths = "at most" if examples else f"{SHORTEST_TEXT} to"
        raise ValueError(
            f"no passage has {lengths} {most_tokens} tokens; give other data, or cut it into "
            "shorter passages"
        )
    if validation:
        others = _asked([validation], makers, random.Random(f"{seed} validation"))
        return used, list(_with_questions(_short(others, most_tokens)))
    learned = [row for number, row in enumerate(used) if number % _HELD_OUT] or used
    return learned, used[::_HELD_OUT]


def _config(ratio: int) -> CompressorConfig:
    return CompressorConfig(
        ratio=ratio,
        anchors="learned",
        budget="shared",
        scorer_width=128,
        anchor_embedding="none",
        attention="causal",
        cue=False,
        lora_targets=(),
    )


def _free(folder: Path) -> Path:
    """The folder, if it is free or holds a fitted compressor, which may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    try:
        config, _ = checkpoint.read(folder)
    except ValueError as error:
        raise ValueError(
            f"out must be a new or empty folder, or a fitted compressor's to replace, but {folder} "
            "holds something else; give another folder"
        ) from error
    if config.lora_targets:
        raise ValueError(
            f"out must be a new or empty folder, or a fitted compressor's to replace, but {folder} "
            "holds a trained one; give another folder"
        )
    return folder


def _read(
    data: Sequence[str | os.PathLike[str]], text: Sequence[str | os.PathLike[str]]
) -> tuple[list[list[QAExample]], Iterator[str]]:
    """Questions of each file, or else prose, which is streamed."""
    _require_paths("text", text)
    if data and text:
        raise ValueError("give question files (data) or prose (text), not both")
    if text:
        for path in map(Path, text):
            if not path.is_file():
                raise FileNotFoundError(f"text must be a file that exists, was: '{path}'")
        return [], read_documents([os.fspath(path) for path in text])
    _require_paths("data", data)
    return [_questions("data", [path]) for path in data or (PASSAGES,)], iter(())


def _questions(name: str, paths: Sequence[str | os.PathLike[str]]) -> list[QAExample]:
    _require_paths(name, paths)
    examples = list(read_questions([Path(path) for path in paths])) if paths else []
    if paths and not examples:
        raise ValueError(f"{name} must hold questions with answers: {', '.join(map(str, paths))}")
    return examples


def _require_paths(name: str, paths: Sequence[str | os.PathLike[str]]) -> None:
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"{name} must be several paths, was one: {paths!r}; put it in a list")


def _generator(
    model: str | os.PathLike[str] | Generator,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
) -> Generator:
    if not isinstance(model, Generator):
        return Generator.from_pretrained(model, device=device, dtype=dtype)
    if device is not None or dtype is not None:
        raise ValueError("device and dtype are those of the generator; leave them out")
    return model


def _unfitted(generator: Generator, config: CompressorConfig, seed: int) -> SAC:
    """A compressor whose sink is the opening of the generator's chats."""
    config = replace(
        config,
        sink=PromptFormat().opening(generator.tokenizer),
        stored_dtype="float16" if generator.dtype == torch.float16 else "bfloat16",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the scorer's network is initialized at random
        return SAC(generator, config)


def _trained(
    generator: Generator,
    compressor: str | os.PathLike[str],
    model: str | os.PathLike[str],
    ratio: int,
    keep_scorer: bool,
) -> tuple[SAC, dict[str, PromptFormat]]:
    """A trained compressor to fit again, and the prompt it was trained for."""
    folder = checkpoint.find(compressor, model)
    refusal = f"compressor must have learned anchors to be fitted again, was: {compressor!s}"
    if folder is None:
        raise ValueError(refusal)
    config, weights = checkpoint.read(folder)
    if config.anchors != "learned":
        raise ValueError(refusal)
    if keep_scorer and "scorer" not in weights:
        raise ValueError(f"{folder} has no scorer to keep; fit it too (keep_scorer=False)")
    trained = SAC(generator, replace(config, budget="shared", ratio=ratio))
    # Compressors trained before there were budgets have none.
    unfitted = {name: trained.weights[name] for name in trained.fitted - weights.keys()}
    trained.load_weights({**unfitted, **weights})
    trained_for = checkpoint.load_prompt_format(folder)
    return trained, _prompts(generator) if trained_for is None else {"own": trained_for}


def _prompts(generator: Generator) -> dict[str, PromptFormat]:
    """The prompts of passages, by name."""
    prompts = {"plain": SPANS}
    if getattr(generator.tokenizer, "chat_template", None):
        for chat in (PromptFormat(), PromptFormat(system="")):
            try:
                chat.beginning(generator.tokenizer)
            except ValueError:  # some templates, such as Gemma's, have no system role
                continue
            prompts["chat"] = chat
            break
    return prompts


def _asked(
    files: Sequence[Sequence[QAExample]], makers: Mapping[str, RowMaker], rng: random.Random
) -> Iterator[dict[str, Row]]:
    """Rows whose targets are answers, in each prompt, from each file in turn, at random."""
    shuffled = [rng.sample(examples, len(examples)) for examples in files]
    for example in chain.from_iterable(zip_longest(*shuffled)):
        if example is not None:
            count = min(len(example.questions), _QUESTIONS)
            questions = rng.sample(example.questions, count)
            yield {name: maker.ask(example.gold, questions) for name, maker in makers.items()}


def _with_questions(made: Iterator[dict[str, Row]]) -> Iterator[dict[str, Row]]:
    """The first rows that together have at least as many questions as are measured."""
    count = 0
    while count < _MEASURED and (rows := next(made, None)) is not None:
        count += len(next(iter(rows.values())).targets)
        yield rows


def _repeated(
    documents: Iterator[str], makers: Mapping[str, RowMaker], rng: random.Random, passages: int
) -> Iterator[dict[str, Row]]:
    """Rows whose target is the text repeated, in each prompt, in random order."""
    texts = list(islice(documents, _DOCUMENTS * passages))
    for text in rng.sample(texts, len(texts)):
        made = {
            name: maker.continue_text(text, _TEXT_TOKENS, repeat=True)
            for name, maker in makers.items()
        }
        # The last target is the repetition; the continuation can be predicted without the text.
        rows = {n: replace(row, targets=row.targets[-1:]) for n, row in made.items() if row}
        if rows:
            yield rows


def _short(made: Iterable[dict[str, Row]], most: int) -> Iterator[dict[str, Row]]:
    """The rows whose chunks have at most `most` tokens."""
    for rows in made:
        if all(len(source.ids) <= most for row in rows.values() for source in row.sources):
            yield rows


def _attention(
    objectives: Mapping[str, Objective], passages: Sequence[Mapping[str, Row]], tell: OnEvent
) -> Iterator[tuple[AnchorKV, Tensor]]:
    """Chunks and attention for `fit_scorer`, with prompts in turn."""
    names = list(objectives)
    for number, rows in enumerate(passages):
        name = names[number % len(names)]
        yield from objectives[name].attention(rows[name])
        tell({"event": "read", "done": number + 1, "total": len(passages)})
    tell({"event": "fit"})


def _round(compressor: SAC) -> torch.dtype:
    """Rounds the weights to the dtype of the file, so that figures are of those; returns it."""
    weights = compressor.weights.values()
    if not all(bool(weight.half().isfinite().all()) for weight in weights):
        return torch.float32
    with torch.no_grad():
        for weight in weights:
            weight.copy_(weight.half())
    return torch.float16


def _save(
    fitted: Fitted, folder: Path, dtype: torch.dtype, prompt_format: PromptFormat | None
) -> None:
    """Writes the compressor and its figures; a new folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        made = Path(name) / folder.name
        checkpoint.save(fitted.compressor, made, prompt_format=prompt_format, dtype=dtype)
        (made / FIGURES).write_text(json.dumps(fitted.to_dict(), indent=1) + "\n")
        if folder.is_dir() and any(folder.iterdir()):
            checkpoint.save(fitted.compressor, folder, prompt_format=prompt_format, dtype=dtype)
            (made / FIGURES).replace(folder / FIGURES)
            return
        if folder.is_dir():
            folder.rmdir()
        made.rename(folder)
