"""Frameworks' own prompts are answered by the real adapters, and what comes of it is measured."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from typer.testing import CliRunner

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.cli import app
from sac_rag.compressors import checkpoint
from sac_rag.evaluation.dropin import (
    DropinResult,
    measure,
    repeated_bigrams,
    select_prompts,
    words,
)
from sac_rag.evaluation.frameworks import (
    _LANGCHAIN,
    INSTRUCTIONS,
    OWN,
    PROMPTS,
    Ask,
    Framework,
    Reply,
    asker,
)
from sac_rag.evaluation.questions import QAExample, Question
from sac_rag.evaluation.sample import Sample, draw
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.chat import Message
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import MemoryStore

EXAMPLES = [
    QAExample(
        gold=(Chunk(text),),
        questions=tuple(
            Question(f"{number}.{n}", f"What about {text.split()[n]}?", (text.split()[n],))
            for n in (1, -1)
        ),
        article=str(number // 4),
    )
    for number, text in enumerate(PROSE)
]
ALL = select_prompts(instructions=True)
SHORT = {"max_new_tokens": 5}


@pytest.fixture(autouse=True)
def no_loop_is_left() -> None:
    """LlamaIndex's sync calls make a loop that they do not close, unless none can be had."""
    asyncio.set_event_loop(None)


@pytest.fixture(scope="module")
def compressor(llama: Generator) -> CachedCompressor:
    return CachedCompressor(make_compressor(llama, "learned"), {})


@pytest.fixture
def rag(compressor: CachedCompressor, home: Path) -> SacRAG:
    return SacRAG(CachedCompressor(compressor.inner, MemoryStore()))


def sample(k: int = 1, limit: int = 3) -> Sample:
    return draw(EXAMPLES, k=k, limit=limit)


# --- how answers are measured


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("ships", 0),
        ("seven ships", 0),
        ("seven ships and seven ships", 1 / 4),  # four bigrams, one of them for the second time
        ("Seven ships. Seven SHIPS, seven", 2 / 4),  # seven ships, ships seven, both twice
        ("no no no no", 2 / 3),
        ("... - !", 0),
    ],
)
def test_repeated_bigrams_are_those_that_have_occurred_before(text: str, share: float) -> None:
    assert repeated_bigrams(text) == pytest.approx(share)


def test_words_have_no_punctuation_around_them() -> None:
    text = "\N{LEFT DOUBLE QUOTATION MARK}It's 41.5 metres - or so.\nYes!"
    assert words(text) == ["it's", "41.5", "metres", "or", "so", "yes"]


def test_results_are_means_over_the_answers(rag: SacRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = sample(limit=3)
    said = {
        asked.trials[0].question.text: Reply(asked.trials[0].question.answers[0], True, 0),
        asked.trials[1].question.text: Reply("no no no no", False, 0),
        asked.trials[2].question.text: Reply(" ", True, 0),
    }

    def scripted(*arguments: Any, **options: Any) -> Ask:
        return lambda trials: [said[trial.question.text] for trial in trials]

    monkeypatch.setattr("sac_rag.evaluation.dropin.asker", scripted)
    (result,) = measure(rag, [asked], [("langchain", "tutorial")], read_as=["text"])
    assert result.to_dict() == {
        "framework": "langchain", "prompt": "tutorial", "k": 1, "ratio": None, "read_as": "text",
        "n": 3, "f1": pytest.approx(1 / 3), "contains": pytest.approx(1 / 3), "words": 1.0,
        "ended": pytest.approx(2 / 3), "empty": pytest.approx(1 / 3),
        "repeated": pytest.approx(2 / 9),
    }  # fmt: skip


# --- what is asked, and what is attended to


def test_every_prompt_is_measured_from_text_and_from_anchors(rag: SacRAG) -> None:
    samples = [sample(k=1, limit=2), sample(k=2, limit=2)]
    results = list(measure(rag, samples, ALL, ratios=(6, 3), batch_size=2, **SHORT))
    assert [(r.read_as, r.ratio, r.k, r.framework, r.prompt) for r in results] == [
        (read_as, ratio, k, framework, prompt)
        for read_as, ratio in (("text", None), ("anchors", 3), ("anchors", 6))
        for k in (1, 2)
        for framework, prompt in ALL
    ]
    for result in results:
        assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
        if result.prompt in INSTRUCTIONS:
            assert result.f1 is result.contains is None
        else:
            assert result.n == 2
            assert result.f1 is not None and 0 <= result.f1 <= 1
        assert result.words > 0 == result.ended == result.empty  # a tiny model never ends
    stored = {chunk.text for one in samples for trial in one.trials for chunk in trial.chunks}
    assert len(rag.compressor.store) == len(stored)


def test_chunks_are_compressed_once_for_all_prompts(rag: SacRAG) -> None:
    asked = [sample(k=2)]
    rag.precompress(chunk for trial in asked[0].trials for chunk in trial.chunks)
    before = dict(rag.compressor.store)
    list(measure(rag, asked, ALL, read_as=["anchors"], **SHORT))
    after = dict(rag.compressor.store)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


@pytest.mark.parametrize(("framework", "prompt"), ALL)
def test_what_is_read_is_what_the_result_says(
    rag: SacRAG, framework: Framework, prompt: str
) -> None:
    trials = sample(k=2).trials
    reader = SacRAG(rag.compressor, decoding=Decoding(max_new_tokens=5))
    texts = asker(framework, prompt, reader, compressed=False)(trials)
    assert not rag.compressor.store
    assert [reply.attended for reply in texts] == [0, 0, 0]
    anchors = asker(framework, prompt, reader)(trials)
    assert len(rag.compressor.store) == len({c.text for t in trials for c in t.chunks})
    assert [reply.attended for reply in anchors] == [2, 2, 2]
    assert [reply.text for reply in texts] != [reply.text for reply in anchors]


@pytest.mark.parametrize("framework", PROMPTS)
def test_the_own_prompt_answers_as_the_pipeline_does(rag: SacRAG, framework: Framework) -> None:
    untitled = [
        replace(trial, chunks=tuple(replace(chunk, title=None) for chunk in trial.chunks))
        for trial in sample(k=2).trials
    ]
    reader = SacRAG(rag.compressor, decoding=Decoding(max_new_tokens=5))
    replies = asker(framework, OWN, reader)(untitled)
    assert [reply.text for reply in replies] == [
        reader.answer(trial.question.text, trial.chunks).text for trial in untitled
    ]


def test_text_is_read_by_the_frozen_model_in_the_same_prompt(rag: SacRAG) -> None:
    (trial,) = sample(limit=1).trials
    (reply,) = asker(
        "langchain", "rag-prompt", SacRAG(rag.compressor, decoding=Decoding(max_new_tokens=5)),
        compressed=False,
    )([trial])  # fmt: skip
    (user,) = _LANGCHAIN["rag-prompt"]
    turn = user[1].format(question=trial.question.text, context=trial.chunks[0].text)
    expected = rag.chat([[Message("user", (turn,))]], Decoding(max_new_tokens=5))
    assert reply.text == expected[0].text


def test_llama_index_asks_in_its_own_words(rag: SacRAG) -> None:
    from llama_index.core.prompts.chat_prompts import CHAT_TEXT_QA_PROMPT
    from llama_index_sac import SACLLM

    (trial,) = sample(k=2, limit=1).trials
    reader = SacRAG(rag.compressor, decoding=Decoding(max_new_tokens=5))
    (reply,) = asker("llama-index", "compact", reader, compressed=False)([trial])
    context = "\n\n".join(chunk.text for chunk in trial.chunks)
    messages = CHAT_TEXT_QA_PROMPT.format_messages(
        context_str=context, query_str=trial.question.text
    )
    assert reply.text == SACLLM(reader).chat(messages).message.content


def test_instructions_are_given_once_about_the_same_chunks(rag: SacRAG) -> None:
    asked = draw(EXAMPLES, k=1)  # two questions about each text
    prompts = select_prompts(["summarise", OWN], ["langchain"])
    results = list(measure(rag, [asked], prompts, read_as=["text"], **SHORT))
    assert [(r.prompt, r.n) for r in results] == [(OWN, 2 * len(PROSE)), ("summarise", len(PROSE))]


def test_anchors_that_an_adapter_loses_are_no_result(
    rag: SacRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(*arguments: Any, **options: Any) -> Ask:
        return lambda trials: [Reply("Yes.", True, 0) for _ in trials]

    monkeypatch.setattr("sac_rag.evaluation.dropin.asker", losing)
    with pytest.raises(RuntimeError, match="must attend to the anchors of 1 chunks of question"):
        list(measure(rag, [sample()], [("llama-index", "compact")], read_as=["anchors"]))


# --- which prompts


def test_prompts_are_chosen_by_name_and_framework() -> None:
    assert select_prompts() == [(f, p) for f, prompts in PROMPTS.items() for p in prompts]
    assert select_prompts([OWN]) == [("langchain", OWN), ("llama-index", OWN)]
    assert select_prompts(["explain", "refine"], ["llama-index"]) == [
        ("llama-index", "refine"),
        ("llama-index", "explain"),
    ]
    assert select_prompts([OWN], ["langchain"], instructions=True) == [
        ("langchain", name) for name in (OWN, *INSTRUCTIONS)
    ]


@pytest.mark.parametrize(
    ("names", "frameworks", "message"),
    [
        (
            ["compactt"],
            [],
            r"langchain and llama-index must be among .*compact, .*: \['compactt'\]",
        ),
        (["tutorial"], ["llama-index"], r"of llama-index must be among compact, .*\['tutorial'\]"),
        ([], ["haystack"], r"frameworks must be among langchain, llama-index, .*\['haystack'\]"),
    ],
)
def test_unknown_prompts_and_frameworks_are_refused_by_name(
    names: list[str], frameworks: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select_prompts(names, frameworks)


def test_what_cannot_be_measured_is_refused(rag: SacRAG) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, was: 0"):
        list(measure(rag, [sample()], ALL, batch_size=0))
    with pytest.raises(ValueError, match=r"must be one of langchain's, .*explain, was: 'compact'"):
        list(measure(rag, [sample()], [("langchain", "compact")]))


@pytest.mark.parametrize(
    ("framework", "other", "adapter", "absent"),
    [
        ("langchain", "llama-index", "langchain_sac", ["langchain_core"]),
        ("llama-index", "langchain", "llama_index_sac", ["llama_index", "llama_index.core"]),
    ],
)
def test_without_a_framework_its_extra_is_named_and_the_other_can_be_measured(
    framework: str, other: str, adapter: str, absent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, adapter, raising=False)
    assert {name for name, _ in select_prompts([OWN], [other])} == {other}
    with pytest.raises(ImportError, match=rf"pip install 'sac-rag\[{framework}\]'"):
        select_prompts([OWN])


# --- the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_generator: Any) -> Path:
    """A model, a compressor for it and questions, on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    checkpoint.save(make_compressor(make_generator("llama"), "learned"), folder / "sac")
    lines = [
        {
            "question": one.questions[0].text,
            "answers": list(one.questions[0].answers),
            "ctxs": [{"text": one.gold[0].text, "gold": True}],
        }
        for one in EXAMPLES
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def command(tiny: Path, *more: str) -> list[str]:
    return [
        *("bench", "dropin", "--data", str(tiny / "data.jsonl"), "--model", str(tiny / "model")),
        *("--compressor", str(tiny / "sac"), "--dtype", "float32", "-n", "2"),
        *("--max-tokens", "3", "--prompt", "compact", *more),
    ]


def test_bench_dropin_prints_one_object_or_a_table(tiny: Path, home: Path) -> None:
    more = ("--k", "1", "--k", "2", "--prompt", "tutorial", "--instructions")
    arguments = command(tiny, *more)
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    rows = [DropinResult(**row) for row in printed["rows"]]
    assert len(rows) == len({(r.framework, r.prompt, r.k, r.read_as) for r in rows}) == 2 * 2 * 8
    assert {(r.read_as, r.ratio) for r in rows} == {("text", None), ("anchors", 3)}
    # What is known when something ends the run.
    assert [json.loads(line) for line in done.stderr.splitlines()] == printed["rows"]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert [line for line in lines if line and line[0].startswith("k=")] == [
        *(["k=1,", "text"], ["k=1,", "anchors,", "3x"]),
        *(["k=2,", "text"], ["k=2,", "anchors,", "3x"]),
    ]
    measured = [(line[0], line[1]) for line in lines if line and line[0] in PROMPTS]
    assert measured == 4 * [(row.framework, row.prompt) for row in rows[:8]]


def test_bench_dropin_measures_only_what_was_asked_for(tiny: Path, home: Path) -> None:
    more = ("--k", "1", "--read-as", "anchors", "--ratio", "4", "--framework", "llama-index")
    done = CliRunner().invoke(app, command(tiny, *more, "--json"), catch_exceptions=False)
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["prompt"], row["read_as"], row["ratio"], row["n"]) == ("compact", "anchors", 4, 2)


def test_bench_dropin_names_the_prompts_there_are(tiny: Path, home: Path) -> None:
    with pytest.raises(ValueError, match=r"must be among retrieval-qa, .*\['stuffed'\]"):
        CliRunner().invoke(app, command(tiny, "--prompt", "stuffed"), catch_exceptions=False)


# --- the default model


@pytest.mark.real_model
@pytest.mark.slow
def test_the_default_model_finds_answers_in_the_frameworks_prompts(tmp_path: Path) -> None:
    facts = {
        "The tower of Brakel was rebuilt in 1753 after a fire.": ("When was it rebuilt?", "1753"),
        "Tenzin Dorje led the second expedition.": ("Who led it?", "Tenzin Dorje"),
        "Salt from the mines at Orva was shipped to Lisbon.": ("Where did salt go?", "Lisbon"),
    }
    examples = [
        QAExample((Chunk(text),), (Question(gold, question, (gold,)),))
        for text, (question, gold) in facts.items()
    ]
    rag = SacRAG.from_pretrained("smollm2-135m", dtype="float32")
    results = list(
        measure(rag, [draw(examples)], select_prompts([OWN, "compact"]), max_new_tokens=16)
    )
    assert len(results) == 2 * 3
    for result in results:
        assert result.n == 3
        assert result.contains is not None and result.contains >= 1 / 3
        assert result.empty == 0
