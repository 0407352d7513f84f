"""Question data is read by its content, and its passages are set among distractors."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from sac_rag.chunk import Chunk
from sac_rag.evaluation.passages import PassagePool
from sac_rag.evaluation.questions import (
    QAExample,
    Question,
    hold_out,
    normalised,
    read_questions,
    says,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"

SQUAD = {
    "data": [
        {
            "title": "Port_Ellery",
            "paragraphs": [
                {
                    "context": "The lighthouse is 41 metres tall.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "How tall is it?",
                            "answers": [{"text": "41 metres"}, {"text": "41"}, {"text": "41"}],
                        },
                        {"id": "q2", "question": "Who?", "answers": [], "is_impossible": True},
                    ],
                },
                {
                    "context": "The harbour was dredged in 1931.",
                    "qas": [
                        {"id": "q3", "question": "When?", "answers": [{"text": "1931"}]},
                    ],
                },
            ],
        }
    ]
}
MRQA = (
    {"header": {"dataset": "made up"}},
    {"context": "Owls hunt.", "qas": [{"qid": "m1", "question": "Who?", "answers": ["Owls"]}]},
    {"context": "Bees hum.", "qas": [{"qid": "m2", "question": "Who?", "answers": ["Bees"]}]},
)
PASSAGES = (
    {
        "question": "Who hums?",
        "answers": ["bees"],
        "ctxs": [
            {"title": "Owls", "text": "Owls hunt.", "gold": False},
            {"title": "Bees", "text": "Bees hum.", "gold": True},
        ],
    },
    {
        "question": "Who hunts?",
        "answers": ["The owls"],
        "ctxs": [{"text": "Owls hunt."}, {"text": "Growls hunt nobody."}],
    },
)


def lines(records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "no_ending_that_tells"])
def test_squad_is_an_example_a_paragraph_without_what_has_no_answer(
    tmp_path: Path, name: str
) -> None:
    examples = list(read_questions([write(tmp_path / name, json.dumps(SQUAD, indent=1))]))
    assert [e.gold[0].text for e in examples] == [
        "The lighthouse is 41 metres tall.",
        "The harbour was dredged in 1931.",
    ]
    assert examples[0].questions == (Question("q1", "How tall is it?", ("41 metres", "41")),)
    assert {e.article for e in examples} == {"Port_Ellery"}
    assert examples[0].gold[0].title == "Port Ellery"


def test_mrqa_is_an_example_a_line_behind_a_header(tmp_path: Path) -> None:
    examples = list(read_questions([write(tmp_path / "a.jsonl.gz", lines(MRQA))]))
    assert [(e.gold[0].text, e.questions[0].answers) for e in examples] == [
        ("Owls hunt.", ("Owls",)),
        ("Bees hum.", ("Bees",)),
    ]


def test_passages_are_gold_by_flag_or_else_by_what_they_say(tmp_path: Path) -> None:
    flagged, told = read_questions([write(tmp_path / "a.jsonl", lines(PASSAGES))])
    assert [c.title for c in flagged.gold] == ["Bees"]
    assert [c.title for c in flagged.distractors] == ["Owls"]
    assert [c.text for c in told.gold] == ["Owls hunt."]  # whole words: no "Growls"
    assert [c.text for c in told.distractors] == ["Growls hunt nobody."]


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(MRQA) + "this is no record\n")
    assert len(list(islice(read_questions([path]), 2))) == 2
    with pytest.raises(ValueError, match=r"a\.jsonl:4: "):
        list(read_questions([path]))


def test_a_bad_record_is_reported_with_its_place_and_passed_over(tmp_path: Path) -> None:
    bad = [
        *MRQA[:2],
        {"context": 5, "qas": []},
        {"context": "Cats.", "qas": [{"question": "", "answers": ["x"]}, {"answers": []}]},
        MRQA[2],
    ]
    told: list[str] = []
    path = write(tmp_path / "a.jsonl", lines(bad) + "{\n")
    examples = list(read_questions([path], on_bad=lambda place, why: told.append(place)))
    assert [e.gold[0].text for e in examples] == ["Owls hunt.", "Bees hum."]
    assert [place.rsplit("/", 1)[1] for place in told] == [
        "a.jsonl:3", "a.jsonl:4.qas[0]", "a.jsonl:4.qas[1]", "a.jsonl:6",
    ]  # fmt: skip


def test_a_bad_paragraph_of_squad_is_named_by_its_place(tmp_path: Path) -> None:
    article = SQUAD["data"][0]
    broken = {
        "data": [
            {"title": "No paragraphs"},
            {**article, "paragraphs": [{"qas": []}, *article["paragraphs"]]},
            "an article",
        ]
    }
    told: list[str] = []
    path = write(tmp_path / "a.json", json.dumps(broken))
    examples = list(read_questions([path], on_bad=lambda place, why: told.append(place)))
    assert [e.questions[0].id for e in examples] == ["q1", "q3"]
    assert [place.rsplit("/", 1)[1] for place in told] == [
        "a.json data[0]", "a.json data[1].paragraphs[0]", "a.json data[2]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ctxs": [{"text": "Bees hum.", "gold": "no"}]}, '"gold" must be true or false, was: .no'),
        ({"ctxs": [{"text": "Owls hunt."}]}, "must be gold or contain an answer"),
        ({"ctxs": [{"text": "Bees hum.", "gold": False}]}, "must be gold or contain an answer"),
        ({"ctxs": [{"title": "Bees"}]}, '"text" must be a str, was: None'),
        ({"ctxs": ["Bees hum."]}, "was: .Bees hum"),
        ({"ctxs": {}}, '"ctxs" must be a list'),
        ({"answers": "bees"}, '"answers" must be a list'),
        ({"question": "  "}, '"question" must have text'),
        ({"question": "half \ud83d"}, '"question" must be valid Unicode'),
    ],
)
def test_a_bad_record_says_what_is_wrong_and_where(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    # The first record of the file: the layout shows in the second.
    path = write(tmp_path / "a.jsonl", lines([{**PASSAGES[0], **changes}, PASSAGES[1]]))
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{message}"):
        list(read_questions([path]))
    told: list[str] = []
    (left,) = read_questions([path], on_bad=lambda place, why: told.append(why))
    assert (left.questions[0].text, len(told)) == ("Who hunts?", 1)


def test_files_of_different_layouts_are_read_one_after_the_other(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.json", json.dumps(SQUAD)),
        write(tmp_path / "b.jsonl", "\ufeff" + lines(MRQA[1:])),  # as some editors write it
        write(tmp_path / "c.jsonl.gz", "{ no record\n\n" + lines(PASSAGES)),
    ]
    told: list[str] = []
    examples = list(read_questions(paths, on_bad=lambda place, why: told.append(place)))
    assert len(examples) == 2 + 2 + 2
    # A question without an id of its own is named by its place.
    assert examples[-1].questions[0].id == f"{paths[2].as_posix()}:4"
    assert told == [f"{paths[2].as_posix()}:1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold question data, was: empty"),
        ("  \n\n", "must hold question data, was: empty"),
        ("[1, 2]", "must be SQuAD JSON"),
        ('{"rows": []}', "must be SQuAD JSON"),
        ('{"data": [', "must be SQuAD JSON"),
        ("just some prose\nand more of it\n", "must be SQuAD JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_questions([write(tmp_path / "a", content)]))


def test_gzip_that_is_cut_damaged_or_none_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json.gz", json.dumps(SQUAD))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for content in (whole[:-20], whole[:-4], bytes(damaged), json.dumps(SQUAD).encode()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json\.gz must be whole gzip"):
            list(read_questions([path]))


def test_a_missing_file_and_a_single_path_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a file that exists, was: '.*none'"):
        read_questions([tmp_path / "none"])
    with pytest.raises(TypeError, match="put it in a list"):
        read_questions(str(tmp_path))


def test_texts_are_compared_as_squad_compares_them() -> None:
    assert normalised("  The Owl's  nest, a big one!") == "owls nest big one"
    assert says(normalised("It was the 41 metres."), ["41"])
    assert not says(normalised("It was 141."), ["41"])
    assert not says(normalised("anything"), ["the"])


# --- distractors

POOL = [
    QAExample(
        gold=(Chunk(f"Passage {a}{n} says {word}."),),
        questions=(Question(f"{a}{n}", "?", (word,)),),
        article=a,
    )
    for a in "xy"
    for n, word in enumerate(("apple", "pear", "plum", "fig"))
]


def test_gold_stands_among_passages_of_its_article_at_any_place() -> None:
    pool = PassagePool(POOL)
    places = set()
    for seed in range(20):
        passages = pool.passages_for(POOL[0], 4, random.Random(seed))
        texts = [chunk.text for chunk in passages]
        assert len(set(texts)) == 4
        assert {text[8] for text in texts} == {"x"}
        places.add(texts.index(POOL[0].gold[0].text))
    assert places == {0, 1, 2, 3}


def test_examples_of_no_article_stand_among_passages_of_any() -> None:
    lonely = [QAExample(e.gold, e.questions) for e in POOL]
    passages = [
        chunk.text
        for seed in range(10)
        for chunk in PassagePool(lonely).passages_for(lonely[1], 3, random.Random(seed))
    ]
    assert {text[8] for text in passages} == {"x", "y"}
    assert not any("y1" in text for text in passages)  # says "pear" too


def test_equal_seeds_give_equal_passages() -> None:
    pool = PassagePool(POOL)
    first, second, other = (
        [c.text for c in pool.passages_for(POOL[2], 5, random.Random(seed))] for seed in (7, 7, 8)
    )
    assert first == second != other


def test_a_passage_that_answers_too_is_the_last_resort() -> None:
    pool = PassagePool(POOL)
    twin = POOL[4].gold[0].text  # says "apple" too, in the other article
    seven = [c.text for c in pool.passages_for(POOL[0], 7, random.Random(0))]
    assert twin not in seven
    assert twin in [c.text for c in pool.passages_for(POOL[0], 8, random.Random(0))]
    assert len(pool.passages_for(POOL[0], 99, random.Random(0))) == 8


def test_a_records_own_distractors_come_first_and_gold_is_never_cut_below_k() -> None:
    own = QAExample(
        gold=(Chunk("gold one"), Chunk("gold two")),
        questions=(Question("q", "?", ("one",)),),
        distractors=(Chunk("own wrong"),),
    )
    pool = PassagePool([own, *POOL])
    assert {c.text for c in pool.passages_for(own, 3, random.Random(0))} == {
        "gold one", "gold two", "own wrong",
    }  # fmt: skip
    assert [c.text for c in pool.passages_for(own, 1, random.Random(0))] == ["gold one"]
    with pytest.raises(ValueError, match="k must be at least 1, was: 0"):
        pool.passages_for(own, 0, random.Random(0))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared question data is not on this machine")
def test_real_data_is_read_whole() -> None:
    dev = list(read_questions([SHARED / "squad-dev-a.json.gz"]))
    assert sum(len(example.questions) for example in dev) == 4575
    assert len({example.article for example in dev}) == 24
    hotpot = list(read_questions([SHARED / "hotpot-train-100.jsonl.gz"]))
    assert len(hotpot) == 100
    assert all(len(example.gold) == 2 for example in hotpot)


def test_the_last_articles_are_held_out_whole() -> None:
    examples = [
        QAExample(gold=(Chunk(f"Text {n}."),), questions=(), article=article)
        for n, article in enumerate(["a", "a", "b", "c", "c", "b"])
    ]
    others, held_out = hold_out(examples, 0.3)
    assert [example.article for example in held_out] == ["c", "c"]
    assert [example.article for example in others] == ["a", "a", "b", "b"]
    assert hold_out(examples, 1.0) == ([], examples)
    assert hold_out(examples, 0.0) == (examples, [])
    alone = [replace(example, article=None) for example in examples]
    assert hold_out(alone, 0.3)[1] == alone[4:]
