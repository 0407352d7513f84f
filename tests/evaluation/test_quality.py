"""Every system answers the same questions, and a measurement goes on where it was left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.models import PROSE, make_compressor, passes_of

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors.config import Budget
from sac_rag.evaluation.comparison import FIGURES, compare, to_markdown
from sac_rag.evaluation.quality import QualityResult, System, as_read, evaluate
from sac_rag.evaluation.questions import QAExample, Question
from sac_rag.evaluation.sample import Sample, draw, passages_of
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.format import SPANS, PromptFormat
from sac_rag.prompts.generate import Decoding

SYSTEMS: tuple[System, ...] = get_args(System)

EXAMPLES = [
    QAExample(
        gold=(Chunk(text),),
        questions=tuple(
            Question(f"{number}.{n}", f"What about {text.split()[n]}?", (text.split()[n],))
            for n in range(2)
        ),
        article=str(number // 4),
    )
    for number, text in enumerate(PROSE)
]


@pytest.fixture
def rag(llama: Generator, home: Path) -> SacRAG:
    return SacRAG(CachedCompressor(make_compressor(llama, "learned"), {}), prompt_format=SPANS)


def sample(k: int = 1, limit: int = 6, seed: int = 0) -> Sample:
    return draw(EXAMPLES, k=k, limit=limit, seed=seed)


def rows(path: Path) -> dict[int, dict[str, Any]]:
    """What a file holds, except the times that it took."""
    found = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len({row["number"] for row in found}) == len(found), "a question was answered twice"
    return {row.pop("number"): {**row, "seconds": None, "first_token_s": None} for row in found}


def predictions(path: Path) -> dict[int, str]:
    return {number: row["prediction"] for number, row in rows(path).items()}


# --- what is asked


def test_a_questions_passages_depend_on_its_number_alone() -> None:
    everything = {t.number: t for t in draw(EXAMPLES, k=3, seed=1).trials}
    few = draw(EXAMPLES, k=3, limit=5, seed=1).trials
    assert len(everything) == 16
    assert all(everything[trial.number] == trial for trial in few)
    assert draw(EXAMPLES, k=3, limit=5, seed=2).trials != few
    assert len(draw(EXAMPLES, limit=99).trials) == 16


@pytest.mark.parametrize(
    ("examples", "changes", "message"),
    [
        (EXAMPLES, {"limit": 0}, "limit must be at least 1, was: 0"),
        (EXAMPLES, {"k": 0}, "k must be at least 1, was: 0"),
        (EXAMPLES, {"seed": -1}, "seed must be at least 0, was: -1"),
        ([], {}, "at least one question"),
    ],
)
def test_what_cannot_be_drawn_is_refused(examples: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(examples, **changes)


def test_systems_get_the_same_questions_with_the_same_golds(rag: SacRAG, tmp_path: Path) -> None:
    asked = sample(k=3)
    for system in SYSTEMS:
        out = tmp_path / f"{system}.jsonl"
        result = evaluate(rag, asked, system=system, max_new_tokens=2, out=out)
        assert result.n == 6
        assert {number: (row["question"], row["golds"]) for number, row in rows(out).items()} == {
            t.number: (t.question.text, list(t.question.answers)) for t in asked.trials
        }


def test_retrieved_passages_are_asked_about_and_their_recall_is_noted() -> None:
    passages = passages_of(EXAMPLES)
    assert [chunk.text for chunk in passages] == list(PROSE)

    def wrong_for_owls(question: str, k: int) -> list[Chunk]:
        found = [chunk for chunk in passages if question.split()[2].rstrip("?") in chunk.text]
        others = [chunk for chunk in passages if chunk not in found]
        return others[:k] if "Owls" in question else [*found, *others][:k]

    drawn = draw(EXAMPLES, k=2, retrieve=wrong_for_owls)
    assert all(len(trial.chunks) == 2 for trial in drawn.trials)
    assert drawn.recall == 15 / 16
    assert draw(EXAMPLES, k=2).recall is None


def test_close_distractors_have_words_of_the_question_itself() -> None:
    texts = [
        "Owls hunt mice.",
        "Ships carry coal.",
        "Old ships sink.",
        "Owls sleep.",
        "Rain falls.",
    ]
    asked = (
        Question("0", "What do owls hunt?", ("mice",)),
        Question("1", "Do ships sink?", ("coal",)),
    )
    examples = [
        QAExample(gold=(Chunk(text),), questions=asked if number == 0 else ())
        for number, text in enumerate(texts)
    ]
    of_owls, of_ships = draw(examples, k=2, close=True).trials
    assert {chunk.text for chunk in of_owls.chunks} == {"Owls hunt mice.", "Owls sleep."}
    assert {chunk.text for chunk in of_ships.chunks} == {"Owls hunt mice.", "Old ships sink."}


# --- who reads what


def test_compressed_answers_are_those_of_the_pipeline(rag: SacRAG, tmp_path: Path) -> None:
    asked = sample(k=2)
    result = evaluate(rag, asked, max_new_tokens=6, out=tmp_path / "a.jsonl")
    written = predictions(tmp_path / "a.jsonl")
    for trial in asked.trials:
        answer = rag.answer(trial.question.text, trial.chunks, Decoding(max_new_tokens=6))
        assert written[trial.number] == answer.text.strip()
    assert (result.system, result.ratio, result.k, result.n) == ("compressed", 3, 2, 6)
    assert result.fingerprint == rag.compressor.fingerprint


@pytest.mark.parametrize("system", ["full-text", "closed-book"])
def test_text_is_read_in_one_piece_by_the_model_alone(
    rag: SacRAG, tmp_path: Path, system: System
) -> None:
    asked, generator = sample(k=2, limit=3), rag.generator
    result = evaluate(rag, asked, system=system, max_new_tokens=6, out=tmp_path / "a.jsonl")
    for trial in asked.trials:
        chunks = trial.chunks if system == "full-text" else ()
        ids = torch.tensor([rag.prompt_ids(trial.question.text, chunks)])
        written = generator.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        text = generator.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        assert predictions(tmp_path / "a.jsonl")[trial.number] == text.split("\n")[0].strip()
    assert result.fingerprint is None
    assert result.ratio == (1 if system == "full-text" else None)
    assert not rag.compressor.store, "nothing is compressed for a system that reads text"


@pytest.mark.parametrize("ratio", [2, 3, 7, 500])
@pytest.mark.parametrize("changes", [{}, {"segment_tokens": 8}, {"heading": "Text:\n"}])
def test_truncated_reads_as_many_tokens_as_there_would_be_anchors(
    llama: Generator, ratio: int, changes: dict[str, Any]
) -> None:
    compressor = make_compressor(llama, "sac", ratio=ratio, **changes)
    trials = draw(EXAMPLES, k=2).trials
    for whole, cut in zip(trials, as_read(trials, "truncated", compressor, ratio), strict=True):
        assert replace(cut, chunks=whole.chunks) == whole
        kvs = compressor.compress([chunk.text for chunk in whole.chunks])
        for chunk, shorter, kv in zip(whole.chunks, cut.chunks, kvs, strict=True):
            assert chunk.text.startswith(shorter.text)
            assert len(llama.tokenize(shorter.text)) == kv.num_anchors


def test_truncated_text_never_ends_in_half_a_character_or_in_more_tokens(llama: Generator) -> None:
    text = "Zürich 🏔️ naïve: 雪が降る, a glacier."  # several tokens a character
    trials = draw([QAExample((Chunk(text),), (Question("q", "?", ("snow",)),))]).trials
    compressor = make_compressor(llama, "full")
    shown = set()
    for ratio in range(1, 60):
        (trial,) = as_read(trials, "truncated", compressor, ratio)
        shown.add(trial.chunks[0].text)
        assert text.startswith(trial.chunks[0].text)
        most = -(-len(llama.tokenize(text)) // ratio)
        assert len(llama.tokenize(trial.chunks[0].text)) <= most
    assert text in shown
    assert len(shown) > 5


def test_truncated_at_ratio_1_is_the_full_text(rag: SacRAG, tmp_path: Path) -> None:
    for system, ratio in (("truncated", 1), ("full-text", None)):
        out = tmp_path / f"{system}.jsonl"
        evaluate(rag, sample(k=2), system=system, ratio=ratio, max_new_tokens=5, out=out)  # type: ignore[arg-type]
    assert predictions(tmp_path / "truncated.jsonl") == predictions(tmp_path / "full-text.jsonl")
    shorter = evaluate(rag, sample(), system="truncated", max_new_tokens=1)
    assert shorter.ratio == 3, "by default the compressor's"


def test_what_is_read_makes_a_difference(rag: SacRAG, tmp_path: Path) -> None:
    written = []
    for system in SYSTEMS:
        evaluate(rag, sample(k=2), system=system, max_new_tokens=8, out=tmp_path / system)
        written.append(predictions(tmp_path / system))
    assert all(a != b for n, a in enumerate(written) for b in written[:n])


def test_scores_are_means_over_the_answers(rag: SacRAG, tmp_path: Path) -> None:
    # What the model answers is gold for one question, and the beginning of gold for another.
    out, asked = tmp_path / "a.jsonl", sample(limit=4)
    evaluate(rag, asked, system="full-text", max_new_tokens=12, out=out)
    said = predictions(out)
    golds = [
        (f"not {said[asked.trials[0].number]}", said[asked.trials[0].number]),
        (f"{said[asked.trials[1].number]} zzzz",),
        ("zzzz",),
        ("zzzz",),
    ]
    trials = tuple(
        replace(trial, question=replace(trial.question, answers=gold))
        for trial, gold in zip(asked.trials, golds, strict=True)
    )
    scored = replace(asked, trials=trials)
    result = evaluate(rag, scored, system="full-text", max_new_tokens=12, out=tmp_path / "b")
    first, second, third, fourth = (rows(tmp_path / "b")[trial.number] for trial in trials)
    assert (first["em"], first["f1"], first["contains"]) == (1, 1, 1)
    assert second["em"] == 0
    assert 0.5 < second["f1"] < 1
    assert third["f1"] == fourth["f1"] == 0
    assert (result.em, result.contains) == (0.25, 0.25)
    assert result.f1 == pytest.approx((1 + second["f1"]) / 4)
    assert result.f1_interval[0] < result.f1 < result.f1_interval[1]


def test_results_name_the_prompt_so_that_comparisons_can_be_trusted(
    rag: SacRAG, llama: Generator
) -> None:
    other = SacRAG(
        CachedCompressor(make_compressor(llama, "full"), {}), prompt_format=PromptFormat()
    )
    same = SacRAG(CachedCompressor(make_compressor(llama, "full"), {}), prompt_format=SPANS)
    mine, theirs, equal = (
        evaluate(r, sample(limit=1), system="closed-book", max_new_tokens=1).prompt
        for r in (rag, other, same)
    )
    assert mine == equal != theirs


@pytest.mark.parametrize("system", SYSTEMS)
def test_answers_do_not_depend_on_the_batch(rag: SacRAG, tmp_path: Path, system: System) -> None:
    written = []
    for size in (1, 4, 99):
        out = tmp_path / f"{size}.jsonl"
        evaluate(rag, sample(k=2), system=system, max_new_tokens=5, batch_size=size, out=out)
        written.append(rows(out))
    assert written[0] == written[1] == written[2]


# --- going on


@pytest.mark.parametrize(
    ("cut", "again"),
    [
        (lambda content: 0, 6),  # nothing was written
        (lambda content: 40, 6),  # in the line of settings
        (lambda content: content.index(b"\n"), 6),
        (lambda content: content.index(b"\n") + 1, 6),
        (lambda content: content.index(b"\n") + 9, 6),  # in the first answer
        (lambda content: len(content) - 9, 1),  # in the last answer
        (lambda content: len(content) - 1, 1),  # before the last line's end
        (lambda content: len(content), 0),
    ],
)
def test_a_measurement_that_was_cut_off_goes_on(
    rag: SacRAG, tmp_path: Path, cut: Any, again: int
) -> None:
    asked, out = sample(k=2), tmp_path / "new folder" / "a.jsonl"
    whole = evaluate(rag, asked, max_new_tokens=4, batch_size=2, out=out)
    content, before = out.read_bytes(), rows(out)
    left = content[: cut(content)]
    out.write_bytes(left)
    done: list[int] = []
    with passes_of(rag.generator) as passes:
        resumed = evaluate(
            rag, asked, max_new_tokens=4, batch_size=2, out=out, on_progress=done.append
        )
    assert bool(passes) == bool(again), "what is answered already is not answered again"
    assert sum(done) == 6
    assert rows(out) == before
    assert out.read_bytes().startswith(left[: left.rfind(b"\n") + 1])
    times: dict[str, Any] = {"seconds": 0, "first_token_s": 0}
    assert replace(resumed, **times) == replace(whole, **times)


def test_a_kept_file_gives_the_same_result_to_the_bit(rag: SacRAG, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    first = evaluate(rag, sample(), out=out, labels={"date": "2026-01-01"})
    kept = out.read_bytes()
    with passes_of(rag.generator) as passes:
        again = evaluate(rag, sample(), out=out, labels={"date": "2026-01-02"})
    assert not passes, "nothing is answered again"
    assert again == first
    assert again.provenance == {"date": "2026-01-01"}, "of the day that it was measured"
    assert out.read_bytes() == kept


def test_a_header_that_was_cut_off_is_written_again_on_any_day(rag: SacRAG, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    evaluate(rag, sample(), out=out, labels={"date": "2026-01-01"})
    header = out.read_bytes().split(b"\n")[0]
    for length in (0, 9, len(header) - 2):
        out.write_bytes(header[:length])
        result = evaluate(rag, sample(), out=out, labels={"date": "2026-01-02"})
        assert result.provenance == {"date": "2026-01-02"}


def test_ctrl_c_keeps_all_batches_that_were_finished(rag: SacRAG, tmp_path: Path) -> None:
    asked, out = sample(), tmp_path / "a.jsonl"

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(rag, asked, max_new_tokens=4, batch_size=2, out=out, on_progress=interrupt)
    assert len(rows(out)) == 2
    done: list[int] = []
    evaluate(rag, asked, max_new_tokens=4, batch_size=3, out=out, on_progress=done.append)
    assert done[0] == 2
    assert sum(done) == 6
    uninterrupted = tmp_path / "b.jsonl"
    evaluate(rag, asked, max_new_tokens=4, out=uninterrupted)
    assert rows(out) == rows(uninterrupted)


def test_a_file_of_other_settings_is_refused_and_left_alone(rag: SacRAG, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    evaluate(rag, sample(limit=2), max_new_tokens=2, out=out, labels={"data": "here"})
    before = out.read_bytes()
    chat = SacRAG(rag.compressor, prompt_format=PromptFormat())
    other = SacRAG(CachedCompressor(rag.compressor.inner.at_ratio(5), {}), prompt_format=SPANS)
    headed = make_compressor(rag.generator, "full", heading="Text: ")
    for reader, asked, changes, named in (
        (rag, sample(limit=2), {"max_new_tokens": 3}, "max_new_tokens"),
        (rag, sample(limit=2), {"system": "closed-book"}, "system"),
        (rag, sample(limit=2, k=2), {}, "'k': .1, 2."),
        (rag, sample(limit=2, seed=1), {}, "questions"),
        (chat, sample(limit=2), {}, "prompt"),
        (other, sample(limit=2), {}, "ratio"),
        (SacRAG(CachedCompressor(headed, {}), prompt_format=SPANS), sample(limit=2), {}, "heading"),
    ):
        with pytest.raises(ValueError, match=f"was begun with other settings.*{named}"):
            evaluate(reader, asked, out=out, **{"max_new_tokens": 2, **changes})  # type: ignore[arg-type]
    # Where the data lies does not matter; what was asked does.
    evaluate(rag, sample(limit=2), max_new_tokens=2, out=out, labels={"data": "there"})
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("something else\n", "holds something else"),
        ("no line's end", "holds something else"),
        ('{"format": 2}\n', "is of format 2, this version of sac_rag writes format 1"),
        ('[{"format": 1}]\n', "holds something else"),
    ],
)
def test_a_file_of_another_kind_is_refused_and_left_alone(
    rag: SacRAG, tmp_path: Path, content: str, message: str
) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text(content)
    with pytest.raises(ValueError, match=f"a.jsonl {message}"):
        evaluate(rag, sample(limit=1), max_new_tokens=2, out=out)
    assert out.read_text() == content


def test_a_damaged_line_is_named(rag: SacRAG, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    evaluate(rag, sample(limit=2), max_new_tokens=2, out=out)
    header, _, second = out.read_bytes().splitlines(keepends=True)
    for damaged in (b"{\n", b"[]\n", b"{}\n"):
        out.write_bytes(header + damaged + second)
        with pytest.raises(ValueError, match=r"a\.jsonl:2 must be an answer"):
            evaluate(rag, sample(limit=2), max_new_tokens=2, out=out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "half"}, "system must be one of .*was: 'half'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"ratio": 7}, "the ratio of 'compressed' is 3 here"),
        ({"system": "full-text", "ratio": 7}, "the ratio of 'full-text' is 1 here"),
        ({"system": "truncated", "ratio": 0}, "ratio must be at least 1"),
    ],
)
def test_what_a_system_cannot_do_is_refused(rag: SacRAG, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(rag, sample(limit=1), **changes)


# --- all systems at once


def test_a_comparison_is_what_its_runs_are_alone(rag: SacRAG, tmp_path: Path) -> None:
    samples = [sample(k=1), sample(k=2)]
    results = list(compare(rag, samples, (1, 3), tmp_path, cut=3, max_new_tokens=4))
    assert [(r.system, r.ratio, r.k) for r in results] == [
        ("full-text", 1, 1),
        ("truncated", 3, 1),
        ("closed-book", None, 1),
        ("compressed", 1, 1),
        ("compressed", 3, 1),
        ("full-text", 1, 2),
        ("truncated", 3, 2),
        ("compressed", 1, 2),
        ("compressed", 3, 2),
    ]
    kept = json.loads((tmp_path / FIGURES).read_text())
    assert [(row["system"], row["f1"]) for row in kept] == [(r.system, r.f1) for r in results]
    at_3 = SacRAG(CachedCompressor(rag.compressor.inner.at_ratio(3), {}), prompt_format=SPANS)
    alone = evaluate(at_3, samples[0], max_new_tokens=4, out=tmp_path / "alone.jsonl")
    assert alone.fingerprint == results[4].fingerprint
    assert rows(tmp_path / "alone.jsonl") == rows(tmp_path / "compressed-3x-uniform-k1.jsonl")


def test_budgets_are_compared_with_heads_alike_and_one_encoding_serves_all_ratios(
    llama: Generator, tmp_path: Path
) -> None:
    shared = make_compressor(llama, "shared")
    rag = SacRAG(CachedCompressor(shared, {}), prompt_format=SPANS)
    with passes_of(llama) as passes:
        results = list(compare(rag, [sample()], (6, 1, 3), tmp_path, max_new_tokens=4))
    measured = [(r.ratio, r.budget) for r in results if r.system == "compressed"]
    assert measured == [(1, "shared"), (3, "shared"), (6, "shared"), (3, "uniform"), (6, "uniform")]
    with passes_of(llama) as alone:
        for ratio in (1, 3, 6):
            at_ratio = SacRAG(CachedCompressor(shared.at_ratio(ratio), {}), prompt_format=SPANS)
            evaluate(at_ratio, sample(), max_new_tokens=4)
            name = f"compressed-{ratio}x-shared-k1.jsonl"
            assert (tmp_path / name).is_file()
    assert passes
    assert alone
    table = to_markdown(results)
    assert "anchors, 3x |" in table
    assert "anchors, 3x, equal heads |" in table


def test_a_comparison_goes_on_where_it_was_left(rag: SacRAG, tmp_path: Path) -> None:
    first = list(compare(rag, [sample()], (2,), tmp_path, max_new_tokens=4))
    with passes_of(rag.generator) as passes:
        assert list(compare(rag, [sample()], (2,), tmp_path, max_new_tokens=4)) == first
    assert not passes


def test_the_table_sets_anchors_against_keeping_all() -> None:
    def result(system: System, ratio: int | None, f1: float) -> QualityResult:
        budget: Budget | None = "shared" if system == "compressed" else None
        return QualityResult(
            system, ratio, budget, 1, 9, 0.1, f1, 0.2, (0.0, 1.0), 0, "float32", "", None, 0, 1.0
        )

    table = to_markdown(
        [
            result("closed-book", None, 0.1),
            result("compressed", 1, 0.5),
            result("compressed", 5, 0.4),
        ]
    )
    assert table.splitlines()[2:] == [
        "| nothing (closed-book) | 1 | 0.100 (0.000 to 1.000) | 0.100 | 0.200 | 20% |",
        "| anchors, every token | 1 | 0.500 (0.000 to 1.000) | 0.100 | 0.200 | 100% |",
        "| anchors, 5x | 1 | 0.400 (0.000 to 1.000) | 0.100 | 0.200 | 80% |",
    ]
