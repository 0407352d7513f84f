"""The loss is that of plain reading where nothing is lost, and reaches what learns alone.

ROUNDING: float32 sums of a few layers in another order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor
from support.training import asked, weights_of
from torch import Tensor
from torch.nn import functional

from sac_rag.chunk import Chunk
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Branches, assemble
from sac_rag.prompts.format import SPANS
from sac_rag.training.objective import Objective, target_places
from sac_rag.training.rows import Row, RowMaker, Source, Target

ROUNDING = 1e-4


@pytest.mark.parametrize("method", ["sac", "learned", "icae", "x500"])
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


@pytest.mark.parametrize("anchors", ["learned", "uniform"])
def test_matching_ratio_1_costs_nothing_there_and_teaches_the_others(
    own: Generator, anchors: str
) -> None:
    maker = RowMaker(own, SPANS)
    compressor = make_compressor(own, "sac", anchors=anchors, anchor_embedding="none")
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


@pytest.mark.parametrize("method", ["sac", "learned", "icae", "x500"])
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
    # What the last layer makes of its attention goes into no key or value, only into ICAE's states.
    last = {name for name in compressor.weights if "layers.2.self_attn.q_proj" in name}
    idle = set() if method == "icae" else last
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
