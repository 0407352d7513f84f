"""Sinks are scored in every prompt; behind the text that a prompt begins with, a chunk is text."""

from __future__ import annotations

from pathlib import Path

import pytest

from sac_rag.compressors.full import Full
from sac_rag.evaluation.questions import read_questions
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import PromptFormat
from sac_rag.training.objective import Objective
from sac_rag.training.rows import RowMaker
from sac_rag.training.sinks import compare_sinks, sinks_of


def test_the_text_that_a_prompt_begins_with_is_its_best_sink(
    llama: Generator, questions: Path, tmp_path: Path
) -> None:
    beginning = "Read this.\n"
    format = PromptFormat(
        chat=False, chunk="{chunk}", user=beginning + "{chunks}\nQ: {question}\nA:", stop=("\n",)
    )
    path = tmp_path / "prompt.json"
    path.write_text(format.to_json())
    examples = list(read_questions([questions]))[:3]
    sinks = {**sinks_of(llama), "own": beginning}
    scores = list(compare_sinks(llama, examples, ["excerpts", str(path)], sinks))
    assert [(s.sink, s.prompt) for s in scores] == [
        (sink, prompt) for sink in sinks for prompt in ("excerpts", str(path))
    ]
    maker = RowMaker(llama, format)
    objective = Objective(Full(llama, Full.default_config()), maker.prefix_ids)
    rows = [row for e in examples for row in maker.rows(e.gold, e.questions)]
    read = [objective.predict([row], 1, read_as="text") for row in rows]
    count = sum(len(one.labels) for one in read)
    as_text = sum(float(one.loss) * len(one.labels) for one in read) / count
    losses = {score.sink: score.loss for score in scores if score.prompt == str(path)}
    assert losses["own"] == pytest.approx(as_text, abs=1e-4)
    assert all(losses[sink] != pytest.approx(as_text, abs=1e-4) for sink in sinks_of(llama))
