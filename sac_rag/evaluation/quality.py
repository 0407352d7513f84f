"""How good answers are, from anchors and from text. Knows nothing of how compressors are trained.

Four systems answer the same questions, with the same model, prompt format and greedy decoding:

compressed   from the chunks' anchors
full-text    from the chunks' text, read in one piece
truncated    from the first tokens of each chunk, as many as it would have anchors
no-text      from nothing but the question

A compressor's heading, if it has one, is read in front of each chunk by all but the last.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sac_rag.cached import CachedCompressor, OnMiss
from sac_rag.chunk import Chunk
from sac_rag.compressors.anchor_selection import num_anchors, segment_bounds
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import Budget
from sac_rag.evaluation.answer_log import Answers
from sac_rag.evaluation.sample import Sample, Trial
from sac_rag.evaluation.scores import contains, exact_match, f1, interval
from sac_rag.lm.digests import digest_json
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.reports import Answer

System = Literal["compressed", "full-text", "truncated", "no-text"]

# Padded source tokens of a batch: what is read as text takes memory for each pair of them.
_BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class QualityResult:
    """One system, measured. EM, F1 and contains are means, from 0 to 1.

    Attributes:
        system: Who answered.
        ratio: Source tokens per anchor, or per token read; None where no text was read.
        budget: How entries were given out to heads; None where no anchors were read.
        k: Chunks of each question.
        n: Questions.
        em: Answers that equal a gold one, normalised.
        f1: Words shared with the likest gold one.
        contains: Answers that contain a gold one, as whole words.
        f1_interval: Bootstrap 95 % interval of f1.
        seed: Of the sample.
        dtype: What the model computes in.
        prompt: Digest of the prompt format; systems are comparable where it is the same.
        fingerprint: The compressor's; None where no anchors were read.
        generator_adapter: Rank of the LoRA that answered with the compressor; 0 for the frozen LM.
        seconds: Time that the answers took, reading and compressing included.
        ended: Answers that ended by themselves, not at max_new_tokens; None where that was not
            noted.
    """

    system: System
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
    """Has one system answer all questions of a sample, and scores the answers.

    Args:
        rag: Model, prompt format and compressor; where text is read, only the compressor's config
            counts.
        sample: What to answer.
        system: Who answers.
        ratio: Of "truncated", source tokens per token that is read. Default: the compressor's.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Questions answered together; answers depend on it by rounding alone.
        out: A JSON Lines file. Its first line holds the settings, each other a question, its
            answer and the scores. Where there is one of the same settings, what it holds is not
            answered again.
        labels: Noted in the first line of `out`, for people: the name of the model, say.
        on_progress: Called with the number of questions done since the last call; at first, if
            there are any, with those found in `out`.

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
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, was: {batch_size}")
    generator, compressor = rag.generator, rag.compressor.compressor
    ratio = _ratio(system, ratio, compressor.config.ratio)
    trials = as_read(sample.trials, system, compressor, ratio)
    if system == "compressed":
        # A chunk that is not there must not be scored as if it had been compressed.
        on_miss: OnMiss = "compress" if compressor.computes else "raise"
        reader = SacRAG(rag.compressor, prompt_format=rag.prompt_format, on_miss=on_miss)
    else:
        # With nothing in the store and misses read as text, the pipeline is a plain reader.
        plain = CachedCompressor(compressor.without_generator_adapter(), {})
        reader = SacRAG(plain, prompt_format=rag.prompt_format, on_miss="text")
    decoding = replace(rag.decoding, temperature=0.0, seed=None, max_new_tokens=max_new_tokens)
    fingerprint = rag.compressor.fingerprint if system == "compressed" else None
    prompt = json.loads(rag.prompt_format.to_json())
    budget = compressor.config.budget if system == "compressed" else None
    settings = {
        "system": system,
        "ratio": ratio,
        "budget": budget,
        "k": sample.k,
        "seed": sample.seed,
        "n": len(trials),
        "questions": digest_json([asdict(trial) for trial in trials]),
        "prompt": prompt,
        "heading": compressor.config.heading or None,
        "max_new_tokens": max_new_tokens,
        "stop": list(rag.prompt_format.stop if decoding.stop is None else decoding.stop),
        "dtype": generator.dtype_name,
        "model": digest_json(generator.identity),
        "fingerprint": fingerprint,
    }
    answers = Answers(Path(out) if out is not None else None, settings, labels or {})
    if answers.found and on_progress is not None:
        on_progress(len(answers.found))
    for batch in _batches(trials, generator, batch_size):
        # Batches do not depend on what was answered before, so neither do the answers: one that was
        # left half done is done again as a whole.
        if all(trial.number in answers.found for trial in batch):
            continue
        started = time.perf_counter()
        written = reader.batch([(trial.question.text, trial.chunks) for trial in batch], decoding)
        seconds = (time.perf_counter() - started) / len(batch)
        new = [
            _scored(trial, answer, seconds)
            for trial, answer in zip(batch, written, strict=True)
            if trial.number not in answers.found
        ]
        answers.add(new)
        if on_progress is not None:
            on_progress(len(new))
    rows = [answers.found[trial.number] for trial in trials]
    scores = [row["f1"] for row in rows]
    return QualityResult(
        system=system,
        ratio=ratio,
        budget=budget,
        k=sample.k,
        n=len(rows),
        em=_mean([row["em"] for row in rows]),
        f1=_mean(scores),
        contains=_mean([row["contains"] for row in rows]),
        f1_interval=interval(scores),
        seed=sample.seed,
        dtype=generator.dtype_name,
        prompt=digest_json(prompt),
        fingerprint=fingerprint,
        generator_adapter=reader.compressor.compressor.config.generator_adapter_rank,
        seconds=sum(row["seconds"] for row in rows),
        ended=_mean([row["ended"] for row in rows]) if "ended" in rows[0] else None,
    )


def _ratio(system: System, wanted: int | None, of_compressor: int) -> int | None:
    if system == "truncated":
        if wanted is not None and wanted < 1:
            raise ValueError(f"ratio must be at least 1, was: {wanted}")
        return wanted or of_compressor
    fixed = {"compressed": of_compressor, "full-text": 1, "no-text": None}[system]
    if wanted not in (None, fixed):
        raise ValueError(f"the ratio of {system!r} is {fixed} here, was asked for: {wanted}")
    return fixed


def as_read(
    trials: Sequence[Trial], system: System, compressor: Compressor, ratio: int | None
) -> list[Trial]:
    """Trials with the chunks that a system gets to read.

    Args:
        trials: With whole chunks.
        system: Who reads.
        compressor: Says what would be compressed, and in what segments; does nothing.
        ratio: Source tokens per token that "truncated" reads; of no matter to others.
    """
    if system == "no-text":
        return [replace(trial, chunks=()) for trial in trials]
    if system != "truncated" or ratio is None:
        return list(trials)

    def cut(chunk: Chunk) -> Chunk:
        ids = compressor.generator.tokenize(chunk.text)
        compressed = len(compressor.heading_ids) + len(ids)
        bounds = segment_bounds(compressed, compressor.config.segment_tokens)
        count = sum(num_anchors(end - begin, ratio) for begin, end in bounds)
        return replace(chunk, text=_beginning(chunk.text, ids, count, compressor.generator))

    return [replace(trial, chunks=tuple(map(cut, trial.chunks))) for trial in trials]


def _beginning(text: str, ids: list[int], count: int, generator: Generator) -> str:
    """The text of the first tokens, as many as there may be."""
    if count >= len(ids):
        return text
    for kept in range(count, 0, -1):
        begun: str = generator.tokenizer.decode(ids[:kept], clean_up_tokenization_spaces=False)
        # What a byte-level tokenizer shows for a character that was cut through.
        begun = begun.rstrip("\N{REPLACEMENT CHARACTER}")
        # The beginning of a word may be other tokens than in the word, and more of them.
        if len(generator.tokenize(begun)) <= count:
            return begun
    return ""


def _batches(
    trials: Sequence[Trial], generator: Generator, batch_size: int
) -> Iterator[list[Trial]]:
    """Trials of like length together, those of equal chunks side by side.

    The longest come first: what does not fit the model or the memory fails at once.
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


def _scored(trial: Trial, answer: Answer, seconds: float) -> dict[str, Any]:
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
        "seconds": seconds,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
