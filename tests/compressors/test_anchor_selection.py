"""Surprisal and attention are those of the frozen LM, and anchors follow them.

ROUNDING: float32 sums of one layer in another order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor

from sac_rag.compressors.anchor_selection import attention_when_read_again, surprisal, top_anchors
from sac_rag.lm.generator import Generator

ROUNDING = 1e-4


def test_surprisal_is_the_negative_log_probability_of_each_token(generator: Generator) -> None:
    sink = generator.tokenize("<|im_start|>system\n", special=True)
    tokens = torch.tensor(generator.tokenize(PROSE[0]))
    got = surprisal(generator, sink, tokens)
    with torch.no_grad():
        logits = generator.model(torch.tensor([[*sink, *tokens.tolist()]])).logits[0]
    chances = logits.softmax(-1)
    expected = [-chances[len(sink) + i - 1, token].log() for i, token in enumerate(tokens)]
    torch.testing.assert_close(got, torch.stack(expected), atol=ROUNDING, rtol=ROUNDING)


def test_without_a_sink_the_first_token_is_the_most_surprising(llama: Generator) -> None:
    tokens = torch.tensor(llama.tokenize(PROSE[0]))
    got = surprisal(llama, [], tokens)
    assert got[0] == torch.inf
    assert got[1:].isfinite().all()


def test_attention_is_the_most_that_the_second_reading_pays(make_generator: Any) -> None:
    generator, eager = make_generator("qwen3"), make_generator("qwen3", "eager")
    sink = generator.tokenize("<|im_start|>system\n", special=True)
    tokens = torch.tensor(generator.tokenize(PROSE[1]))
    got = attention_when_read_again(generator, sink, tokens)
    again = generator.tokenize("\n\nRepeat the text:\n")
    ids = [*sink, *tokens.tolist(), *again, *tokens.tolist()]
    with torch.no_grad():
        attentions = eager.model(torch.tensor([ids]), output_attentions=True).attentions
    begin, end = len(sink), len(sink) + len(tokens)
    layers, kv_heads, _ = generator.kv_shape
    assert got.shape == (layers, kv_heads, len(tokens))
    for layer in range(layers):
        for head in range(kv_heads):
            group = attentions[layer][0, 2 * head : 2 * head + 2, end:, begin:end]
            expected = group.amax(dim=(0, 1))
            torch.testing.assert_close(got[layer, head], expected, atol=ROUNDING, rtol=ROUNDING)


def test_measuring_leaves_the_model_as_it_was(make_generator: Any) -> None:
    generator = make_generator("llama")
    ids = torch.tensor([generator.tokenize(PROSE[2])])
    before = generator.model(ids).logits
    usual = generator.model.config._attn_implementation
    attention_when_read_again(generator, [], ids[0])
    assert generator.model.config._attn_implementation == usual
    assert torch.equal(generator.model(ids).logits, before)


@pytest.mark.parametrize(
    ("anchors", "measure"),
    [("surprisal", surprisal), ("attention", attention_when_read_again)],
)
def test_anchors_are_the_most_salient_tokens(llama: Generator, anchors: str, measure: Any) -> None:
    changes = {} if anchors == "surprisal" else {"anchor_embedding": "none", "attention": "causal"}
    compressor = make_compressor(llama, "sac", anchors=anchors, **changes)
    ids = llama.tokenize(PROSE[4])
    (kv,) = compressor.compress_tokens([ids])
    expected = top_anchors(measure(llama, compressor.sink_ids, torch.tensor(ids)), 3)
    _, _, positions = kv.by_head()
    assert torch.equal(positions, expected.int().expand_as(positions))


def test_learned_anchors_are_the_tokens_of_the_highest_scores(llama: Generator) -> None:
    compressor = make_compressor(llama, "learned")
    ids = llama.tokenize(PROSE[3])
    (everything,) = compressor.at_ratio(1).compress_tokens([ids])
    every_key, every_value, _ = everything.by_head()
    scores = compressor.scores(torch.arange(len(ids)), every_key, every_value)  # type: ignore[attr-defined]
    (kv,) = compressor.compress_tokens([ids])
    # Of two equal scores, those of a word that comes twice, the later one counts.
    scores = scores + 1e-5 * torch.arange(len(ids))
    kept = top_anchors(scores, 3)
    keys, values, positions = kv.by_head()
    assert torch.equal(positions, kept.int())
    assert kept.unique(dim=1).shape[1] > 1, "all heads chose alike: the test tells nothing"
    index = kept[..., None].expand(-1, -1, -1, kv.head_dim)
    assert torch.equal(keys, every_key.gather(2, index))
    assert torch.equal(values, every_value.gather(2, index))
    # And they stand in the order of their scores.
    of_entry = scores.flatten(0, 1)[kv.heads.long(), kv.positions.long()]
    for head in range(6):
        assert of_entry[kv.heads == head].diff().max() < 0


@pytest.mark.parametrize("budget", ["uniform", "layers", "shared"])
def test_of_a_word_that_comes_again_the_later_one_is_kept_first(
    llama: Generator, budget: str
) -> None:
    """To the first layer all of them are the same except for rounding, which must not decide."""
    compressor = make_compressor(llama, "learned", scorer_width=0, budget=budget, ratio=1)
    (kv,) = compressor.compress_tokens([[60] * 20])
    for head in (0, 1):
        assert kv.positions[kv.heads == head].tolist() == list(range(20))[::-1]


@pytest.mark.parametrize("anchors", ["attention", "learned"])
def test_anchors_of_each_head_cannot_be_marked_beforehand(llama: Generator, anchors: str) -> None:
    for changes in ({"anchor_embedding": "shared"}, {"attention": "anchors"}):
        with pytest.raises(ValueError, match="chosen for each head apart"):
            settings = {"anchor_embedding": "none", "attention": "causal", **changes}
            make_compressor(llama, "sac", anchors=anchors, **settings)


def test_a_vector_per_slot_is_added_to_that_anchor_and_serves_one_ratio(llama: Generator) -> None:
    compressor = make_compressor(llama, "sac", anchor_embedding="slot", segment_tokens=30)
    assert compressor.weights["anchor_embedding"].shape == (10, 48)
    tokens = torch.tensor(llama.tokenize(PROSE[5])[:20])
    added = compressor.layout(tokens).embeds - llama.embed(tokens)
    torch.testing.assert_close(added[1::3], compressor.weights["anchor_embedding"][:7])
    assert not added[0::3].any()
    with pytest.raises(ValueError, match="'slot' has one vector per anchor at ratio 3"):
        compressor.at_ratio(5)
