"""ICAE and 500xCompressor train with the common trainer, in their two stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import PROSE

from sac_rag.compressors import checkpoint
from sac_rag.compressors.config import CompressorConfig
from sac_rag.lm.generator import Generator
from sac_rag.training.config import TrainConfig
from sac_rag.training.trainer import train


@pytest.mark.slow
@pytest.mark.parametrize("method", ["icae", "x500"])
def test_reconstruction_and_continuation_then_questions(
    make_generator: Callable[..., Generator], config: TrainConfig, tmp_path: Path, method: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join((one, other)) for one in PROSE for other in PROSE))
    compressor = CompressorConfig(
        method=method, ratio=3, attention="causal", anchor_embedding="slot", lora_rank=4
    )
    questions = replace(config, compressor=compressor, ratios=(3,), steps=2, scorer_texts=0)
    prose = replace(questions, text=(str(text),), text_share=1.0, repeat=True, text_tokens=32)
    first = train(prose, tmp_path / "prose", generator=make_generator("llama"))
    second = train(
        replace(questions, init_from=str(first)),
        tmp_path / "questions",
        generator=make_generator("llama"),
    )
    before, after = (checkpoint.read(folder)[1] for folder in (first, second))
    assert not torch.equal(before["memory"], after["memory"])
    assert any(not torch.equal(before[name], after[name]) for name in before if "lora_A" in name)
    loaded = checkpoint.load(second, make_generator("llama"))
    assert loaded.method == method
    assert loaded.compress(PROSE[:1])[0].num_entries
