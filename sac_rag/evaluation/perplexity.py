"""Perplexity of continued text: what is read of a text's first half predicts its second half.

The systems are those of `quality`: the first half is read as anchors, as text, as its last tokens
(as many as there would be anchors), or not at all. All of them read behind the beginning of the
prompt format, and predict the same tokens.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch.nn import functional

from sac_rag.compressors.anchor_selection import num_anchors
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import Budget
from sac_rag.compressors.full import read_plain
from sac_rag.evaluation.answer_log import Answers
from sac_rag.evaluation.quality import System
from sac_rag.evaluation.scores import interval
from sac_rag.kv import AnchorKV
from sac_rag.lm.digests import digest_json
from sac_rag.prompts.assemble import Part, assemble

SHORTEST_TEXT = 32  # tokens


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one system.

    Attributes:
        system: How the first halves are read.
        ratio: Source tokens per anchor, or per token read; None where all or nothing is read.
        budget: How entries are distributed over heads; None where no anchors are read.
        n: Number of texts.
        tokens: Tokens predicted of all of them.
        perplexity: Of those, the exponential of their mean cross-entropy.
        perplexity_interval: Bootstrap 95 % interval over texts.
        dtype: Dtype that the model computes in.
        fingerprint: The compressor's; None where plain text is read.
        seconds: Time of all texts, reading and compressing included.
        provenance: See `provenance.provenance`; None where it was not given.
    """

    system: str
    ratio: int | None
    budget: Budget | None
    n: int
    tokens: int
    perplexity: float
    perplexity_interval: tuple[float, float]
    dtype: str
    fingerprint: str | None
    seconds: float
    provenance: Mapping[str, Any] | None = None


def measure_perplexity(
    compressor: Compressor,
    texts: Iterable[str],
    prefix_ids: Sequence[int],
    *,
    system: System = "compressed",
    half_tokens: int = 256,
    out: str | os.PathLike[str] | None = None,
    labels: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity of the second halves of texts.

    Args:
        compressor: Compresses the first halves, at its ratio; with other systems only its ratio and
            generator matter.
        texts: Prose; those of fewer than SHORTEST_TEXT tokens are left out.
        prefix_ids: Token ids that stand before each text, such as a prompt's beginning.
        system: How the first halves are read.
        half_tokens: Most tokens of each half.
        out: A JSON Lines file, one line per text; run again to resume.
        labels: Noted in its first line and in the result.
        on_progress: Called with the number of texts measured since the last call.

    Raises:
        ValueError: for an unknown system, if no text is long enough, or an `out` of other settings.
        OSError: if `out` cannot be written.
    """
    if system not in get_args(System):
        raise ValueError(f"system must be one of {', '.join(get_args(System))}, was: {system!r}")
    generator, is_compressed = compressor.generator, system == "compressed"
    halves = _halves(map(generator.tokenize, texts), half_tokens)
    ratio = compressor.config.ratio if system in ("compressed", "truncated") else None
    settings: dict[str, Any] = {
        "system": system,
        "ratio": ratio,
        "n": len(halves),
        "texts": digest_json([list(half) for pair in halves for half in pair]),
        "prefix": list(prefix_ids),
        "dtype": generator.dtype_name,
        "model": digest_json(generator.identity),
        "fingerprint": compressor.fingerprint if is_compressed else None,
    }
    log = Answers(Path(out) if out is not None else None, settings, labels or {})
    if log.by_number and on_progress is not None:
        on_progress(len(log.by_number))
    prefix = read_plain(generator, prefix_ids) if prefix_ids else None
    for number, (first, second) in enumerate(halves):
        if number in log.by_number:
            continue
        started = time.perf_counter()
        loss = _loss(_read(compressor, system, first), second, compressor, prefix, is_compressed)
        seconds = time.perf_counter() - started
        row = {"number": number, "loss": loss, "tokens": len(second) - 1, "seconds": seconds}
        log.add([row])
        if on_progress is not None:
            on_progress(1)
    rows = [log.by_number[number] for number in range(len(halves))]
    tokens = sum(row["tokens"] for row in rows)
    losses = [row["loss"] * len(rows) / tokens for row in rows]  # their mean is that per token
    low, high = interval(losses)
    return Perplexity(
        system=system,
        ratio=ratio,
        budget=compressor.config.budget if is_compressed else None,
        n=len(rows),
        tokens=tokens,
        perplexity=math.exp(sum(losses) / len(losses)),
        perplexity_interval=(math.exp(low), math.exp(high)),
        dtype=generator.dtype_name,
        fingerprint=settings["fingerprint"],
        seconds=sum(row["seconds"] for row in rows),
        provenance=log.labels or None,
    )


def to_markdown(rows: Sequence[Perplexity]) -> str:
    """A Markdown table of systems on the same texts."""
    columns = ("the model attends to", "perplexity (95 %)", "texts", "tokens predicted")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        low, high = row.perplexity_interval
        name = {
            "compressed": f"anchors, {row.ratio}x",
            "truncated": f"the last tokens, 1 in {row.ratio}",
            "full-text": "text",
        }.get(row.system, "nothing (closed-book)")
        scores = f"{row.perplexity:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {scores} | {row.n} | {row.tokens} |")
    return "\n".join(lines) + "\n"


def _halves(texts: Iterable[Sequence[int]], most: int) -> list[tuple[list[int], list[int]]]:
    """Both halves of each text that is long enough, as token ids."""
    if most < SHORTEST_TEXT // 2:
        raise ValueError(f"half_tokens must be at least {SHORTEST_TEXT // 2}, was: {most}")
    halves = []
    for ids in (list(text[: 2 * most]) for text in texts):
        if len(ids) >= SHORTEST_TEXT:
            half = len(ids) // 2
            halves.append((ids[:half], ids[half:]))
    if not halves:
        raise ValueError(f"expected a text of at least {SHORTEST_TEXT} tokens, there is none")
    return halves


def _read(compressor: Compressor, system: System, first: list[int]) -> Part:
    """What stands for the first half: anchors, or token ids."""
    if system == "compressed":
        (kv,) = compressor.compress_tokens([[*compressor.heading_ids, *first]])
        return kv
    if system == "truncated":
        return first[-num_anchors(len(first), compressor.config.ratio) :]
    return first if system == "full-text" else []


@torch.no_grad()
def _loss(
    read: Part,
    second: list[int],
    compressor: Compressor,
    prefix: AnchorKV | None,
    is_compressed: bool,
) -> float:
    """Cross-entropy of all tokens of the second half but the first, summed, in nats."""
    generator = compressor.generator
    text = second if isinstance(read, AnchorKV) else [*read, *second]
    prompt = assemble(
        [[read, text] if isinstance(read, AnchorKV) else [text]],
        generator,
        prefix=prefix,
        cue=compressor.cue if is_compressed else None,
        adapter=compressor.generator_adapter if is_compressed else None,
        first_position=compressor.config.first_position,
    )
    with generator.running(prompt.adapter) as model:
        hidden = model.base_model(**prompt.inputs()).last_hidden_state[0, -len(second) : -1]
        logits = model.lm_head(hidden).float()
    labels = torch.tensor(second[1:], device=logits.device)
    return float(functional.cross_entropy(logits, labels, reduction="sum"))
