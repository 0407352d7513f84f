"""All systems on one sample, and the table of it. Knows nothing of how an answer is scored."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from sac_rag.cached import CachedCompressor
from sac_rag.evaluation.quality import QualityResult, System, evaluate
from sac_rag.evaluation.sample import Sample
from sac_rag.pipeline import SacRAG
from sac_rag.stores.memory import MemoryStore

# Shown as a whole in a table and in JSON; each answer is in a file of its own beside it.
FIGURES = "figures.json"

_STORE_BYTES = 6 * 2**30


def compare(
    rag: SacRAG,
    samples: Sequence[Sample],
    ratios: Sequence[int],
    out: str | os.PathLike[str],
    *,
    cut: int = 5,
    max_new_tokens: int = 32,
) -> Iterator[QualityResult]:
    """Measures text, no text, text cut short, and anchors at several ratios, with one prompt.

    What is in `out` already is not measured again. Without text the number of chunks makes no
    difference; that is measured once.

    Args:
        rag: Model, prompt format and a compressor that any ratio can be had from.
        samples: Questions, for each number of chunks.
        ratios: Source tokens per anchor.
        out: Folder for the answers and for figures.json.
        cut: Source tokens per token that is left of text cut short.
        max_new_tokens: Longest answer, in tokens.

    Raises:
        ValueError, OSError: as `evaluate` does.
    """
    folder = Path(out)
    results: list[QualityResult] = []
    for number, sample in enumerate(samples):
        runs: list[tuple[System, int | None]] = [("full-text", None), ("truncated", cut)]
        if number == 0:
            runs.append(("no-text", None))
        for system, ratio in runs + [("compressed", ratio) for ratio in ratios]:
            compressor = rag.compressor.compressor
            if system == "compressed" and ratio is not None:
                compressor = compressor.at_ratio(ratio)
            reader = SacRAG(
                CachedCompressor(compressor, MemoryStore(_STORE_BYTES)),
                format=rag.format,
                decoding=rag.decoding,
            )
            result = evaluate(
                reader,
                sample,
                system=system,
                ratio=ratio,
                max_new_tokens=max_new_tokens,
                out=folder / f"{system}-{ratio or 1}x-k{sample.k}.jsonl",
            )
            results.append(result)
            figures = json.dumps([asdict(result) for result in results], indent=1)
            (folder / FIGURES).write_text(figures + "\n", encoding="utf-8")
            yield result


def to_markdown(results: Sequence[QualityResult]) -> str:
    """A table; its last column sets F1 against that of anchors with every token kept.

    Where some were answered with a generator adapter, a column tells its rank.
    """
    columns = ["the model attends to", "k", "F1 (95 %)", "EM", "gold contained"]
    adapted = any(result.generator_adapter for result in results)
    columns += [*(["generator adapter"] if adapted else []), "F1 of keeping all"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    kept_all = {r.k: r.f1 for r in results if r.system == "compressed" and r.ratio == 1}
    for result in results:
        low, high = result.f1_interval
        whole = kept_all.get(result.k)
        share = f"{result.f1 / whole:.0%}" if whole else ""
        cells = [_told(result), str(result.k), f"{result.f1:.3f} ({low:.3f} to {high:.3f})"]
        cells += [f"{result.em:.3f}", f"{result.contains:.3f}"]
        cells += [*([_rank(result.generator_adapter)] if adapted else []), share]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rank(generator_adapter: int) -> str:
    return f"rank {generator_adapter}" if generator_adapter else "none"


def _told(result: QualityResult) -> str:
    if result.system == "compressed":
        return "anchors, every token" if result.ratio == 1 else f"anchors, {result.ratio}x"
    if result.system == "truncated":
        return f"text cut to 1 in {result.ratio}"
    return "text" if result.system == "full-text" else "nothing"
