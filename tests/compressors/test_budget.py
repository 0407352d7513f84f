"""Budgets say how many entries each head keeps, and one order of entries serves every ratio."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import PROSE, make_compressor
from support.slow_reading import read_slowly
from torch import Tensor

from sac_rag.compressors.anchor_selection import num_anchors
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.budget import joint_order, num_entries, ranked_entries
from sac_rag.compressors.sac import SAC
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Part, assemble
from sac_rag.prompts.generate import Decoding, Generation

TOLERANCE = 1e-4  # as in test_exactness
LAYERS, KV_HEADS = 3, 2  # of the tiny models
HEADS = LAYERS * KV_HEADS
BUDGETS: Any = ("shared", "layers", "uniform")
NEVER = -1e4  # logarithm of the attention of a head that looks up nothing


@st.composite
def texts(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores of a text's tokens, and masses of the heads; quarters, so that many are equal."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 30)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    spread = draw(st.sampled_from([0, 1, 8, 100]))
    scores = torch.randint(-spread, spread + 1, shape, generator=random) / 4
    return scores, torch.randint(-4, 5, shape[:2], generator=random) / 4


STEPS = st.sampled_from([(6, 1), (6, 2), (6, 6), (1, 1), (4, 4), (90, 1), (90, 3), (90, 90)])


# --- one order


@settings(deadline=None)
@given(text=texts(), budget=st.sampled_from(BUDGETS))
def test_every_entry_comes_once_and_each_heads_by_falling_score(
    text: tuple[Tensor, Tensor], budget: Any
) -> None:
    scores, mass = text
    tokens = scores.shape[-1]
    order = ranked_entries(scores, mass, budget)
    assert torch.equal(order.sort().values, torch.arange(scores.numel()))
    for head, of_head in enumerate(scores.flatten(0, 1).tolist()):
        ranking = (order % tokens)[order // tokens == head].tolist()
        assert ranking == sorted(range(tokens), key=lambda token: -of_head[token])


@settings(deadline=None)
@given(text=texts())
def test_shared_entries_come_by_the_attention_that_they_are_expected_to_receive(
    text: tuple[Tensor, Tensor],
) -> None:
    scores, mass = text
    attention = scores.double().softmax(-1) * mass.double().exp()[..., None]
    worth = attention.log().flatten()[ranked_entries(scores, mass, "shared")]
    assert (worth.diff() < 1e-4).all()


@settings(deadline=None)
@given(text=texts())
def test_heads_of_a_layer_that_share_a_budget_get_their_next_entries_together(
    text: tuple[Tensor, Tensor],
) -> None:
    scores, mass = text
    layers, kv_heads, tokens = scores.shape
    order = ranked_entries(scores, mass, "layers")
    turns = (order // tokens).view(-1, kv_heads)
    assert torch.equal(turns, turns[:, :1] + torch.arange(kv_heads))
    assert not (turns[:, 0] % kv_heads).any()
    # By what they receive on average.
    attention = scores.double().softmax(-1) * mass.double().exp()[..., None]
    worth = attention.flatten()[order].view(-1, kv_heads).mean(-1).log()
    assert (worth.diff() < 1e-4).all()
    for turn in range(0, layers * tokens, 3):
        counts = torch.bincount(order[: turn * kv_heads] // tokens, minlength=layers * kv_heads)
        assert (counts.view(layers, kv_heads) == counts.view(layers, kv_heads)[:, :1]).all()


@settings(deadline=None)
@given(text=texts())
def test_uniform_heads_take_turns_whatever_they_are_worth(text: tuple[Tensor, Tensor]) -> None:
    scores, mass = text
    heads, tokens = mass.numel(), scores.shape[-1]
    order = ranked_entries(scores, mass, "uniform")
    assert torch.equal(order, ranked_entries(scores, mass * 0, "uniform"))
    assert torch.equal(order // tokens, torch.arange(heads).repeat(tokens))


@settings(deadline=None)
@given(text=texts(), shift=st.integers(-20, 20), budget=st.sampled_from(BUDGETS))
def test_only_differences_count(text: tuple[Tensor, Tensor], shift: int, budget: Any) -> None:
    """Of scores within a head; of masses among heads."""
    scores, mass = text
    of_heads = torch.arange(mass.numel()).view(mass.shape) % 3 * shift
    order = ranked_entries(scores, mass, budget)
    moved = ranked_entries(scores + of_heads[..., None], mass + shift, budget)
    # Equal except for rounding is no order: what is worth the same may change places.
    attention = (scores.double().log_softmax(-1) + mass.double()[..., None]).flatten()
    if budget == "shared":
        assert (attention[order] - attention[moved]).abs().max() < 1e-4
    elif budget == "uniform":
        assert torch.equal(order, moved)


@pytest.mark.parametrize("num_tokens", [1, 3, 40, 509])
@pytest.mark.parametrize("budget", BUDGETS)
def test_heads_that_are_worth_the_same_take_turns(num_tokens: int, budget: Any) -> None:
    scores = torch.randn(num_tokens, generator=torch.Generator().manual_seed(0))
    alike = scores.expand(LAYERS, KV_HEADS, -1)
    order = ranked_entries(alike, torch.full((LAYERS, KV_HEADS), 1.5), budget)
    for count in range(0, len(order), 7):
        counts = torch.bincount(order[:count] // num_tokens, minlength=HEADS)
        assert counts.max() - counts.min() <= 1


# --- how many


@given(heads_and_step=STEPS, num_tokens=st.integers(1, 1000), ratio=st.integers(1, 200))
def test_a_segment_keeps_its_tokens_by_the_ratio_for_every_head(
    heads_and_step: tuple[int, int], num_tokens: int, ratio: int
) -> None:
    heads, step = heads_and_step
    count = num_entries(num_tokens, ratio, heads, step)
    assert count % step == 0
    assert step <= count <= heads * num_tokens
    assert abs(count - heads * num_tokens / ratio) <= step
    assert num_entries(num_tokens, 1, heads, step) == heads * num_tokens
    assert num_entries(num_tokens, ratio + 1, heads, step) <= count
    if step == heads:
        assert count == heads * num_anchors(num_tokens, ratio)


@pytest.mark.parametrize("method", ["full", "sac", "learned", "shared", "layers"])
def test_a_compressed_chunk_has_as_many_entries_as_was_said(llama: Generator, method: str) -> None:
    """Over the borders of segments, too."""
    changes = {"segment_tokens": 8}
    if method == "layers":
        compressor = make_compressor(llama, "learned", budget="layers", **changes)
    else:
        compressor = make_compressor(llama, method, **changes)
    lengths = [1, 2, 7, 8, 9, 16, 17, 23]
    chunks = [[3 + (7 * i + length) % 500 for i in range(length)] for length in lengths]
    for ratio in (1,) if method == "full" else (1, 2, 5, 15, 100):
        at_ratio = compressor.at_ratio(ratio)
        for length, kv in zip(lengths, at_ratio.compress_tokens(chunks), strict=True):
            assert kv.num_entries == at_ratio.num_entries(length)
            assert kv.num_entries == compressor.num_entries(length, ratio)
            assert kv.num_tokens == length


# --- segments in one order


@settings(deadline=None, max_examples=100)
@given(
    heads_and_step=STEPS,
    num_tokens=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    least=st.integers(1, 20),
    ratios=st.lists(st.integers(1, 130), min_size=1, max_size=5),
)
def test_a_prefix_of_the_joint_order_is_the_prefixes_of_its_segments(
    heads_and_step: tuple[int, int], num_tokens: list[int], least: int, ratios: list[int]
) -> None:
    heads, step = heads_and_step
    entries = [num_entries(tokens, least, heads, step) for tokens in num_tokens]
    order = joint_order(num_tokens, entries, heads, step)
    assert torch.equal(order.sort().values, torch.arange(sum(entries)))
    begins = [sum(entries[:i]) for i in range(len(entries))]
    for ratio in (least, *(least + more for more in ratios)):
        counts = [num_entries(tokens, ratio, heads, step) for tokens in num_tokens]
        expected = [
            begin + i for begin, count in zip(begins, counts, strict=True) for i in range(count)
        ]
        assert order[: len(expected)].sort().values.tolist() == expected
    for begin, count in zip(begins, entries, strict=True):
        own = order[(order >= begin) & (order < begin + count)]
        assert torch.equal(own, torch.arange(begin, begin + count))


# --- one compression for every ratio


@pytest.mark.parametrize("stored_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("segment_tokens", [510, 8])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_first_entries_are_the_bits_of_compressing_at_a_higher_ratio(
    llama: Generator, budget: str, segment_tokens: int, stored_dtype: str
) -> None:
    compressor = make_compressor(
        llama, "learned", budget=budget, segment_tokens=segment_tokens, stored_dtype=stored_dtype
    )
    assert compressor.is_nested
    texts = ["Owls.", " ".join(PROSE[2:4])]
    higher = {r: compressor.at_ratio(r).compress(texts) for r in (3, 15, 1000)}
    for lower in (1, 2):
        whole = compressor.at_ratio(lower).compress(texts)
        for ratio, direct in higher.items():
            for kv, other in zip(whole, direct, strict=True):
                assert kv.first(compressor.num_entries(kv.num_tokens, ratio)).bit_equal(other)


def test_anchors_that_are_marked_before_reading_are_of_one_ratio(llama: Generator) -> None:
    for method in ("sac", "full"):
        assert not make_compressor(llama, method).is_nested


@pytest.mark.parametrize("segment_tokens", [510, 8])
def test_a_prefix_of_a_chunk_has_the_first_entries_of_every_head(
    llama: Generator, segment_tokens: int
) -> None:
    """As each head of each segment ranks its tokens."""
    compressor: Any = make_compressor(llama, "shared", ratio=1, segment_tokens=segment_tokens)
    ids = llama.tokenize(PROSE[0])
    (kv,) = compressor.compress_tokens([ids])
    keys, values, _ = kv.by_head()
    for begin in range(0, len(ids), segment_tokens):
        end = min(begin + segment_tokens, len(ids))
        of_segment = (t[:, :, begin:end] for t in (keys, values))
        scores = compressor.scores(torch.arange(begin, end), *of_segment).detach().flatten(0, 1)
        for head in range(HEADS):
            inside = (kv.heads == head) & (kv.positions >= begin) & (kv.positions < end)
            ranked = scores[head][(kv.positions[inside] - begin).long()]
            # Words that come twice have equal scores; of them the later one is first.
            assert (ranked.diff() < 1e-4).all()


# --- what a budget does


def counts_of(compressor: Compressor, ratio: int, text: str = PROSE[0]) -> Tensor:
    (kv,) = compressor.at_ratio(ratio).compress([text])
    return kv.counts


def with_masses(compressor: Compressor, *of_heads: float) -> Compressor:
    """The same with other logarithms of the attention that each head pays."""
    weights = {name: weight.detach() for name, weight in compressor.weights.items()}
    masses = torch.tensor(of_heads).view(LAYERS, KV_HEADS)
    compressor.load_weights({**weights, "budget": masses})
    return compressor


@pytest.mark.parametrize("budget", ["shared", "layers"])
def test_heads_that_attend_more_keep_more_and_the_mean_stays(llama: Generator, budget: str) -> None:
    compressor = make_compressor(llama, "learned", budget=budget)
    step = {"shared": 1, "layers": KV_HEADS}[budget]
    tokens = len(llama.tokenize(PROSE[0]))
    for ratio in (2, 5):
        before = counts_of(with_masses(compressor, 0, 0, 0, 0, 0, 0), ratio)
        more = counts_of(with_masses(compressor, 0, 0, 3, 3, 0, 0), ratio)
        assert (more[1] > before[1]).all()
        assert (more[[0, 2]] <= before[[0, 2]]).all()
        assert more.sum() == before.sum()
        assert abs(int(more.sum()) - tokens * HEADS / ratio) <= step


def test_texts_differ_in_what_each_head_keeps_of_them(llama: Generator) -> None:
    shared = make_compressor(llama, "shared")
    of_texts = {tuple(kv.counts.flatten().tolist()) for kv in shared.compress(PROSE)}
    assert len(of_texts) > 4


def test_a_layers_heads_share_its_budget(llama: Generator) -> None:
    layers = with_masses(make_compressor(llama, "learned", budget="layers"), 0, 1, 2, 3, 4, 5)
    for ratio in (1, 2, 3, 5, 15):
        counts = counts_of(layers, ratio)
        assert torch.equal(counts[:, 0], counts[:, 1])
    assert counts_of(layers, 3)[:, 0].diff().min() > 0


def test_a_uniform_budget_is_the_same_number_in_every_head(llama: Generator) -> None:
    count = num_anchors(len(llama.tokenize(PROSE[0])), 3)
    assert counts_of(make_compressor(llama, "learned"), 3).eq(count).all()
    assert "budget" not in make_compressor(llama, "learned").weights


def test_the_same_weights_serve_every_budget(llama: Generator) -> None:
    shared: Any = make_compressor(llama, "shared")
    learned = make_compressor(llama, "learned")
    learned.load_weights({n: w for n, w in shared.weights.items() if n != "budget"})
    kvs: dict[str, list[AnchorKV]] = {}
    for budget in BUDGETS:
        other: SAC = shared.with_budget(budget)
        assert other.config.budget == budget
        assert other.weights is shared.weights
        kvs[budget] = other.compress(PROSE[:3])
    assert len({other.num_entries(19) for other in map(shared.with_budget, BUDGETS)}) > 1
    for kv, direct in zip(kvs["uniform"], learned.compress(PROSE[:3]), strict=True):
        assert kv.bit_equal(direct)
    # At ratio 1 budgets differ in the order alone.
    whole = [shared.with_budget(b).at_ratio(1).compress(PROSE[:1])[0].by_head() for b in BUDGETS]
    for other_whole in whole[1:]:
        assert all(map(torch.equal, other_whole, whole[0]))
    with pytest.raises(ValueError, match="budget='shared' needs fitted budgets"):
        learned.with_budget("shared")


@pytest.mark.parametrize("stored_dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    "of_heads",
    [
        (0, NEVER, 0, 0, 0, 0),
        (NEVER, NEVER, 0, 0, 0, 0),
        (0, 0, NEVER, NEVER, NEVER, NEVER),
        (NEVER, NEVER, NEVER, NEVER, NEVER, 0),
    ],
    ids=["a head", "the first layer", "the last layers", "all heads but one"],
)
@torch.no_grad()
def test_heads_and_layers_without_any_entry_can_be_read(
    llama: Generator, of_heads: tuple[float, ...], stored_dtype: str
) -> None:
    compressor = make_compressor(llama, "shared", ratio=7, stored_dtype=stored_dtype)
    kvs = with_masses(compressor, *of_heads).compress(PROSE[:2])
    for kv in kvs:
        assert not kv.counts.flatten()[torch.tensor(of_heads) == NEVER].any()
    full = make_compressor(llama, "full").compress(PROSE[2:3])
    ask = llama.tokenize("\nWho?")
    rows: list[list[Part]] = [[kvs[0], ask], [ask, kvs[1], ask, kvs[0], ask], [*full, ask], [ask]]
    # Rows of one prompt and of several: those with such chunks alone, and beside whole ones.
    for batch in (rows[:1], rows[:2], rows):
        logits = llama.model(**assemble(batch, llama, cue=compressor.cue).inputs()).logits[:, -1]
        for row, got in zip(batch, logits, strict=True):
            expected = read_slowly(llama, row, compressor.cue)[-1]
            assert (got - expected).abs().max() <= TOLERANCE
    generation = Generation(
        llama, assemble(rows, llama, cue=compressor.cue), Decoding(max_new_tokens=5)
    )
    for _ in generation:
        pass
    assert all(generation.texts)


def test_a_chunk_of_one_token_keeps_something(generator: Generator) -> None:
    for budget in BUDGETS:
        compressor = make_compressor(generator, "learned", budget=budget, ratio=100)
        (kv,) = compressor.compress(["a"])
        assert kv.num_entries == {"shared": 1, "layers": KV_HEADS, "uniform": HEADS}[budget]


def test_a_value_knows_its_mean_ratio(llama: Generator) -> None:
    text = " ".join(PROSE)
    for ratio in (2, 5, 15):
        (kv,) = make_compressor(llama, "shared", ratio=ratio).compress([text])
        assert kv.ratio == pytest.approx(ratio, rel=0.02)


def test_budgets_of_another_model_are_refused(llama: Generator) -> None:
    compressor = make_compressor(llama, "shared")
    weights = {**compressor.weights, "budget": torch.zeros(LAYERS, KV_HEADS + 1)}
    with pytest.raises(ValueError, match=r"'budget': expected shape \(3, 2\), got \(3, 3\)"):
        compressor.load_weights(weights)


def test_joining_keeps_the_order_that_is_asked_for(llama: Generator) -> None:
    kvs = make_compressor(llama, "shared").compress(PROSE[:2])
    count = sum(kv.num_entries for kv in kvs)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    joined, sorted_back = AnchorKV.join(kvs), AnchorKV.join([AnchorKV.join(kvs, order)])
    assert sorted_back.map(lambda t: t[order.argsort()]).bit_equal(joined)
