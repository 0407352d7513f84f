"""Training reaches what it should and nothing else, in the prompt that answers are written in.

ROUNDING: float32 sums of a few layers in another order.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from torch import Tensor
from torch.nn import functional

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors import checkpoint
from sac_rag.compressors.anchor_selection import showing_attention, top_anchors
from sac_rag.compressors.sac import SAC
from sac_rag.evaluation.passages import PassagePool
from sac_rag.evaluation.questions import QAExample, Question
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.assemble import Branches, assemble
from sac_rag.prompts.format import SPANS, PromptFormat
from sac_rag.prompts.generate import Decoding
from sac_rag.training.ablation import Outcome, compare, to_markdown
from sac_rag.training.anchor_oracle import compare_anchors
from sac_rag.training.batches import BatchStream, mixed, read_documents, split_examples
from sac_rag.training.config import TrainConfig
from sac_rag.training.fit_scorer import fit_scorer
from sac_rag.training.instructions import (
    read_instructions,
    without_repetition,
    write_instructions,
)
from sac_rag.training.objective import Objective, target_places
from sac_rag.training.prompts import HELD_OUT, TRAINED, prompt_format
from sac_rag.training.rows import Row, RowMaker, Source, Target, batched, padded_tokens
from sac_rag.training.trainer import claim, train

ROUNDING = 1e-4

ASKED = (
    ("Who counted ships?", "The lighthouse keeper"),
    ("What conducts better than iron?", "Copper"),
    ("When was the tower finished?", "1889"),
    ("What moves slowly?", "A glacier"),
    ("When did she plant barley?", "March"),
    ("In how many languages was it signed?", "two"),
    ("What do owls hear?", "a mouse"),
    ("When does the library stay open?", "Every Thursday"),
)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """SQuAD's layout: eight paragraphs in four articles."""
    articles = [
        {
            "title": f"article {number}",
            "paragraphs": [
                {
                    "context": PROSE[i],
                    "qas": [{"id": str(i), "question": asked, "answers": [{"text": answer}]}],
                }
                for i in (2 * number, 2 * number + 1)
                for asked, answer in [ASKED[i]]
            ],
        }
        for number in range(4)
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"data": articles}))
    return path


@pytest.fixture
def config(questions: Path) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "data": [str(questions)],
            "held_out_share": 0.25,
            "ratios": [2, 5],
            "chunks": [1, 3],
            "steps": 6,
            "batch_tokens": 300,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "scorer_texts": 4,
            "eval_every": 3,
            "eval_examples": 2,
            "eval_answers": 2,
            "compressor": {"lora_rank": 4, "lora_alpha": 8},
        }
    )


@pytest.fixture
def own(make_generator: Callable[..., Generator]) -> Generator:
    """A tiny Llama of this test's own, to be trained on."""
    return make_generator("llama")


def asked(number: int, *others: int) -> tuple[list[Chunk], list[Question]]:
    chunks = [Chunk(PROSE[i]) for i in (*others, number)]
    return chunks, [Question(str(number), ASKED[number][0], (ASKED[number][1],))]


def weights_of(generator: Generator) -> dict[str, Tensor]:
    """Copies of everything but LoRA."""
    named = generator.model.named_parameters()
    return {name: weight.clone() for name, weight in named if "lora_" not in name}


# --- rows


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
    with pytest.raises(ValueError, match="before the chunks cannot share a row, got 2"):
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
    prompt = prompt_format(name)
    maker = RowMaker(llama, [SPANS, prompt])
    chunks = [Chunk(PROSE[3], title="Weather"), Chunk(PROSE[0], title="A lighthouse")]
    _, questions = asked(0)
    (row,) = maker.rows(chunks, questions, prompt=1, draft="a draft")
    ids = [i for part in row.parts for i in (part.ids if isinstance(part, Source) else part)]
    target = row.targets[0]
    ids += target.ids[: len(target.ids) - target.predicted]
    shown = replace(prompt, user=prompt.user.replace("{draft}", "a draft"))
    rag = SacRAG(CachedCompressor(make_compressor(llama, "learned"), {}), prompt_format=shown)
    assert maker.prefix_ids == ()
    assert ids == rag.prompt_ids(questions[0].text, chunks)


def test_prompts_to_validate_in_are_not_trained_in() -> None:
    assert len(TRAINED) >= 12
    assert len(HELD_OUT) >= 4
    assert not set(TRAINED.values()) & set(HELD_OUT.values())
    with pytest.raises(ValueError, match=r"must be the name of one .* was: 'nothing'"):
        prompt_format("nothing")


def test_a_prompt_of_a_file_is_trained_in(tmp_path: Path) -> None:
    mine = PromptFormat(user="{chunks}\nQ: {question}")
    (tmp_path / "mine.json").write_text(mine.to_json())
    assert prompt_format(str(tmp_path / "mine.json")) == mine


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


# --- objective


@pytest.mark.parametrize("method", ["sac", "learned"])
def test_the_loss_through_moved_chunks_is_that_of_feeding_segment_by_segment(
    generator: Generator, method: str
) -> None:
    compressor = make_compressor(generator, method)
    maker = RowMaker(generator, SPANS)
    row = maker.ask(*asked(2, 5, 0))
    got = Objective(compressor, maker.prefix_ids).loss([row], 3)

    position, labels = len(maker.prefix_ids), row.targets[0]
    with torch.no_grad():
        cache = generator.model(torch.tensor([maker.prefix_ids])).past_key_values
        parts = [*row.parts, labels.ids]
        for part in parts:
            if isinstance(part, Source):
                (kv,) = compressor.compress_tokens([part.ids], start=position)
                keys, values, _ = kv.by_head()
                for layer in range(len(cache.layers)):
                    cache.update(keys[layer][None], values[layer][None], layer)
                position += len(part.ids)
                feed(generator, cache, compressor.cue[None], position - 1)  # type: ignore[index]
            else:
                logits = feed(generator, cache, generator.embed(part), position)
                position += len(part)
    count = labels.predicted
    expected = functional.cross_entropy(logits[-count - 1 : -1], torch.tensor(labels.ids[-count:]))
    torch.testing.assert_close(got, expected, atol=ROUNDING, rtol=ROUNDING)


def feed(generator: Generator, cache: Any, embeds: Tensor, position: int) -> Tensor:
    entries, tokens = cache.get_seq_length(), len(embeds)
    mask = torch.ones(1, 1, tokens, entries + tokens, dtype=torch.bool).tril(entries)
    logits: Tensor = generator.model(
        inputs_embeds=embeds[None],
        position_ids=torch.arange(position, position + tokens)[None],
        attention_mask=generator.attention_mask(mask),
        past_key_values=cache,
    ).logits[0]
    return logits


def test_questions_that_share_a_row_are_answered_as_if_alone(generator: Generator) -> None:
    compressor = make_compressor(generator, "learned")
    maker = RowMaker(generator, SPANS)
    objective = Objective(compressor, maker.prefix_ids)
    chunks = [Chunk(PROSE[0]), Chunk(PROSE[4])]
    questions = [asked(i)[1][0] for i in (0, 4, 6)]
    together = objective.predict([maker.ask(chunks, questions)], 3)
    alone = [objective.predict([maker.ask(chunks, [question])], 3) for question in questions]
    expected = torch.cat([predicted.logits for predicted in alone])
    torch.testing.assert_close(together.logits, expected, atol=ROUNDING, rtol=ROUNDING)
    assert int(together.first.sum()) == 3
    batch = objective.predict(
        [maker.ask(chunks, questions), maker.ask(*asked(7)), maker.ask(chunks[:1], questions[:1])],
        3,
    )
    torch.testing.assert_close(
        batch.logits[batch.row == 0], together.logits, atol=ROUNDING, rtol=ROUNDING
    )


def test_reading_as_text_is_plain_reading(llama: Generator) -> None:
    maker = RowMaker(llama, SPANS)
    row = maker.ask(*asked(3, 1))
    objective = Objective(make_compressor(llama, "learned"), maker.prefix_ids)
    got = objective.predict([row], 3, read_as="text")
    ids = list(maker.prefix_ids)
    for part in row.parts:
        ids += part.ids if isinstance(part, Source) else part
    ids += row.targets[0].ids
    with torch.no_grad():
        logits = llama.model(torch.tensor([ids])).logits[0]
    count = row.targets[0].predicted
    torch.testing.assert_close(got.logits, logits[-count - 1 : -1], atol=ROUNDING, rtol=ROUNDING)


def test_distractors_that_do_not_learn_change_the_loss_and_get_no_gradient(
    own: Generator,
) -> None:
    compressor = make_compressor(own, "learned")
    maker = RowMaker(own, SPANS)
    objective = Objective(compressor, maker.prefix_ids)
    chunks, questions = asked(0, 3)
    both = maker.ask(chunks, questions)
    one = maker.ask(chunks, questions, learns=[False, True])
    none = maker.ask(chunks, questions, learns=[False, False])
    losses = [objective.loss([row], 3) for row in (both, one, none)]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    lora = [w for name, w in compressor.weights.items() if "lora_" in name]
    of_both, of_one = (torch.autograd.grad(loss, lora, allow_unused=True) for loss in losses[:2])
    assert any(not torch.equal(a, b) for a, b in zip(of_both, of_one, strict=True))
    of_none = torch.autograd.grad(losses[2], lora, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in of_none)


@pytest.mark.parametrize("match", ["hidden", "logits"])
def test_matching_plain_reading_costs_nothing_where_reading_is_plain(
    own: Generator, match: Any
) -> None:
    maker = RowMaker(own, SPANS)
    prefix = own.tokenizer.decode(maker.prefix_ids)
    full = make_compressor(own, "full", sink=prefix)
    row = maker.ask(*asked(0))
    plain = Objective(full, maker.prefix_ids).loss([row], 1)
    matched = Objective(full, maker.prefix_ids, match=match).loss([row], 1)
    torch.testing.assert_close(matched, plain, atol=ROUNDING, rtol=ROUNDING)
    lossy = make_compressor(own, "learned", sink=prefix)
    without = Objective(lossy, maker.prefix_ids).loss([row], 3)
    assert Objective(lossy, maker.prefix_ids, match=match).loss([row], 3) > without + 1e-3


def test_matching_ratio_1_costs_nothing_there_and_teaches_the_others(own: Generator) -> None:
    maker = RowMaker(own, SPANS)
    compressor = make_compressor(own, "learned")
    row = maker.ask(*asked(0, 2))
    plain, taught = (
        Objective(compressor, maker.prefix_ids, match=match)  # type: ignore[arg-type]
        for match in ("none", "self")
    )
    assert torch.equal(taught.loss([row], 1), plain.loss([row], 1))
    with torch.no_grad():
        teacher, student = (plain.predict([row], ratio).logits.log_softmax(-1) for ratio in (1, 3))
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
    extra = taught.loss([row], 3) - plain.loss([row], 3)
    torch.testing.assert_close(extra.detach(), divergence, atol=ROUNDING, rtol=ROUNDING)
    lora = [w for name, w in compressor.weights.items() if "lora_B" in name]
    gradients = torch.autograd.grad(extra, lora, allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("method", ["sac", "learned"])
def test_one_batch_repeated_is_learned_and_the_model_stays_frozen(
    own: Generator, method: str
) -> None:
    compressor = make_compressor(own, method)
    maker = RowMaker(own, SPANS)
    objective = Objective(compressor, maker.prefix_ids)
    rows = [maker.ask(*asked(0, 2)), maker.ask(*asked(5))]
    frozen = weights_of(own)
    before = {name: weight.clone() for name, weight in compressor.weights.items()}
    trained = [w for name, w in compressor.weights.items() if name not in compressor.fitted]
    optimizer = torch.optim.AdamW(trained, lr=3e-2, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = objective.loss(rows, 3)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    changed = {n for n, w in compressor.weights.items() if not torch.equal(w, before[n])}
    # What the last layer makes of its attention goes into no key or value.
    idle = {name for name in compressor.weights if "layers.2.self_attn.q_proj" in name}
    assert changed == set(compressor.weights) - compressor.fitted - idle
    assert all(torch.equal(w, frozen[name]) for name, w in weights_of(own).items())


def test_places_are_those_before_each_predicted_token() -> None:
    row = Row((Source((1, 2)), (3,)), (Target((4, 5, 6), 2), Target((7, 8), 1)))
    (rows, columns), labels = target_places([row], 9)
    assert rows.tolist() == [0, 0, 0]
    assert columns.tolist() == [4, 5, 7]
    assert labels.tolist() == [5, 6, 8]


def test_branches_must_end_a_prompt_and_have_text(llama: Generator) -> None:
    for parts in ([Branches(((1,),)), [2]], [[1], Branches(((2,), ()))]):
        with pytest.raises(ValueError, match="branches must be the last part"):
            assemble([parts], llama)  # type: ignore[list-item]


# --- scorer


def test_attention_is_what_the_frozen_lm_gives_when_it_reads_the_text(llama: Generator) -> None:
    maker = RowMaker(llama, SPANS)
    row = maker.ask(*asked(0))
    *shared, source = row.parts
    assert isinstance(source, Source)
    before = [*maker.prefix_ids, *(i for part in shared for i in part)]  # type: ignore[union-attr]
    # Behind all that stands before it, a chunk is read as it is in the prompt.
    compressor = make_compressor(llama, "full", sink=llama.tokenizer.decode(before))
    assert compressor.sink_ids == before
    ((kv, attention),) = Objective(compressor, maker.prefix_ids).attention(row)
    ids = torch.tensor([[*before, *source.ids, *row.targets[0].ids]])
    with torch.no_grad(), showing_attention(llama.model):
        layers = llama.model(ids, output_attentions=True).attentions
    begin, end = len(before), len(before) + kv.num_tokens
    received = [layer[0, :, end:, begin:end].amax(1) for layer in layers]
    wanted = torch.stack(received).unflatten(1, (llama.kv_shape[1], -1)).amax(2)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(attention, wanted, atol=ROUNDING, rtol=0)


def chunks_read(compressor: SAC, *, times: int = 1) -> list[tuple[AnchorKV, Tensor]]:
    """What questions look at in each of the texts."""
    maker = RowMaker(compressor.generator, SPANS)
    objective = Objective(compressor, maker.prefix_ids)
    return [
        pair for i in range(len(ASKED)) for pair in objective.attention(maker.ask(*asked(i)))
    ] * times


@pytest.mark.parametrize("width", [0, 8])
def test_a_fitted_scorer_keeps_what_is_looked_at(own: Generator, width: int) -> None:
    compressor = make_compressor(own, "learned", scorer_width=width)
    assert isinstance(compressor, SAC)
    for name in compressor.fitted:
        compressor.weights[name].data.zero_()
    seen: list[int] = []
    chunks = chunks_read(compressor, times=20)

    def share_kept() -> float:
        kept = best = 0.0
        for kv, attention in chunks[: len(ASKED)]:
            keys, values, _ = kv.by_head()
            chosen = compressor.scores(torch.arange(kv.num_tokens), keys, values).detach()
            kept += float(attention.gather(2, top_anchors(chosen, 3)).sum())
            best += float(attention.gather(2, top_anchors(attention, 3)).sum())
        return kept / best

    before = share_kept()
    others = {n: w.clone() for n, w in compressor.weights.items() if n not in compressor.fitted}
    told = fit_scorer(compressor, chunks, on_progress=seen.append)
    assert seen == [1] * len(chunks)
    assert share_kept() > before + 0.1
    # The held-out chunks are copies of those learned from.
    assert told == pytest.approx(share_kept(), abs=0.05)
    assert all(torch.equal(compressor.weights[name], weight) for name, weight in others.items())


def test_a_scorer_goes_on_from_where_it_is(own: Generator) -> None:
    compressor = make_compressor(own, "learned")
    assert isinstance(compressor, SAC)
    features = torch.randn(
        *chunks_read(compressor)[0][1].shape[:1], 7, compressor.scorer.linear.shape[-1]
    )
    mean, scale = torch.randn(features[:, 0].shape), torch.rand(features[:, 0].shape) + 0.5
    before = compressor.scorer(features).detach()
    compressor.scorer.fold_normalization(-mean / scale, 1 / scale)
    inside = compressor.scorer((features - mean[:, None]) / scale[:, None]).detach()
    # A constant of each head chooses nothing.
    shift = (inside - before).mean(-1, keepdim=True)
    torch.testing.assert_close(inside - shift, before, atol=1e-4, rtol=1e-4)
    compressor.scorer.fold_normalization(mean, scale)
    torch.testing.assert_close(compressor.scorer(features).detach(), before, atol=1e-4, rtol=1e-4)


def test_a_score_depends_on_what_follows_and_on_nothing_far_away(own: Generator) -> None:
    compressor = make_compressor(own, "learned")
    assert isinstance(compressor, SAC)
    features = torch.randn(own.kv_shape[0], 20, compressor.scorer.linear.shape[-1])
    changed = features.clone()
    changed[:, 10] += 1
    differs = (compressor.scorer(changed) != compressor.scorer(features)).any(0).any(0)
    assert differs.nonzero().flatten().tolist() == list(range(6, 15))


def test_only_learned_anchors_have_a_scorer_and_it_needs_texts(own: Generator) -> None:
    uniform = make_compressor(own, "sac")
    with pytest.raises(ValueError, match="anchors='learned' has a scorer, was: anchors='uniform'"):
        fit_scorer(uniform, [])  # type: ignore[arg-type]
    learned = make_compressor(own, "learned")
    assert isinstance(learned, SAC)
    with pytest.raises(ValueError, match="at least one chunk"):
        fit_scorer(learned, [])
    # One is enough to go through everything.
    assert 0 < fit_scorer(learned, chunks_read(learned)[:1]) <= 1


def test_no_choice_keeps_more_than_one_that_knows_the_questions(own: Generator) -> None:
    compressor = make_compressor(own, "learned")
    maker = RowMaker(own, SPANS)
    objective = Objective(compressor, maker.prefix_ids)
    rows = [maker.ask(*asked(number)) for number in range(3)]
    figures = compare_anchors(objective, rows, [1, 4])
    of = {(row.anchors, row.ratio): row for row in figures}
    assert len(of) == 2 * 4
    for name in ("scorer", "read again", "every so many", "these questions"):
        # Where all is kept, all choices are one.
        assert of[name, 1].kept == pytest.approx(1)
        assert of[name, 1].loss == pytest.approx(of["scorer", 1].loss, abs=ROUNDING)
        assert of[name, 4].kept < 1 or name == "these questions"
    predicted = [objective.predict([row], 4) for row in rows]
    labels = sum(len(one.labels) for one in predicted)
    loss = sum(float(one.loss) * len(one.labels) for one in predicted) / labels
    assert of["scorer", 4].loss == pytest.approx(loss, abs=ROUNDING)
    with pytest.raises(ValueError, match="only learned anchors"):
        compare_anchors(Objective(make_compressor(own, "full"), maker.prefix_ids), rows, [4])


# --- data and config


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
    with pytest.raises(ValueError, match=r"no answer of .* stands in one of the run's prompts"):
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


def test_a_config_survives_json_and_names_what_it_does_not_know(config: TrainConfig) -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"unknown settings .*: zoom, compressor\.lora, format\.x"):
        TrainConfig.from_dict({"zoom": 1, "compressor": {"lora": 2}, "format": {"x": ""}})
    with pytest.raises(ValueError, match="compressor must be a table of settings, was: 5"):
        TrainConfig.from_dict({"compressor": 5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": []}, "ratios must be at least one ratio"),
        ({"ratios": [0]}, "ratios must be integers from 1"),
        ({"ratios": "5"}, "ratios must be a list, was one str"),
        ({"chunks": [0]}, "chunks must be integers from 1"),
        ({"data": []}, "data must be question files"),
        ({"text_share": 0.5}, "text must be files of prose"),
        ({"text_share": 2}, "text_share must be from 0 to 1, was: 2"),
        ({"text_first": 3}, "text must be files of prose, or text_first 0"),
        ({"text_first": -1, "text": ["a"]}, "text_first must be at least 0, was: -1"),
        ({"steps": 0}, "steps must be at least 1, was: 0"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"schedule": "step"}, "schedule must be one of cosine, .*was: 'step'"),
        ({"match": "all"}, "match must be one of none, hidden, logits, self, was: 'all'"),
        ({"data_shares": [1, 2]}, "data_shares must be one number for each file of data"),
        ({"instruction_share": 0.5}, "instructions must be files of instructions"),
        ({"held_out_share": 2}, "held_out_share must be from 0 to 1, was: 2"),
        ({"compressor": {"ratio": 0}}, "ratio must be an integer of at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict({"data": ["x.json"], **changes})


def test_settings_of_a_file_are_given_anew_one_by_one(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "run.toml", tmp_path / "run.json"
    toml.write_text('data = ["a.json"]\nsteps = 5\n[compressor]\nlora_rank = 8\n')
    as_json.write_text('{"data": ["a.json"], "steps": 5, "compressor": {"lora_rank": 8}}')
    assert TrainConfig.read(toml) == TrainConfig.read(as_json)
    overrides = ["steps=7", "compressor.attention=full", "ratios=[2,3]", "data=b.json", "chunks=4"]
    config = TrainConfig.complete(TrainConfig.read(toml), overrides)
    assert (config.steps, config.ratios, config.data, config.chunks) == (
        7,
        (2, 3),
        ("b.json",),
        (4,),
    )
    assert (config.compressor.lora_rank, config.compressor.attention) == (8, "full")
    with pytest.raises(ValueError, match="name=value, was: 'steps'"):
        TrainConfig.complete({}, ["steps"])
    with pytest.raises(ValueError, match="unknown settings of a training run: stepz"):
        TrainConfig.complete({}, ["stepz=1"])
    (tmp_path / "bad.toml").write_text("steps =")
    with pytest.raises(ValueError, match=r"bad\.toml cannot be parsed"):
        TrainConfig.read(tmp_path / "bad.toml")
    with pytest.raises(ValueError, match=r"must be a \.toml or \.json file"):
        TrainConfig.read(tmp_path / "run.yaml")


# --- whole runs


@pytest.mark.slow
def test_a_run_leaves_a_compressor_that_answers_and_an_account(
    own: Generator, config: TrainConfig, tmp_path: Path
) -> None:
    frozen = {name.replace(".base_layer", ""): w for name, w in weights_of(own).items()}
    events: list[dict[str, Any]] = []
    folder = train(config, tmp_path / "run", generator=own, on_event=events.append)
    for name, weight in weights_of(own).items():
        assert torch.equal(weight, frozen[name.replace(".base_layer", "")]), name
    loaded = checkpoint.load(folder, own)
    assert checkpoint.load_prompt_format(folder) == config.prompt_format
    assert loaded.config.sink == config.prompt_format.opening(own.tokenizer)
    assert loaded.compress([PROSE[0]])[0].dtype == torch.bfloat16
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["step"] for entry in history["steps"]] == [1, 2, 3, 4, 5, 6]
    assert [(v["step"], v["ratio"]) for v in history["validations"]] == [
        (3, 2), (3, 5), (6, 2), (6, 5),
    ]  # fmt: skip
    for validation in history["validations"]:
        assert 0 <= validation["f1"] <= 1
        content = validation["accuracy"] - validation["wrong_accuracy"]
        assert validation["content"] == pytest.approx(content)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {event["event"] for event in events} == {"scorer", "start", "step", "validation"}


@pytest.mark.slow
def test_a_run_begins_with_a_compressor_of_a_simpler_scorer_if_it_fits_its_own(
    make_generator: Callable[..., Generator], config: TrainConfig, tmp_path: Path
) -> None:
    linear = replace(config, steps=1, compressor=replace(config.compressor, scorer_width=0))
    first = train(linear, tmp_path / "first", generator=make_generator("llama"))
    on = replace(config, steps=1, init_from=str(first))
    folders = []
    for number in range(2):
        generator = make_generator("llama")
        torch.manual_seed(number)  # what the process drew before is nothing to a run
        folders.append(train(on, tmp_path / f"on-{number}", generator=generator))
    one, other = (checkpoint.read(folder)[1] for folder in folders)
    assert one["scorer.out.weight"].any()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="do not fit this model and config"):
        train(replace(on, scorer_texts=0), tmp_path / "as-is", generator=make_generator("llama"))


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits_as_an_uninterrupted_one(
    make_generator: Callable[..., Generator], config: TrainConfig, tmp_path: Path
) -> None:
    whole = train(config, tmp_path / "whole", generator=make_generator("llama"))

    def stop_at_four(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    parts = tmp_path / "parts"
    train(config, parts, generator=make_generator("llama"), on_event=stop_at_four)
    steps = json.loads((parts / "history.json").read_text())["steps"]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    events: list[dict[str, Any]] = []
    resumed = train(config, parts, generator=make_generator("llama"), on_event=events.append)
    assert events[0] == {"event": "start", "step": 4, "steps": 6}
    of_whole, of_parts = checkpoint.read(whole)[1], checkpoint.read(resumed)[1]
    assert of_whole.keys() == of_parts.keys()
    assert all(torch.equal(of_whole[name], of_parts[name]) for name in of_whole)
    losses = [
        [entry["loss"] for entry in json.loads((run / "history.json").read_text())["steps"]]
        for run in (tmp_path / "whole", parts)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_of_other_settings_is_not_continued(
    own: Generator, config: TrainConfig, tmp_path: Path
) -> None:

    limited = replace(config, max_minutes=1e-6)
    train(limited, tmp_path / "run", generator=own)
    steps = json.loads((tmp_path / "run" / "history.json").read_text())["steps"]
    assert len(steps) == 1, "a limit of time ends a run after the step at hand"
    with pytest.raises(ValueError, match=r"run with other settings \(learning_rate\)"):
        train(replace(config, learning_rate=1.0), tmp_path / "run", generator=own)


@pytest.mark.slow
def test_the_command_line_trains_saves_on_ctrl_c_and_goes_on(
    questions: Path, config: TrainConfig, tmp_path: Path
) -> None:
    model = make_model("qwen3")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    settings = tmp_path / "run.json"
    settings.write_text(json.dumps({**config.to_dict(), "steps": 10**6, "eval_every": 2}))
    command = [
        *(sys.executable, "-m", "sac_rag.cli", "train", "--config", str(settings)),
        *("--out", str(tmp_path / "run"), "--data", str(questions), "--json"),
        *(f"model={tmp_path / 'model'}", "dtype=float32"),
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(300, running.kill)
    watchdog.start()
    try:
        while not (tmp_path / "run" / "checkpoints" / "checkpoint-2").exists():
            assert running.poll() is None, running.communicate()
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        printed, errors = running.communicate()
    finally:
        watchdog.cancel()
    assert running.returncode == 0, errors
    assert json.loads(printed)["compressor"].endswith("compressor")
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    reached = history["steps"][-1]["step"]
    assert 2 <= reached < 10**6
    done = subprocess.run(
        [*command, "max_minutes=0.00001"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["steps"][-1]["step"] == reached + 1


# --- choices


@pytest.mark.slow
def test_choices_have_equal_time_so_an_interrupted_one_begins_anew(
    config: TrainConfig, tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    base = replace(
        config,
        model=str(tmp_path / "model"),
        dtype="float32",
        ratios=(5,),
        steps=3,
        eval_answers=0,
        max_minutes=60.0,
    )
    out, names = tmp_path / "choices", ("anchors: uniform", "no cue")

    def stop_in_the_second(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2 and (out / "001").exists():
            os.kill(os.getpid(), signal.SIGINT)

    outcomes = compare(base, out, names=names, seeds=(0,), on_event=stop_in_the_second)
    first = next(outcomes)
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)
    events: list[dict[str, Any]] = []
    again = list(compare(base, out, names=names, seeds=(0,), on_event=events.append))
    assert again[0] == first
    assert [e["step"] for e in events if e["event"] in ("start", "step")] == [0, 1, 2, 3]
    assert [(o.choice, o.seed, o.steps) for o in again] == [(name, 0, 3) for name in names]
    assert list(compare(base, out, names=names, seeds=(0,))) == again


def test_choices_that_cannot_be_compared_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_minutes must be the time each choice has, was: 0"):
        next(compare(config, tmp_path))
    timed = replace(config, max_minutes=1.0)
    with pytest.raises(ValueError, match=r"choices must be among as shipped, .*\['mask: none'\]"):
        next(compare(timed, tmp_path, names=["mask: none"]))
    claim(tmp_path, timed)
    with pytest.raises(ValueError, match=r"other settings \(max_minutes\)"):
        next(compare(replace(timed, max_minutes=2.0), tmp_path))


def test_the_table_of_choices_has_the_best_first_and_seeds_side_by_side() -> None:
    shared = {"tokens": 1200, "ratio": 5, "accuracy": 0.5, "first_accuracy": 0.2, "content": 0.25}
    outcomes = [
        Outcome(choice=name, seed=seed, steps=9 + seed, loss=loss, **shared)
        for seed, losses in enumerate(((2.0, 1.0), (1.0, 1.5)))
        for name, loss in zip(("worse", "better"), losses, strict=True)
    ]
    assert to_markdown(outcomes).splitlines()[2:] == [
        "| better | 9, 10 | 1200, 1200 | 1.000, 1.500 | 0.500, 0.500 | 0.250, 0.250 |",
        "| worse | 9, 10 | 1200, 1200 | 2.000, 1.000 | 0.500, 0.500 | 0.250, 0.250 |",
    ]
