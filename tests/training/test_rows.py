"""Rows are the prompts that answers are written in, and batches of them are padded little."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from support.models import PROSE, make_compressor
from support.training import asked

from sac_rag.answering import token_ids
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.lm.generator import Generator
from sac_rag.prompts.chat import repeat_question
from sac_rag.prompts.format import SPANS, PromptFormat
from sac_rag.training.prompts import HELD_OUT, TRAINED, named_prompt
from sac_rag.training.rows import RowMaker, Source, Target, batched, padded_tokens


def test_a_row_is_the_prompt_that_answers_are_written_in(llama: Generator) -> None:
    maker = RowMaker(llama, SPANS)
    chunks, questions = asked(0, 3)
    row = maker.ask(chunks, questions)
    ids = list(maker.prefix_ids)
    for part in row.parts:
        ids += part.ids if isinstance(part, Source) else part
    ids += row.targets[0].ids
    assert llama.tokenizer.decode(ids) == (
        f"{SPANS.prefix}Text:\n{PROSE[3]}\n\nText:\n{PROSE[0]}\n"
        "Question: Who counted ships?\nAnswer: The lighthouse keeper\n"
    )
    predicted = row.targets[0].ids[-row.targets[0].predicted :]
    assert llama.tokenizer.decode(predicted) == " The lighthouse keeper\n"
    assert [llama.tokenizer.decode(source.ids) for source in row.sources] == [PROSE[3], PROSE[0]]


def test_a_chat_answer_ends_with_the_models_own_end(llama: Generator) -> None:
    maker = RowMaker(llama, PromptFormat())
    row = maker.ask(*asked(1))
    target = row.targets[0]
    assert llama.tokenizer.decode(target.ids[-target.predicted :]) == "Copper<|endoftext|>"


def test_questions_before_the_chunks_have_rows_of_their_own_and_share_the_encoding(
    llama: Generator,
) -> None:
    maker = RowMaker(llama, PromptFormat(user="{question}\n{chunks}\nAnswer:"))
    chunks, questions = asked(0, 3)
    questions += asked(3)[1]
    with pytest.raises(ValueError, match="precede the chunks cannot share a row, got 2"):
        maker.ask(chunks, questions)
    rows = maker.rows(chunks, questions)
    assert len(rows) == 2
    assert rows[0].sources == rows[1].sources
    longest = max(len(source.ids) for source in rows[0].sources)
    decoded = max(row.num_decoded for row in rows)
    assert padded_tokens(rows) == 2 * longest + 2 * decoded


@pytest.mark.parametrize("name", [*TRAINED, *HELD_OUT])
def test_rows_of_every_prompt_are_the_prompts_that_answers_are_written_in(
    llama: Generator, name: str
) -> None:
    prompt = named_prompt(name)
    maker = RowMaker(llama, [SPANS, prompt])
    chunks = [Chunk(PROSE[3], title="Weather"), Chunk(PROSE[0], title="A lighthouse")]
    _, questions = asked(0)
    (row,) = maker.rows(chunks, questions, prompt=1, draft="a draft")
    ids = [i for part in row.parts for i in (part.ids if isinstance(part, Source) else part)]
    target = row.targets[0]
    ids += target.ids[: len(target.ids) - target.predicted]
    shown = replace(prompt, user=prompt.user.replace("{draft}", "a draft"))
    read = repeat_question(shown.pieces(llama.tokenizer, questions[0].text, chunks))
    compressor = CachedCompressor(make_compressor(llama, "learned"), {})
    assert maker.prefix_ids == ()
    assert ids == token_ids(read, compressor)


def test_prompts_to_validate_in_are_not_trained_in() -> None:
    assert len(TRAINED) >= 12
    assert len(HELD_OUT) >= 4
    assert not set(TRAINED.values()) & set(HELD_OUT.values())
    with pytest.raises(ValueError, match=r"must be the name of one .* was: 'nothing'"):
        named_prompt("nothing")


def test_a_prompt_of_a_file_is_trained_in(tmp_path: Path) -> None:
    mine = PromptFormat(user="{chunks}\nQ: {question}")
    (tmp_path / "mine.json").write_text(mine.to_json())
    assert named_prompt(str(tmp_path / "mine.json")) == mine


def test_prose_is_cut_into_what_is_compressed_and_what_follows(llama: Generator) -> None:
    maker = RowMaker(llama, SPANS)
    ids = tuple(llama.tokenize(" ".join(PROSE)))
    row = maker.continue_text(" ".join(PROSE), 40, repeat=True)
    assert row is not None
    assert row.sources[0].ids == ids[:40]
    follows, again = row.targets
    assert follows == Target(ids[40:80], 39)
    assert again.ids[-again.predicted :] == ids[:40]
    assert maker.continue_text("Too short.", 40) is None


def test_batches_hold_every_row_once_within_their_bound(llama: Generator) -> None:
    maker = RowMaker(llama, SPANS)
    rows = [maker.ask(*asked(i % 8, *range(i % 3))) for i in range(24)]
    batches = list(batched(rows, 250, random.Random(0), window=10))
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
    assert all(padded_tokens(batch) <= 250 for batch in batches if len(batch) > 1)
    assert any(len(batch) > 1 for batch in batches)
