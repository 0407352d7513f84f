"""Quality of answers in the frameworks' own prompts, from anchors and from text.

A compressor is trained in prompts of its own, and its users have others. Failures there show in
more than F1: answers that do not end, repeat themselves, or are empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Literal, get_args

from sac_rag.cached import CachedCompressor, OnMiss
from sac_rag.evaluation.frameworks import (
    INSTRUCTIONS,
    PROMPTS,
    Ask,
    Framework,
    Reply,
    asker,
    require,
)
from sac_rag.evaluation.sample import Sample, Trial
from sac_rag.evaluation.scores import contains, f1
from sac_rag.pipeline import SacRAG

ReadAs = Literal["text", "anchors"]


@dataclass(frozen=True)
class DropinResult:
    """Scores of one prompt of a framework over one sample. Scores and shares are from 0 to 1.

    Attributes:
        framework: The framework whose chain or engine answers.
        prompt: Its name.
        k: Chunks per question.
        ratio: Source tokens per anchor; None where the text is read.
        read_as: What the model attends to: the chunks' "anchors", or their "text".
        n: Number of answers. Instructions ask once about the same chunks, so they may have fewer.
        f1: Mean F1 of words against the gold answer; None for instructions, which have none.
        contains: Share of answers that contain a gold one, normalised; None for instructions.
        words: Median number of words.
        ended: Share of answers that the model ended before the limit of new tokens.
        empty: Share of answers without text.
        repeated: Mean share of an answer's word bigrams that occurred in it before.
    """

    framework: Framework
    prompt: str
    k: int
    ratio: int | None
    read_as: ReadAs
    n: int
    f1: float | None
    contains: float | None
    words: float
    ended: float
    empty: float
    repeated: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON holds them."""
        return asdict(self)


def select_prompts(
    names: Sequence[str] = (),
    frameworks: Sequence[str] = (),
    *,
    instructions: bool = False,
) -> list[tuple[Framework, str]]:
    """The prompts to measure, each with its framework.

    Args:
        names: Some of PROMPTS or INSTRUCTIONS. Default: all that ask a question.
        frameworks: "langchain", "llama-index" or both. Default: both.
        instructions: Whether to add all open instructions.

    Raises:
        ValueError: for an unknown framework, or a name that none of the frameworks has.
        ImportError: if a framework that is needed is not installed, naming the extra.
    """
    known = get_args(Framework)
    if unknown := sorted(set(frameworks) - set(known)):
        raise ValueError(f"frameworks must be among {', '.join(known)}, unknown: {unknown}")
    chosen: list[Framework] = [name for name in known if name in frameworks or not frameworks]
    asking = dict.fromkeys(name for framework in chosen for name in PROMPTS[framework])
    if unknown := sorted(set(names) - {*asking, *INSTRUCTIONS}):
        raise ValueError(
            f"prompts of {' and '.join(chosen)} must be among "
            f"{', '.join((*asking, *INSTRUCTIONS))}, unknown: {unknown}"
        )
    wanted = {*(names or asking), *(INSTRUCTIONS if instructions else ())}
    pairs = [
        (framework, name)
        for framework in chosen
        for name in (*PROMPTS[framework], *INSTRUCTIONS)
        if name in wanted
    ]
    for framework in dict.fromkeys(framework for framework, _ in pairs):
        require(framework)
    return pairs


def measure(
    rag: SacRAG,
    samples: Sequence[Sample],
    prompts: Sequence[tuple[Framework, str]],
    *,
    ratios: Sequence[int] = (),
    read_as: Sequence[ReadAs] = get_args(ReadAs),
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> Iterator[DropinResult]:
    """Answers every sample in every prompt, greedily; yields each result when it is there.

    Chunks are compressed once, into the pipeline's store, and shared by all prompts. Text is read
    by the frozen LM, through the same chain or engine without the part that marks chunks.

    Args:
        rag: Its compressor, store and format are measured.
        samples: Questions with their chunks, one sample per number of chunks.
        prompts: Pairs that `select_prompts` returns.
        ratios: Source tokens per anchor. Default: the compressor's own.
        read_as: What chunks are attended to as: some of "text" and "anchors".
        max_new_tokens: Longest answer, in tokens.
        batch_size: Questions answered together in LangChain.

    Raises:
        ValueError: if batch_size is below 1, or for a ratio that the compressor does not have.
        ChunkMissError: if a chunk is not in the store, and no compressor is here to compress it.
        PromptTooLongError: if a question with its chunks does not fit the model, from LangChain;
            LlamaIndex's adapter raises UnanswerableError.
        RuntimeError: if a chunk reaches the model in another way than the result states.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, was: {batch_size}")
    wanted = sorted({*ratios} or {rag.compressor.config.ratio})
    # Entries of the lowest ratio, which comes first, serve the higher ones.
    settings: list[tuple[ReadAs, int | None]] = [("text", None)] if "text" in read_as else []
    settings += [("anchors", ratio) for ratio in wanted] if "anchors" in read_as else []
    for attended, ratio in settings:
        reader = _reader(rag, ratio, max_new_tokens)
        for sample in samples:
            for framework, prompt in prompts:
                ask = asker(
                    framework, prompt, reader, compressed=ratio is not None, batch_size=batch_size
                )
                trials = _trials(sample, prompt)
                replies = _replies(ask, trials, batch_size)
                _require_chunks(framework, prompt, attended, trials, replies)
                scores = _scores(trials, replies, has_gold=prompt not in INSTRUCTIONS)
                yield DropinResult(
                    framework, prompt, sample.k, ratio, attended, len(trials), **scores
                )


def _reader(rag: SacRAG, ratio: int | None, max_new_tokens: int) -> SacRAG:
    """The pipeline at a ratio, or with the frozen LM alone and nothing to attend to but text."""
    cached = rag.compressor
    on_miss: OnMiss = "text"
    if ratio is None:
        reading = CachedCompressor(cached.inner.without_generator_adapter(), {}, guard=False)
    else:
        # A chunk that is missing must not be scored as if it were compressed.
        on_miss = "compress" if cached.computes else "raise"
        compressor = cached.at_ratio(ratio)
        reading = CachedCompressor(
            compressor, cached.store, namespace=cached.namespace, guard=False
        )
    decoding = replace(rag.decoding, temperature=0.0, seed=None, max_new_tokens=max_new_tokens)
    return SacRAG(reading, prompt_format=rag.prompt_format, on_miss=on_miss, decoding=decoding)


def _trials(sample: Sample, prompt: str) -> list[Trial]:
    """Trials as a prompt asks them, the longest first, so that one too long fails at once.

    Trials of similar length are neighbours, and so in one padded batch.
    """
    trials: Sequence[Trial] = sample.trials
    if prompt in INSTRUCTIONS:
        about = {tuple(chunk.text for chunk in trial.chunks): trial for trial in trials}
        trials = [
            replace(trial, question=replace(trial.question, text=INSTRUCTIONS[prompt], answers=()))
            for trial in about.values()
        ]
    return sorted(trials, key=lambda trial: -sum(len(chunk.text) for chunk in trial.chunks))


def _replies(ask: Ask, trials: Sequence[Trial], batch_size: int) -> list[Reply]:
    return [
        reply
        for start in range(0, len(trials), batch_size)
        for reply in ask(trials[start : start + batch_size])
    ]


def _require_chunks(
    framework: Framework,
    prompt: str,
    read_as: ReadAs,
    trials: Sequence[Trial],
    replies: Sequence[Reply],
) -> None:
    """Raises RuntimeError for chunks that were read in another way than the result states."""
    for trial, reply in zip(trials, replies, strict=True):
        expected = len(trial.chunks) if read_as == "anchors" else 0
        if reply.attended != expected:
            raise RuntimeError(
                f"{framework}'s prompt {prompt!r} must attend to the anchors of {expected} chunks "
                f"of question {trial.question.id!r}, attended to those of {reply.attended}; with "
                "these settings its adapter loses or splits marked chunks"
            )


def _scores(trials: Sequence[Trial], replies: Sequence[Reply], has_gold: bool) -> dict[str, Any]:
    texts = [reply.text for reply in replies]
    golds = [trial.question.answers for trial in trials]
    pairs = list(zip(texts, golds, strict=True))
    return {
        "f1": fmean(f1(text, gold) for text, gold in pairs) if has_gold else None,
        "contains": fmean(contains(text, gold) for text, gold in pairs) if has_gold else None,
        "words": float(median(len(words(text)) for text in texts)),
        "ended": fmean(reply.ended for reply in replies),
        "empty": fmean(not text.strip() for text in texts),
        "repeated": fmean(map(repeated_bigrams, texts)),
    }


def words(text: str) -> list[str]:
    """The words of a text in lower case, without the punctuation around them."""
    return re.findall(r"\w(?:\S*\w)?", text.lower())


def repeated_bigrams(text: str) -> float:
    """Share of a text's word bigrams that occurred in it before.

    One minus the number of distinct bigrams over the number of all; 0.0 for fewer than two words.
    """
    bigrams = list(pairwise(words(text)))
    return 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0
