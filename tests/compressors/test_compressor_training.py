"""Gradients reach what is trained and nothing else; training one compressor changes no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from torch import Tensor
from torch.autograd import backward

from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Part, assemble

SINK = "<|im_start|>system\n"


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    """A compressor that no test changes."""
    return make_compressor(llama, "sac")


@pytest.fixture
def own(make_generator: Callable[..., Generator]) -> Compressor:
    """A compressor on a generator of this test's own, to be changed."""
    return make_compressor(make_generator("llama"), "sac")


def loss_of(compressor: Compressor) -> Tensor:
    """Negative log likelihood of a continuation behind compressed text, as in training."""
    generator = compressor.generator
    before = generator.tokenize(SINK, special=True)
    segments = [torch.tensor(generator.tokenize(text)) for text in PROSE[:2]]
    kvs = compressor.encode(segments, [0, 0])
    target = generator.tokenize(PROSE[2])
    rows: list[list[Part]] = [[before, kvs[0], target], [before, kvs[1], kvs[0], target]]
    prompt = assemble(rows, generator, cue=compressor.cue)
    with generator.running() as model:
        logits = model(**prompt.inputs()).logits
    of_target = logits[:, -len(target) - 1 : -1].float()
    return torch.nn.functional.cross_entropy(of_target.transpose(1, 2), torch.tensor([target] * 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_reaches_what_is_trained_and_nothing_else(dtype: torch.dtype) -> None:
    compressor = make_compressor(Generator(make_model("llama").to(dtype), make_tokenizer()), "sac")
    backward(loss_of(compressor))
    reached = {
        id(weight)
        for weight in compressor.weights.values()
        if weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any()
    }
    # The last layer's queries come after every key and value: nothing that is kept needs them.
    expected = {
        id(weight)
        for name, weight in compressor.weights.items()
        if "layers.2.self_attn.q" not in name
    }
    assert reached == expected
    model = compressor.generator.model
    assert {id(p) for p in model.parameters() if p.grad is not None} <= reached


def test_one_batch_repeated_is_learned_and_the_model_stays_frozen(own: Compressor) -> None:
    trained = {id(weight) for weight in own.weights.values()}
    frozen = {
        name: weight.detach().clone()
        for name, weight in own.generator.model.named_parameters()
        if id(weight) not in trained
    }
    before = {name: weight.detach().clone() for name, weight in own.weights.items()}
    identity = dict(own.generator.identity)
    optimizer = torch.optim.AdamW(own.weights.values(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(own)
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    now = dict(own.generator.model.named_parameters())
    assert len(frozen) == 3 + 9 * 3
    assert all(torch.equal(now[name], weight) for name, weight in frozen.items())
    assert losses[0] > losses[5] > losses[-1]
    assert all(
        torch.equal(own.weights[name], weight) == ("layers.2.self_attn.q" in name)
        for name, weight in before.items()
    )
    assert own.generator.identity == identity


def test_training_one_compressor_leaves_another_on_the_same_model_alone(own: Compressor) -> None:
    other = make_compressor(own.generator, "sac", ratio=2)
    before = other.compress(PROSE[:2])
    optimizer = torch.optim.AdamW(own.weights.values(), lr=0.1)
    backward(loss_of(own))
    optimizer.step()
    assert all(weight.grad is None for weight in other.weights.values())
    for one, two in zip(other.compress(PROSE[:2]), before, strict=True):
        assert one.bit_equal(two)


def test_compressing_keeps_no_graph(own: Compressor) -> None:
    (kv,) = own.compress([PROSE[0]])
    assert not kv.keys.requires_grad
    assert not kv.values.requires_grad
