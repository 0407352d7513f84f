"""bench speed measures what it says, in turn; no test here depends on how long anything takes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.models import PROSE, make_compressor

from sac_rag.benchmarks import contestants
from sac_rag.benchmarks.first_token import FORMAT, QUESTION, full
from sac_rag.benchmarks.side_by_side import (
    BEHIND_PREFIX,
    FLOOR,
    LLAMA_COLD,
    LLAMA_RESTORED,
    TEXT,
    Settings,
    SpeedRow,
    break_even,
    measure,
    to_markdown,
    write_files,
)
from sac_rag.benchmarks.timing import Times
from sac_rag.cached import CachedCompressor
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG

TEXTS = PROSE * 20
OTHERS = [FLOOR, TEXT, BEHIND_PREFIX, LLAMA_COLD, LLAMA_RESTORED]


@pytest.fixture(scope="module")
def rows(make_generator: Any, tmp_path_factory: pytest.TempPathFactory) -> list[SpeedRow]:
    llama = make_generator("llama")
    settings = Settings(
        ks=(1, 2), ratios=(1, 5), stores=("memory", "cold"), answer_tokens=(1, 4),
        chunk_tokens=50, repeats=2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAC_RAG_HOME", str(tmp_path_factory.mktemp("home")))
        return list(measure(llama, TEXTS, settings, compressor=make_compressor(llama, "shared")))


def test_every_way_is_measured_over_the_same_chunks(rows: list[SpeedRow]) -> None:
    kept = [("full", 1, "uniform"), ("sac", 5, "shared"), ("sac", 5, "uniform")]
    for k in (1, 2):
        of_k = [row for row in rows if row.k == k and row.answer_tokens == 4]
        ours = [(row.system, row.ratio, row.budget, row.store) for row in of_k if row.ratio]
        assert ours == [(*way, store) for way in kept for store in ("memory", "cold")]
        assert [row.system for row in of_k if not row.ratio] == OTHERS
        assert {row.source_tokens for row in of_k} == {50 * k}
        assert all(row.kv_bytes > 0 for row in of_k if row.ratio)


def test_first_token_and_answer_are_times_of_one_run(rows: list[SpeedRow]) -> None:
    for row in rows:
        if row.skipped is not None:
            assert row.first_token is row.answer is None
            continue
        assert row.first_token is not None
        assert row.answer is not None
        assert len(row.first_token.seconds) == len(row.answer.seconds) == 2
        for first, last in zip(row.first_token.seconds, row.answer.seconds, strict=True):
            assert 0 < first <= last
            assert (first == last) == (row.answer_tokens == 1)


def test_llama_cpp_that_cannot_run_is_a_row_with_its_reason(rows: list[SpeedRow]) -> None:
    skipped = {(row.system, row.skipped) for row in rows if row.skipped is not None}
    reason = contestants.why_no_llama_cpp(None)
    assert skipped == {(LLAMA_COLD, reason), (LLAMA_RESTORED, reason)}


def test_files_hold_all_rows(rows: list[SpeedRow], tmp_path: Path) -> None:
    write_files(rows, tmp_path / "out")
    written = json.loads((tmp_path / "out/speed.json").read_text())
    assert len(written) == len(rows)
    assert written[0]["answer"]["median_s"] > 0
    assert (tmp_path / "out/speed.md").read_text() == to_markdown(rows)
    table = [line for line in to_markdown(rows).splitlines() if line.startswith("|")]
    assert len(table) == len(rows) + 2 * 2
    assert {line.count("|") for line in table} == {8}
    assert (tmp_path / "out/speed.png").read_bytes().startswith(b"\x89PNG")


def test_ways_read_what_they_say_and_write_as_many_tokens_as_asked(
    llama: Generator, home: Any
) -> None:
    rag = SacRAG(CachedCompressor(full(llama), {}), prompt_format=FORMAT)
    chunks = list(PROSE[:2])
    ids = rag.prompt_ids(QUESTION, chunks)
    rag.answer(QUESTION, chunks)
    prefix = rag.answer(QUESTION, chunks).usage.plain_tokens_reused
    passes: list[int] = []
    handle = llama.model.base_model.register_forward_hook(
        lambda module, args, output: passes.append(output[0].shape[1])
    )
    try:
        assert len(contestants.from_text(llama, ids, 3)) == 3
        assert passes == [len(ids), 1, 1]
        passes.clear()
        assert len(contestants.from_text_behind_prefix(rag, QUESTION, chunks, 3)) == 3
        assert passes == [len(ids) - prefix, 1, 1]
        passes.clear()
        assert len(contestants.from_anchors(rag, [(QUESTION, chunks)], 3)) == 3
        assert passes[0] < len(ids) / 2
        assert passes[1:] == [1, 1]
    finally:
        handle.remove()


class FakeLlama:
    """As much of llama_cpp.Llama as is called; records the tokens of each pass."""

    def __init__(self, path: str, **options: Any) -> None:
        self.read: list[int] = []
        self.passes: list[int] = []

    def reset(self) -> None:
        self.read = []

    def eval(self, ids: Any) -> None:
        self.passes.append(len(ids))
        self.read += ids

    def save_state(self) -> list[int]:
        return list(self.read)

    def load_state(self, state: list[int]) -> None:
        self.read = list(state)

    def generate(self, ids: list[int], temp: float) -> Any:
        assert temp == 0
        while True:
            self.eval(ids[len(self.read) :])
            ids = [*ids, 7]
            yield 7


def test_llama_cpp_reads_all_of_the_prompt_cold_and_the_question_alone_restored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = ModuleType("llama_cpp")
    module.Llama = FakeLlama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    way = contestants.LlamaCpp(tmp_path / "model.gguf", positions=64, threads=1)
    ids = list(range(20))
    assert len(way.cold(ids, tokens=3)) == 3
    assert way._llama.passes == [20, 1, 1]
    way._llama.passes.clear()
    for _ in range(2):
        assert len(way.restored(ids, question=5, tokens=2)) == 2
    assert way._llama.passes == [15, 5, 1, 5, 1]


def test_without_a_gguf_the_reason_says_what_to_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(contestants, "find_spec", lambda name: object())
    assert "--gguf" in str(contestants.why_no_llama_cpp(None))
    assert str(tmp_path) in str(contestants.why_no_llama_cpp(tmp_path / "none.gguf"))
    monkeypatch.setattr(contestants, "find_spec", lambda name: None)
    assert "not installed" in str(contestants.why_no_llama_cpp(tmp_path / "none.gguf"))


def test_compressing_has_paid_when_the_answers_have_saved_its_time(rows: list[SpeedRow]) -> None:
    ours = next(row for row in rows if row.ratio == 5)
    theirs = next(
        row
        for row in rows
        if (row.system, row.k, row.answer_tokens) == (BEHIND_PREFIX, ours.k, ours.answer_tokens)
    )
    ours = replace(ours, compress_s=3.0, answer=Times((0.5, 0.5)))
    theirs = replace(theirs, answer=Times((2.0, 2.0)))
    assert break_even(ours, [ours, theirs]) == 2
    assert break_even(replace(ours, answer=Times((2.0,))), [theirs]) is None
    assert break_even(ours, [ours]) is None


def test_settings_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(ValueError, match="floppy"):
        Settings(stores=("floppy",))
    with pytest.raises(ValueError, match="at least one"):
        Settings(ks=())
