"""Training data is held out by article and drawn as the config says, reproducibly."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.models import PROSE, make_compressor
from support.training import ASKED

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.evaluation.passages import PassagePool
from sac_rag.evaluation.questions import QAExample, Question
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.generate import Decoding
from sac_rag.training.batches import BatchStream, mixed, read_documents, split_examples
from sac_rag.training.config import TrainConfig
from sac_rag.training.instructions import (
    read_instructions,
    without_repetition,
    write_instructions,
)
from sac_rag.training.prompts import TRAINED
from sac_rag.training.rows import RowMaker


def test_no_article_is_in_training_and_validation(config: TrainConfig) -> None:
    training, held = split_examples(config)
    assert {example.article for example in held} == {"article 3"}
    assert [len(file) for file in training] == [6]
    assert not {e.article for file in training for e in file} & {e.article for e in held}


def test_of_every_file_the_last_articles_are_held_out(config: TrainConfig, tmp_path: Path) -> None:
    records = [
        {"question": f"Who is {i}?", "answers": ["Ann"], "ctxs": [{"text": f"Ann {i}"}]}
        for i in range(8)
    ]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(record) + "\n" for record in records))
    training, held = split_examples(replace(config, data=(*config.data, str(other))))
    assert [len(file) for file in training] == [6, 6]
    assert [example.questions[0].text for example in held[2:]] == ["Who is 6?", "Who is 7?"]


@pytest.mark.parametrize(
    ("held_out", "message"), [(1, "all 8 are held out"), (0, "no validation examples")]
)
def test_data_that_leaves_nothing_is_refused(questions: Path, held_out: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_examples(TrainConfig(data=(str(questions),), held_out_share=held_out))


def test_files_are_drawn_from_by_their_shares_and_all_of_one_before_any_again() -> None:
    drawn = list(islice(mixed(["abcd", "ef", ""], [3, 1, 5], random.Random(0)), 400))
    counts = Counter(number for number, _ in drawn)
    assert counts[0] == pytest.approx(300, abs=30)
    assert counts[2] == 0
    of_first = [item for number, item in drawn if number == 0]
    assert all(sorted(of_first[i : i + 4]) == list("abcd") for i in range(0, 200, 4))


def test_equal_configs_give_equal_batches_and_another_seed_gives_others(
    llama: Generator, config: TrainConfig
) -> None:
    examples, _ = split_examples(config)
    maker = RowMaker(llama, config.prompt_format)

    def first(changed: TrainConfig) -> list[Any]:
        return list(islice(BatchStream(changed, maker, examples), 12))

    batches = first(config)
    assert batches == first(config)
    assert batches != first(replace(config, seed=1))
    assert {batch.ratio for batch in batches} == {2, 5}
    assert {len(row.sources) for batch in batches for row in batch.rows} == {1, 3}
    for distractors_learn in (True, False):
        batches = first(replace(config, distractors_learn=distractors_learn))
        for row in (row for batch in batches for row in batch.rows):
            learning = sum(source.learns for source in row.sources)
            assert learning == (len(row.sources) if distractors_learn else 1)


def test_batches_mix_prompts_close_distractors_and_drafts(
    llama: Generator, config: TrainConfig
) -> None:
    wanted = ("passages", "question-first", "refine")
    config = replace(config, prompts=wanted, chunks=(2,), close_distractors=1.0)
    examples, _ = split_examples(config)
    maker = RowMaker(llama, config.formats)
    rows = [row for batch in islice(BatchStream(config, maker, examples), 60) for row in batch.rows]
    texts = [
        llama.tokenizer.decode([i for part in row.parts if isinstance(part, tuple) for i in part])
        for row in rows
    ]
    assert all(any(words in text for text in texts) for words in ("Be brief", "search tool"))
    drafts = [text.split("answer is: ")[1].split("\n")[0] for text in texts if "answer is" in text]
    # What is not known yet is in a passage, and what is known is repeated.
    assert {"The passages so far do not say."} < set(drafts)
    assert set(drafts) <= {answer for _, answer in ASKED} | {"The passages so far do not say."}


def test_close_distractors_are_those_with_the_questions_words() -> None:
    passages = ["Owls hunt at night.", "A glacier is ice.", "Owls hear a mouse.", "Iron rusts."]
    examples = [
        QAExample(gold=(Chunk(text),), questions=(Question("", asked, (answer,)),))
        for text, asked, answer in zip(
            passages,
            ("When do owls hunt?", "What is a glacier?", "What do owls hear?", "What rusts?"),
            ("night", "ice", "a mouse", "Iron"),
            strict=True,
        )
    ]
    pool = PassagePool(examples)
    for seed in range(5):
        chosen = pool.passages_for(examples[2], 2, random.Random(seed), close=True)
        assert {chunk.text for chunk in chosen} == {passages[0], passages[2]}


def test_answers_to_instructions_are_the_frozen_lms_own_and_learned_with_their_ends(
    llama: Generator, config: TrainConfig, tmp_path: Path
) -> None:
    path = tmp_path / "written.jsonl"
    examples, _ = split_examples(config)
    write_instructions(llama, examples[0], path, 2, max_tokens=6, batch=2)
    write_instructions(llama, examples[0], path, 4, max_tokens=6, batch=2)
    written = list(read_instructions([path]))
    assert len(written) == 4
    together = tmp_path / "at once.jsonl"
    write_instructions(llama, examples[0], together, 4, max_tokens=6, batch=1)
    assert list(read_instructions([together])) == written
    one = written[0]
    rag = SacRAG(CachedCompressor(make_compressor(llama, "full"), {}), on_miss="text")
    shown = TRAINED[one.prompt].messages(one.instruction, one.chunks)
    (answer,) = rag.chat([shown], Decoding(max_new_tokens=6))
    assert without_repetition(answer.text)[0] == one.response
    # A random model rarely says anything that ends.
    path.write_text(
        "".join(
            json.dumps({**asdict(one), "response": "Owls.", "ended": ended}) + "\n"
            for ended in (True, False)
        )
    )
    config = replace(
        config, prompts=(one.prompt,), instructions=(str(path),), instruction_share=1.0
    )
    maker = RowMaker(llama, config.formats)
    rows = [row for batch in islice(BatchStream(config, maker, examples), 4) for row in batch.rows]
    predicted = {llama.tokenizer.decode(t.ids[-t.predicted :]) for row in rows for t in row.targets}
    assert predicted == {"Owls.<|endoftext|>", "Owls."}
    with pytest.raises(ValueError, match=r"no answer of .* was written in a prompt of the run"):
        next(iter(BatchStream(replace(config, prompts=("refine",)), maker, examples)))


def test_a_line_that_is_no_instruction_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "bare"}\n')
    with pytest.raises(ValueError, match=r"broken.jsonl:1 must be an example"):
        list(read_instructions([path]))


@pytest.mark.parametrize(
    ("text", "kept", "cut"),
    [
        ("One two three. " * 2, "One two three. " * 2, False),
        (
            "It begins. " + "The same words come again and again here. " * 3,
            "It begins. The same words come again and again here.",
            True,
        ),
        ("1. a b c d e f g h\n2. a b c d e f g h i", "1. a b c d e f g h", True),
    ],
)
def test_an_answer_is_cut_where_it_repeats_itself(text: str, kept: str, cut: bool) -> None:
    assert without_repetition(text) == (kept, cut)


def test_a_curriculum_lets_higher_ratios_join_later(llama: Generator, config: TrainConfig) -> None:
    slow = replace(config, curriculum=1.0, steps=40)
    examples, _ = split_examples(slow)
    batches = list(islice(BatchStream(slow, RowMaker(llama, slow.prompt_format), examples), 80))
    assert {batch.ratio for batch in batches[:39]} == {2}
    assert {batch.ratio for batch in batches[40:]} == {2, 5}


def test_prose_may_come_before_all_questions(
    llama: Generator, config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "prose.txt").write_text(" ".join(PROSE))
    staged = replace(config, text=(str(tmp_path / "prose.txt"),), text_first=3)
    examples, _ = split_examples(staged)
    batches = list(islice(BatchStream(staged, RowMaker(llama, staged.prompt_format), examples), 8))
    targets = [[target for row in batch.rows for target in row.targets] for batch in batches]
    # Of prose everything is predicted, of questions the answer.
    is_prose = [all(t.predicted == len(t.ids) - 1 for t in of_batch) for of_batch in targets]
    assert is_prose == [True] * 3 + [False] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_share": 1.0}, "no document of .* has 32 tokens"),
        ({"longest_chunk": 3}, r"no passage of .* fits into longest_chunk \(3 tokens\)"),
    ],
)
def test_data_of_which_nothing_can_be_learned_is_refused(
    llama: Generator, config: TrainConfig, tmp_path: Path, changes: Any, message: str
) -> None:
    (tmp_path / "prose.txt").write_text("Too short.\n\nThis too.\n")
    config = replace(config, text=(str(tmp_path / "prose.txt"),), **changes)
    examples, _ = split_examples(config)
    with pytest.raises(ValueError, match=message):
        next(iter(BatchStream(config, RowMaker(llama, config.prompt_format), examples)))


def test_documents_are_paragraphs_between_blank_lines(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "prose.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("one\ntwo\n\n\nthree\n\n")
    assert list(read_documents([str(path), str(path)])) == ["one two", "three"] * 2
