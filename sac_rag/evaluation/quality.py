"""Quality of answers, from anchors and from text.

Four systems answer the same questions, with the same model, prompt format and greedy decoding:

compressed   from the chunks' anchors
full-text    from the chunks' text, read in one piece
truncated    from the first tokens of each chunk, as many as it would have anchors
closed-book  from the question alone

A compressor's heading, if it has one, is read in front of each chunk by all but the last. Any other
system (see `peers`) is measured alike, as an Answering.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from sac_rag.cached import CachedCompressor, OnMiss
from sac_rag.chunk import Chunk
from sac_rag.compressors.anchor_selection import num_anchors, segment_bounds
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import Budget
from sac_rag.evaluation.answer_log import Answers
from sac_rag.evaluation.sample import Sample, Trial
from sac_rag.evaluation.scores import (
    contains,
    exact_match,
    f1,
    interval,
    raw_exact_match,
    rouge1,
)
from sac_rag.lm.digests import digest_json
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.generate import Decoding
from sac_rag.reports import Answer

System = Literal["compressed", "full-text", "truncated", "closed-book"]
AnswerTrials: TypeAlias = Callable[[Sequence[Trial], Decoding], Sequence[Answer]]

# Padded source tokens of a batch: text takes memory for each pair of them.
_BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class QualityResult:
    """Scores of one system. EM, F1 and contains are means, from 0 to 1.

    Attributes:
        system: The system that answers, a System or the name of a peer.
        ratio: Source tokens per anchor, or per token read; None where no text is read.
        budget: How entries are distributed over heads; None where no anchors are read.
        k: Chunks per question.
        n: Number of questions.
        em: Share of answers that equal a gold one, normalised.
        f1: F1 of words against the most similar gold one.
        contains: Share of answers that contain a gold one, as whole words.
        f1_interval: Bootstrap 95 % interval of f1.
        seed: Of the sample.
        dtype: Dtype that the model computes in.
        prompt: Digest of the prompt format; systems are comparable where it is the same.
        fingerprint: The compressor's or the peer's; None where plain text is read.
        generator_adapter: Rank of the generator's LoRA with the compressor; 0 for the frozen LM.
        seconds: Time of the answers, reading and compressing included.
        ended: Share of answers that ended before max_new_tokens; None where that is not recorded.
        rouge1, raw_em: Scores of the paper, see `scores`; None where they were not computed.
        positions: Mean number of KV entries that each head attends to, the prompt's own included;
            None where that is not recorded, as the next one.
        first_token_s: Mean time until the first token of a batch, in seconds.
        weights: What matrices were packed as for single tokens; None for exact ones.
        recall: Share of questions of which a gold passage was retrieved; None where the gold
            passages are given.
        provenance: Labels of the answers: see `provenance.provenance`. None where there are none.
    """

    system: str
    ratio: int | None
    budget: Budget | None
    k: int
    n: int
    em: float
    f1: float
    contains: float
    f1_interval: tuple[float, float]
    seed: int
    dtype: str
    prompt: str
    fingerprint: str | None
    generator_adapter: int
    seconds: float
    ended: float | None = None
    rouge1: float | None = None
    raw_em: float | None = None
    positions: float | None = None
    first_token_s: float | None = None
    weights: str | None = None
    recall: float | None = None
    provenance: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Answering:
    """A system under measurement, and what its answers depend on besides model and questions.

    Attributes:
        system: Its name: a System, or that of a peer.
        ratio: Source tokens per KV entry, or per token read; None where no text is read.
        answer: Answers trials, in order, all in one batch.
        budget: How entries are distributed over heads; None where that has no meaning.
        fingerprint: Digest of everything that determines what it makes of a text; None where that
            is read as it is.
        generator_adapter: Rank of the generator's LoRA; 0 for the frozen LM.
    """

    system: str
    ratio: int | None
    answer: AnswerTrials
    budget: Budget | None = None
    fingerprint: str | None = None
    generator_adapter: int = 0


def evaluate(
    rag: SacRAG,
    sample: Sample,
    *,
    system: System = "compressed",
    ratio: int | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    out: str | os.PathLike[str] | None = None,
    labels: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> QualityResult:
    """Answers all questions of a sample with one system, and scores the answers.

    Args:
        rag: Model, prompt format and compressor; where text is read, only the compressor's config
            matters.
        sample: The questions.
        system: The system that answers.
        ratio: Of "truncated", source tokens per token that is read. Default: the compressor's.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Questions answered together; answers depend on it by rounding alone.
        out: A JSON Lines file. Its first line holds the settings, each other line a question, its
            answer and the scores. If it exists with the same settings, its questions are not
            answered again.
        labels: Noted in the first line of `out` for its readers, and in the result; of an `out`
            that exists, those that it was begun with.
        on_progress: Called with the number of questions answered since the last call; first, if
            there are any, with that of the answers in `out`.

    Raises:
        ValueError: for an unknown system, a ratio that the system cannot have, or an `out` of other
            settings.
        ChunkMissError: if a chunk is not in the store, and no compressor is here to compress it.
        PromptTooLongError: if a question with its chunks does not fit the model; the longest
            are asked first.
        OSError: if `out` cannot be written.
    """
    if system not in get_args(System):
        raise ValueError(f"system must be one of {', '.join(get_args(System))}, was: {system!r}")
    compressor = rag.compressor.inner
    ratio = _ratio(system, ratio, compressor.config.ratio)
    trials = as_read(sample.trials, system, compressor, ratio)
    reader = _compressed_reader(rag) if system == "compressed" else text_reader(rag)
    is_compressed = system == "compressed"
    return evaluate_answering(
        Answering(
            system=system,
            ratio=ratio,
            answer=answered_by(reader),
            budget=rag.compressor.config.budget if is_compressed else None,
            fingerprint=rag.compressor.fingerprint if is_compressed else None,
            generator_adapter=reader.compressor.config.generator_adapter_rank,
        ),
        rag,
        replace(sample, trials=tuple(trials)),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        out=out,
        labels=labels,
        on_progress=on_progress,
    )


def evaluate_answering(
    answering: Answering,
    rag: SacRAG,
    sample: Sample,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    out: str | os.PathLike[str] | None = None,
    labels: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> QualityResult:
    """Answers all questions of a sample with any system, and scores the answers.

    Args:
        answering: The system.
        rag: Model and prompt format that the system uses.
        sample: The questions, with the chunks that the system is asked about.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Questions answered together.
        out: A JSON Lines file; see `evaluate`.
        labels: Noted in the first line of `out`.
        on_progress: Called with the number of questions answered since the last call.

    Raises:
        ValueError: for an `out` of other settings, or a batch size below 1; and whatever the system
            raises.
        OSError: if `out` cannot be written.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, was: {batch_size}")
    trials, generator = sample.trials, rag.generator
    position_bytes = 2 * math.prod(generator.kv_shape) * generator.dtype.itemsize
    decoding = replace(rag.decoding, temperature=0.0, seed=None, max_new_tokens=max_new_tokens)
    settings = _settings(rag, sample, answering, decoding)
    answers = Answers(Path(out) if out is not None else None, settings, labels or {})
    if answers.by_number and on_progress is not None:
        on_progress(len(answers.by_number))
    for batch in _batches(trials, generator, batch_size):
        # Batches do not depend on earlier answers, so neither do the answers: a batch that was left
        # half finished is answered again as a whole.
        new = _answer(answering.answer, batch, answers, decoding, position_bytes)
        if new and on_progress is not None:
            on_progress(new)
    rows = [answers.by_number[trial.number] for trial in trials]
    scores = [row["f1"] for row in rows]
    return QualityResult(
        system=answering.system,
        ratio=answering.ratio,
        budget=answering.budget,
        k=sample.k,
        n=len(rows),
        em=_mean([row["em"] for row in rows]),
        f1=_mean(scores),
        contains=_mean([row["contains"] for row in rows]),
        f1_interval=interval(scores),
        seed=sample.seed,
        dtype=settings["dtype"],
        prompt=digest_json(settings["prompt"]),
        fingerprint=answering.fingerprint,
        generator_adapter=answering.generator_adapter,
        seconds=sum(row["seconds"] for row in rows),
        ended=_mean_of(rows, "ended"),
        rouge1=_mean([rouge1(row["prediction"], row["golds"]) for row in rows]),
        raw_em=_mean([raw_exact_match(row["prediction"], row["golds"]) for row in rows]),
        positions=_mean_of(rows, "positions"),
        first_token_s=_mean_of(rows, "first_token_s"),
        weights=generator.weights,
        recall=sample.recall,
        provenance=answers.labels or None,
    )


def _answer(
    answer: AnswerTrials,
    batch: list[Trial],
    answers: Answers,
    decoding: Decoding,
    position_bytes: int,
) -> int:
    """Answers a batch, unless all of it is answered; returns the number of new answers."""
    if all(trial.number in answers.by_number for trial in batch):
        return 0
    started = time.perf_counter()
    written = answer(batch, decoding)
    seconds = (time.perf_counter() - started) / len(batch)
    new = [
        _scored(trial, one, seconds, position_bytes)
        for trial, one in zip(batch, written, strict=True)
        if trial.number not in answers.by_number
    ]
    answers.add(new)
    return len(new)


def answered_by(reader: SacRAG) -> AnswerTrials:
    """Answers of a pipeline to trials, as one batch."""
    return lambda trials, decoding: reader.batch(
        [(trial.question.text, trial.chunks) for trial in trials], decoding
    )


def _compressed_reader(rag: SacRAG) -> SacRAG:
    """The pipeline that answers from anchors."""
    # A chunk that is missing must not be scored as if it were compressed.
    on_miss: OnMiss = "compress" if rag.compressor.computes else "raise"
    return SacRAG(rag.compressor, prompt_format=rag.prompt_format, on_miss=on_miss)


def text_reader(rag: SacRAG) -> SacRAG:
    """The pipeline that answers from the chunks' text, with the frozen LM."""
    # With an empty store and misses read as text, the pipeline is a plain reader.
    plain = CachedCompressor(rag.compressor.inner.without_generator_adapter(), {})
    return SacRAG(plain, prompt_format=rag.prompt_format, on_miss="text")


def _settings(
    rag: SacRAG, sample: Sample, answering: Answering, decoding: Decoding
) -> dict[str, Any]:
    """Everything that determines the answers, for the first line of their file."""
    return {
        "system": answering.system,
        "ratio": answering.ratio,
        "budget": answering.budget,
        "k": sample.k,
        "seed": sample.seed,
        "n": len(sample.trials),
        "questions": digest_json([asdict(trial) for trial in sample.trials]),
        "prompt": json.loads(rag.prompt_format.to_json()),
        "heading": rag.compressor.config.heading or None,
        "max_new_tokens": decoding.max_new_tokens,
        "stop": list(rag.prompt_format.stop if decoding.stop is None else decoding.stop),
        "dtype": rag.generator.dtype_name,
        "weights": rag.generator.weights,
        "model": digest_json(rag.generator.identity),
        "fingerprint": answering.fingerprint,
    }


def _ratio(system: System, wanted: int | None, of_compressor: int) -> int | None:
    if system == "truncated":
        if wanted is not None and wanted < 1:
            raise ValueError(f"ratio must be at least 1, was: {wanted}")
        return wanted or of_compressor
    fixed = {"compressed": of_compressor, "full-text": 1, "closed-book": None}[system]
    if wanted not in (None, fixed):
        raise ValueError(f"the ratio of {system!r} is {fixed} here, was asked for: {wanted}")
    return fixed


def as_read(
    trials: Sequence[Trial], system: System, compressor: Compressor, ratio: int | None
) -> list[Trial]:
    """Trials with the chunks that a system reads.

    Args:
        trials: With whole chunks.
        system: The system that reads.
        compressor: Its heading and segments determine the number of anchors; it computes nothing.
        ratio: Source tokens per token that "truncated" reads; other systems ignore it.
    """
    if system == "closed-book":
        return [replace(trial, chunks=()) for trial in trials]
    if system != "truncated" or ratio is None:
        return list(trials)

    def cut(chunk: Chunk) -> Chunk:
        count = token_budget(chunk, compressor, ratio)
        return replace(chunk, text=beginning(chunk.text, count, compressor.generator))

    return [replace(trial, chunks=tuple(map(cut, trial.chunks))) for trial in trials]


def token_budget(chunk: Chunk, compressor: Compressor, ratio: int) -> int:
    """Tokens, or KV entries per head, that may stand for a chunk: its anchors at a ratio."""
    count = len(compressor.heading_ids) + len(compressor.generator.tokenize(chunk.text))
    bounds = segment_bounds(count, compressor.config.segment_tokens)
    return sum(num_anchors(end - begin, ratio) for begin, end in bounds)


def beginning(text: str, count: int, generator: Generator) -> str:
    """The longest beginning of a text that has at most `count` tokens."""
    ids = generator.tokenize(text)
    if count >= len(ids):
        return text
    for length in range(count, 0, -1):
        start: str = generator.tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)
        # A byte-level tokenizer's sign for a character that was cut in two.
        start = start.rstrip("\N{REPLACEMENT CHARACTER}")
        # The beginning of a word may be other tokens than in the word, and more of them.
        if len(generator.tokenize(start)) <= count:
            return start
    return ""


def _batches(
    trials: Sequence[Trial], generator: Generator, batch_size: int
) -> Iterator[list[Trial]]:
    """Trials of similar length together, those of equal chunks side by side.

    The longest come first, so that one that does not fit the model or the memory fails at once.
    """
    lengths: dict[str, int] = {}
    for chunk in (chunk for trial in trials for chunk in trial.chunks):
        if chunk.text not in lengths:
            lengths[chunk.text] = len(generator.tokenize(chunk.text))

    def tokens(trial: Trial) -> int:
        return sum(lengths[chunk.text] for chunk in trial.chunks)

    batch: list[Trial] = []
    for trial in sorted(
        trials,
        key=lambda trial: (
            -tokens(trial),
            [chunk.text for chunk in trial.chunks],
            -len(trial.question.text),
            trial.number,
        ),
    ):
        full = batch and (len(batch) + 1) * tokens(batch[0]) > _BATCH_TOKENS
        if full or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(trial)
    if batch:
        yield batch


def _scored(trial: Trial, answer: Answer, seconds: float, position_bytes: int) -> dict[str, Any]:
    golds, prediction = trial.question.answers, answer.text.strip()
    return {
        "number": trial.number,
        "id": trial.question.id,
        "question": trial.question.text,
        "golds": list(golds),
        "prediction": prediction,
        "em": exact_match(prediction, golds),
        "f1": f1(prediction, golds),
        "contains": contains(prediction, golds),
        "ended": answer.finish_reason != "length",
        "positions": answer.usage.positions_attended,
        "kv_bytes": answer.usage.positions_attended * position_bytes,
        "first_token_s": answer.timings.time_to_first_token_s,
        "seconds": seconds,
    }


def _mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a value that answers of earlier versions do not have."""
    return _mean([row[name] for row in rows]) if all(name in row for row in rows) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
