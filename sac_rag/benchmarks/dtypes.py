"""Costs of storing in fewer bits: bytes, logits, answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sac_rag.answering import tokenize
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors.config import StoredDtype
from sac_rag.evaluation.sample import Sample, Trial
from sac_rag.evaluation.scores import f1, interval
from sac_rag.kv import AnchorKV, as_stored
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.assemble import Part, assemble
from sac_rag.stores.entry import encode

REFERENCE: StoredDtype = "float32"


@dataclass(frozen=True)
class DtypeRow:
    """One stored dtype, compared with float32, which holds the computed values.

    Attributes:
        stored_dtype: Dtype of stored keys and values.
        n: Questions.
        entry_bytes: Mean bytes of a chunk's entry on disk.
        logit_rms: Root mean square error of a logit, at the tokens of the gold answer.
        logit_max: The largest error of any.
        kl: Mean Kullback-Leibler divergence of the next token's probabilities, in nats.
        same_tokens: Share of the gold answer's tokens at which the most likely token is the same.
        same_answers: Share of greedy answers that are equal.
        f1: Mean F1 of the greedy answers.
        f1_change: Its difference from float32's.
        f1_change_interval: Bootstrap 95 % interval of that, over questions.
    """

    stored_dtype: StoredDtype
    n: int
    entry_bytes: float
    logit_rms: float
    logit_max: float
    kl: float
    same_tokens: float
    same_answers: float
    f1: float
    f1_change: float
    f1_change_interval: tuple[float, float]


@dataclass
class _Account:
    """Figures of a dtype so far, one per chunk, per logit row or per trial."""

    nbytes: list[int] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same_token: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def measure(
    rag: SacRAG,
    sample: Sample,
    *,
    dtypes: Sequence[StoredDtype] = ("bfloat16", "float16", "int8"),
    max_new_tokens: int = 32,
    on_progress: Callable[[int], None] | None = None,
) -> list[DtypeRow]:
    """Answers every question from chunks in each dtype, each chunk compressed once.

    Args:
        rag: Model, compressor and prompt format. Where the model computes in bfloat16, float32
            holds bfloat16 values, and storing in bfloat16 changes nothing.
        sample: The questions.
        dtypes: Compared with float32.
        max_new_tokens: Longest answer, in tokens.
        on_progress: Called with the number of questions answered since the last call.

    Returns:
        A row for float32, and one per dtype.

    Raises:
        PromptTooLongError: if a question with its chunks does not fit the model.
    """
    exact = rag.compressor.storing(REFERENCE)
    decoding = replace(rag.decoding, temperature=0.0, seed=None, max_new_tokens=max_new_tokens)
    # The guard would compute again what is slow to load.
    readers = {
        dtype: SacRAG(
            CachedCompressor(exact.storing(dtype), {}, guard=False),
            prompt_format=rag.prompt_format,
            on_miss="raise",
        )
        for dtype in dict.fromkeys((REFERENCE, *dtypes))
    }
    accounts = {dtype: _Account() for dtype in readers}
    for trial in sample.trials:
        texts = list(dict.fromkeys(c.text for c in trial.chunks if not c.is_empty))
        computed = dict(zip(texts, exact.compress(texts), strict=True))
        expected: Tensor | None = None
        for dtype, reader in readers.items():
            cached = reader.compressor
            kvs = {text: as_stored(kv, dtype) for text, kv in computed.items()}
            entries = {cached.key(text): kv for text, kv in kvs.items()}
            cached.store.clear()
            cached.store.update(entries)
            logits = _logits_of_gold(reader, trial, kvs)
            expected = logits if expected is None else expected
            account = accounts[dtype]
            account.nbytes += [len(encode(key, kv)) for key, kv in entries.items()]
            _compare(account, logits, expected)
            answer = reader.answer(trial.question.text, trial.chunks, decoding).text.strip()
            account.answers.append(answer)
            account.scores.append(f1(answer, trial.question.answers))
        if on_progress is not None:
            on_progress(1)
    return [_row(dtype, account, accounts[REFERENCE]) for dtype, account in accounts.items()]


@torch.inference_mode()
def _logits_of_gold(rag: SacRAG, trial: Trial, kvs: dict[str, AnchorKV]) -> Tensor:
    """Logits from which each token of the gold answer is read. Shape: (tokens, vocabulary)."""
    generator, compressor = rag.generator, rag.compressor
    parts: list[Part] = []
    for piece in rag.prompt_format.pieces(
        generator.tokenizer, trial.question.text, list(trial.chunks)
    ):
        if isinstance(piece, Chunk) and not piece.is_empty:
            parts.append(kvs[piece.text])
        else:
            parts.append(tokenize(piece, rag.compressor))
    gold = generator.tokenize(" " + trial.question.answers[0])
    prompt = assemble(
        [[*parts, gold]],
        generator,
        cue=compressor.cue,
        adapter=compressor.generator_adapter,
        first_position=compressor.config.first_position,
    )
    with generator.running(prompt.adapter) as model:
        output: Any = model(
            **prompt.inputs(),
            logits_to_keep=len(gold) + 1,
        )
    logits: Tensor = output.logits[0, :-1].float()
    return logits


def _compare(account: _Account, logits: Tensor, expected: Tensor) -> None:
    error = logits - expected
    exact, actual = expected.log_softmax(-1), logits.log_softmax(-1)
    account.squares += error.square().mean(-1).tolist()
    account.largest.append(float(error.abs().max()))
    account.kl += (exact.exp() * (exact - actual)).sum(-1).tolist()
    account.same_token += (logits.argmax(-1) == expected.argmax(-1)).float().tolist()


def _row(dtype: StoredDtype, account: _Account, reference: _Account) -> DtypeRow:
    same = [a == b for a, b in zip(account.answers, reference.answers, strict=True)]
    changes = [a - b for a, b in zip(account.scores, reference.scores, strict=True)]
    return DtypeRow(
        stored_dtype=dtype,
        n=len(account.answers),
        entry_bytes=_mean(account.nbytes),
        logit_rms=math.sqrt(_mean(account.squares)),
        logit_max=max(account.largest),
        kl=_mean(account.kl),
        same_tokens=_mean(account.same_token),
        same_answers=_mean(same),
        f1=_mean(account.scores),
        f1_change=_mean(changes),
        f1_change_interval=interval(changes),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
