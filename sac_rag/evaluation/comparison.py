"""Comparison of all systems on the same questions, and its table."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sac_rag.cached import CachedCompressor
from sac_rag.compressors.base import Compressor
from sac_rag.evaluation.quality import QualityResult, System, evaluate
from sac_rag.evaluation.sample import Sample
from sac_rag.pipeline import SacRAG
from sac_rag.stores.memory import MemoryStore

# All results in one file; the answers of each are in a file beside it.
FIGURES = "figures.json"

KINDS = ("full-text", "truncated", "closed-book", "compressed", "uniform")

_STORE_BYTES = 6 * 2**30
_BUDGETS = {"shared": "", "layers": ", equal heads in a layer", "uniform": ", equal heads"}


def compare(
    rag: SacRAG,
    samples: Sequence[Sample],
    ratios: Sequence[int],
    out: str | os.PathLike[str],
    *,
    kinds: Collection[str] = KINDS,
    cut: int = 5,
    max_new_tokens: int = 32,
    labels: Mapping[str, Any] | None = None,
) -> Iterator[QualityResult]:
    """Measures text, no text, truncated text, and anchors at several ratios, with one prompt.

    Where heads have budgets of their own, every ratio is measured with equal heads too. Answers
    that are in `out` already are not measured again. Without text the number of chunks makes no
    difference, so that is measured once.

    Args:
        rag: Model, prompt format and a compressor that has any ratio.
        samples: Questions, one sample per number of chunks.
        ratios: Source tokens per anchor.
        out: Folder for the answers and for figures.json.
        kinds: Systems to measure: some of KINDS, where "uniform" is anchors with equal heads.
        cut: Source tokens per token of truncated text.
        max_new_tokens: Longest answer, in tokens.
        labels: As for `evaluate`.

    Raises:
        ValueError: for an unknown kind, or as `evaluate` does.
        OSError: as `evaluate` does.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"kinds must be among {', '.join(KINDS)}, unknown: {unknown}")
    folder = Path(out)
    results: list[QualityResult] = []
    # Shared: entries of the lowest ratio, which comes first, serve the higher ones.
    store = MemoryStore(_STORE_BYTES)
    for number, sample in enumerate(samples):
        texts: list[tuple[System, int | None]] = [("full-text", None), ("truncated", cut)]
        if number == 0:
            texts.append(("closed-book", None))
        compressor = rag.compressor.inner
        runs = [(system, ratio, compressor) for system, ratio in texts if system in kinds]
        runs += _compressed(compressor, sorted(ratios), kinds)
        for system, ratio, compressor in runs:
            reader = SacRAG(
                CachedCompressor(compressor, store, guard=False),
                prompt_format=rag.prompt_format,
                decoding=rag.decoding,
            )
            result = evaluate(
                reader,
                sample,
                system=system,
                ratio=ratio,
                max_new_tokens=max_new_tokens,
                labels=labels,
                out=folder / f"{_file(system, ratio, compressor)}-k{sample.k}.jsonl",
            )
            results.append(result)
            figures = json.dumps([asdict(result) for result in results], indent=1)
            (folder / FIGURES).write_text(figures + "\n", encoding="utf-8")
            yield result


def _compressed(
    compressor: Compressor, ratios: Sequence[int], kinds: Collection[str]
) -> Iterator[tuple[System, int | None, Compressor]]:
    if "compressed" in kinds:
        yield from (("compressed", ratio, compressor.at_ratio(ratio)) for ratio in ratios)
    if "uniform" in kinds and compressor.config.budget != "uniform":
        equal = compressor.with_budget("uniform")
        # At ratio 1 all heads keep everything.
        yield from (("compressed", ratio, equal.at_ratio(ratio)) for ratio in ratios if ratio > 1)


def _file(system: System, ratio: int | None, compressor: Compressor) -> str:
    budget = f"-{compressor.config.budget}" if system == "compressed" else ""
    return f"{system}-{ratio or 1}x{budget}"


def to_markdown(results: Sequence[QualityResult]) -> str:
    """A Markdown table; its last column is F1 relative to that of anchors with every token kept.

    Where some results have a generator adapter, a column has its rank; where there are several
    budgets, those that are not shared are named.
    """
    columns = ["the model attends to", "k", "F1 (95 %)", "EM", "gold contained"]
    adapted = any(result.generator_adapter for result in results)
    columns += [*(["generator adapter"] if adapted else []), "F1 of keeping all"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    several = len({r.budget for r in results if r.system == "compressed" and r.ratio != 1}) > 1
    kept_all = {r.k: r.f1 for r in results if r.system == "compressed" and r.ratio == 1}
    for result in results:
        low, high = result.f1_interval
        whole = kept_all.get(result.k)
        share = f"{result.f1 / whole:.0%}" if whole else ""
        cells = [_attended(result, several), str(result.k)]
        cells += [f"{result.f1:.3f} ({low:.3f} to {high:.3f})", f"{result.em:.3f}"]
        cells += [f"{result.contains:.3f}"]
        cells += [*([_rank(result.generator_adapter)] if adapted else []), share]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rank(generator_adapter: int) -> str:
    return f"rank {generator_adapter}" if generator_adapter else "none"


def _attended(result: QualityResult, several: bool) -> str:
    if result.system == "compressed":
        if result.ratio == 1:
            return "anchors, every token"
        budget = _BUDGETS[result.budget or "shared"] if several else ""
        return f"anchors, {result.ratio}x{budget}"
    if result.system == "truncated":
        return f"text cut to 1 in {result.ratio}"
    names = {"full-text": "text", "closed-book": "nothing (closed-book)"}
    return names.get(result.system, f"{result.system}, {result.ratio}x")
