"""Every system answers the same questions, and a measurement goes on where it was left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE, make_compressor, make_model, make_tokenizer, passes_of
from test_cli import sac_rag

from sac_rag.anchors import num_anchors
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors import checkpoint
from sac_rag.evaluation.quality import evaluate
from sac_rag.evaluation.sample import Sample, draw
from sac_rag.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.questions import QAExample, Question
from sac_rag.template import SPANS

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
    return SacRAG(CachedCompressor(make_compressor(llama, "learned"), {}), format=SPANS)


def sample(k: int = 1, limit: int = 6, seed: int = 0) -> Sample:
    return draw(EXAMPLES, k=k, limit=limit, seed=seed)


def passage(example: QAExample) -> dict[str, Any]:
    return {"text": example.gold[0].text, "gold": True}


def predictions(path: Path) -> dict[int, str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {row["number"]: row["prediction"] for row in rows}


def test_a_questions_passages_depend_on_its_number_alone() -> None:
    everything = {t.number: t for t in draw(EXAMPLES, k=3, seed=1).trials}
    few = draw(EXAMPLES, k=3, limit=5, seed=1).trials
    assert len(everything) == 16
    assert all(everything[trial.number] == trial for trial in few)
    assert draw(EXAMPLES, k=3, limit=5, seed=2).trials != few
    assert len(draw(EXAMPLES, limit=99).trials) == 16
    with pytest.raises(ValueError, match="limit must be at least 1"):
        draw(EXAMPLES, limit=0)
    with pytest.raises(ValueError, match="at least one question"):
        draw([])


def test_compressed_answers_are_those_of_the_pipeline(rag: SacRAG, tmp_path: Path) -> None:
    asked = sample(k=2)
    result = evaluate(rag, asked, max_new_tokens=6, out=tmp_path / "a.jsonl")
    written = predictions(tmp_path / "a.jsonl")
    from sac_rag.generate import Decoding

    for trial in asked.trials:
        answer = rag.answer(trial.question.text, trial.chunks, Decoding(max_new_tokens=6))
        assert written[trial.number] == answer.text.strip()
    assert (result.system, result.ratio, result.k, result.n) == ("compressed", 3, 2, 6)
    assert result.f1_interval[0] <= result.f1 <= result.f1_interval[1]
    assert result.fingerprint == rag.compressor.fingerprint


def test_text_is_read_in_one_piece_by_the_model_alone(rag: SacRAG, tmp_path: Path) -> None:
    asked = sample(k=2, limit=3)
    evaluate(rag, asked, system="full-text", max_new_tokens=6, out=tmp_path / "a.jsonl")
    generator = rag.generator
    for trial in asked.trials:
        import torch

        ids = torch.tensor([rag.prompt_ids(trial.question.text, trial.chunks)])
        written = generator.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        text = generator.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        assert predictions(tmp_path / "a.jsonl")[trial.number] == text.split("\n")[0].strip()


def test_truncated_reads_as_many_tokens_as_there_would_be_anchors(
    rag: SacRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = sample(k=2, limit=3)
    read: list[Any] = []
    batch = SacRAG.batch

    def recording(self: SacRAG, questions: Any, decoding: Any = None) -> Any:
        read.extend(questions)
        return batch(self, questions, decoding)

    monkeypatch.setattr(SacRAG, "batch", recording)
    evaluate(rag, asked, system="truncated", ratio=5, max_new_tokens=2)
    evaluate(rag, asked, system="no-text", max_new_tokens=2)
    by_question = {trial.question.text: trial for trial in asked.trials}
    for question, chunks in read[:3]:
        for whole, cut in zip(by_question[question].chunks, chunks, strict=True):
            ids = rag.generator.tokenize(whole.text)
            assert whole.text.startswith(cut.text)
            assert len(rag.generator.tokenize(cut.text)) == num_anchors(len(ids), 5)
    assert [chunks for _, chunks in read[3:]] == [()] * 3


def test_answers_do_not_depend_on_the_batch(rag: SacRAG, tmp_path: Path) -> None:
    for system in ("compressed", "full-text"):
        written = []
        for size in (1, 4):
            out = tmp_path / f"{system}{size}.jsonl"
            evaluate(rag, sample(k=2), system=system, max_new_tokens=5, batch_size=size, out=out)  # type: ignore[arg-type]
            written.append(predictions(out))
        assert written[0] == written[1]


def test_a_measurement_that_was_cut_off_goes_on(rag: SacRAG, tmp_path: Path) -> None:
    asked, out = sample(), tmp_path / "a.jsonl"
    whole = evaluate(rag, asked, max_new_tokens=4, batch_size=2, out=out)
    content = out.read_bytes()
    first_lines = b"".join(content.splitlines(keepends=True)[:3])
    out.write_bytes(first_lines + b'{"number": 3, "pre')  # two answers and a half
    done: list[int] = []
    with passes_of(rag.generator) as passes:
        again = evaluate(
            rag, asked, max_new_tokens=4, batch_size=2, out=out, on_progress=done.append
        )
    assert done == [2, 2, 2]
    assert passes
    assert (again.em, again.f1, again.n) == (whole.em, whole.f1, whole.n)
    assert sorted(predictions(out)) == sorted(trial.number for trial in asked.trials)
    with passes_of(rag.generator) as passes:
        evaluate(rag, asked, max_new_tokens=4, batch_size=2, out=out)
    assert not passes, "what is answered already is not answered again"


def test_a_file_of_other_settings_is_refused_and_left_alone(rag: SacRAG, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    evaluate(rag, sample(limit=2), max_new_tokens=2, out=out)
    before = out.read_bytes()
    for changes in ({"max_new_tokens": 3}, {"system": "no-text"}):
        with pytest.raises(ValueError, match="settings"):
            evaluate(rag, sample(limit=2), out=out, **{"max_new_tokens": 2, **changes})  # type: ignore[arg-type]
    assert out.read_bytes() == before
    out.write_text("something else\n")
    with pytest.raises(ValueError, match="holds something else"):
        evaluate(rag, sample(limit=2), max_new_tokens=2, out=out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "half"}, "system must be one of .*was: 'half'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"ratio": 7}, "the ratio of 'compressed' is 3 here"),
        ({"system": "truncated", "ratio": 0}, "ratio must be at least 1"),
    ],
)
def test_what_a_system_cannot_do_is_refused(rag: SacRAG, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(rag, sample(limit=1), **changes)


@pytest.mark.slow
def test_the_command_line_prints_one_object(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    checkpoint.save(
        make_compressor(make_generator("llama"), "learned"), tmp_path / "sac", format=SPANS
    )
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": q.text, "answers": q.answers, "ctxs": [passage(e)]}) + "\n"
            for e in EXAMPLES
            for q in e.questions
        )
    )
    common = (
        *("evaluate", "--data", str(data), "--model", str(tmp_path / "model")),
        *("--dtype", "float32", "--limit", "2", "--max-new-tokens", "3", "--json"),
    )
    compressor = ("--compressor", str(tmp_path / "sac"))
    for arguments in (
        (*compressor, "--ratio", "2", "--k", "3"),
        (*compressor, "--ratio", "1"),
        ("--system", "full-text"),
        ("--system", "no-text", *compressor),
    ):
        done = sac_rag(*common, *arguments)
        assert done.returncode == 0, done.stderr
        printed = json.loads(done.stdout)
        keys = {"system", "ratio", "k", "n", "em", "f1", "contains", "f1_interval"}
        assert keys <= printed.keys()
        assert printed["n"] == 2
    refused = sac_rag(*common, "--compressor", str(tmp_path / "nowhere"))
    assert refused.returncode == 1
    assert "a compressor must be 'full', 'shipped' or the folder" in refused.stderr
