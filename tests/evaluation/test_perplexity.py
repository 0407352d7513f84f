"""Perplexity of continued text is the model's own, whatever stands for the beginning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor, passes_of
from torch.nn import functional

from sac_rag.compressors.base import Compressor
from sac_rag.evaluation.perplexity import measure_perplexity, to_markdown
from sac_rag.lm.generator import Generator

ROUNDING = 1e-4
TEXTS = [" ".join(PROSE[i:] + PROSE[:i]) for i in range(3)]
PREFIX = [1, 7, 9]


@pytest.fixture
def compressor(llama: Generator) -> Compressor:
    return make_compressor(llama, "shared")


def expected(generator: Generator, kept: int) -> float:
    """Perplexity of plain reading, with the last tokens of the first half."""
    total, count = 0.0, 0
    for text in TEXTS:
        ids = generator.tokenize(text)[:64]
        start = len(ids) // 2 - kept
        row = torch.tensor([[*PREFIX, *ids[start:]]])
        with generator.running() as model, torch.no_grad():
            logits = model(row).logits[0, -len(ids[32:]) : -1]
        total += float(functional.cross_entropy(logits, torch.tensor(ids[33:]), reduction="sum"))
        count += len(ids[33:])
    return math.exp(total / count)


@pytest.mark.parametrize(
    ("system", "kept"), [("full-text", 32), ("truncated", 11), ("closed-book", 0)]
)
def test_text_is_read_as_the_model_reads_it(compressor: Compressor, system: Any, kept: int) -> None:
    result = measure_perplexity(compressor, TEXTS, PREFIX, system=system, half_tokens=32)
    assert result.perplexity == pytest.approx(expected(compressor.generator, kept), rel=ROUNDING)
    assert (result.n, result.tokens) == (3, 3 * 31)
    low, high = result.perplexity_interval
    assert low <= result.perplexity <= high


def test_every_token_kept_of_one_text_is_the_full_text(llama: Generator) -> None:
    full = make_compressor(llama, "full", sink="")
    anchors = measure_perplexity(full, TEXTS[:1], [], half_tokens=32)
    text = measure_perplexity(full, TEXTS[:1], [], system="full-text", half_tokens=32)
    assert anchors.perplexity == pytest.approx(text.perplexity, rel=ROUNDING)


@pytest.mark.parametrize("method", ["shared", "icae", "x500"])
def test_anchors_are_read_and_their_settings_noted(llama: Generator, method: str) -> None:
    compressor = make_compressor(llama, method)
    anchors = measure_perplexity(compressor, TEXTS, PREFIX, half_tokens=32)
    nothing = measure_perplexity(compressor, TEXTS, PREFIX, system="closed-book", half_tokens=32)
    assert anchors.perplexity != pytest.approx(nothing.perplexity, rel=ROUNDING)
    assert (anchors.ratio, anchors.fingerprint) == (3, compressor.fingerprint)
    assert (nothing.ratio, nothing.fingerprint) == (None, None)
    table = to_markdown([anchors, nothing]).splitlines()
    assert table[2].startswith("| anchors, 3x |")
    assert table[3].startswith("| nothing (closed-book) |")


def test_a_measurement_is_resumed_text_by_text(compressor: Compressor, tmp_path: Path) -> None:
    out, done = tmp_path / "out.jsonl", 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done == 2:
            raise KeyboardInterrupt

    whole = measure_perplexity(compressor, TEXTS, PREFIX, half_tokens=32)
    with pytest.raises(KeyboardInterrupt):
        measure_perplexity(compressor, TEXTS, PREFIX, half_tokens=32, out=out, on_progress=stop)
    assert len(out.read_text().splitlines()) == 3, "settings and two texts"
    resumed = measure_perplexity(compressor, TEXTS, PREFIX, half_tokens=32, out=out)
    assert resumed.perplexity == whole.perplexity
    with passes_of(compressor.generator) as passes:
        again = measure_perplexity(compressor, TEXTS, PREFIX, half_tokens=32, out=out)
    assert passes == [1], "the prefix alone is read"
    assert again == resumed


def test_what_cannot_be_measured_is_refused(compressor: Compressor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="system must be one of compressed"):
        measure_perplexity(compressor, TEXTS, PREFIX, system="open-book")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 32 tokens, there is none"):
        measure_perplexity(compressor, ["A few words."], PREFIX)
    with pytest.raises(ValueError, match="half_tokens must be at least 16, was: 3"):
        measure_perplexity(compressor, TEXTS, PREFIX, half_tokens=3)
    out = tmp_path / "out.jsonl"
    measure_perplexity(compressor, TEXTS, PREFIX, half_tokens=32, out=out)
    with pytest.raises(ValueError, match="begun with other settings"):
        measure_perplexity(compressor, TEXTS, PREFIX, half_tokens=24, out=out)
