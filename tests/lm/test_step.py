"""A step writes the tokens that transformers' forward pass writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor, next_tokens
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from sac_rag.errors import UnsupportedModelError
from sac_rag.lm import quantized
from sac_rag.lm.generator import Generator
from sac_rag.lm.step import Step
from sac_rag.prompts.assemble import Prompt, assemble
from sac_rag.prompts.decode import Decoder
from sac_rag.prompts.decoding import Decoding

GREEDY = Decoding(max_new_tokens=70)
KINDS = tuple(quantized.PACKERS)
# Sums in another order.
TOLERANCE = 1e-4


def prompt_of(generator: Generator, method: str, rows: int = 1) -> Prompt:
    kvs = make_compressor(generator, method).compress(list(PROSE[:3]))
    ids = generator.tokenize("\n\nQ: Who counted?\nA:")
    return assemble([[*kvs[: row + 1], ids] for row in range(rows)], generator)


def logits_of_steps(generator: Generator, prompt: Prompt, count: int) -> list[Tensor]:
    """Logits of every row at each step, behind tokens that are always the same."""
    decoder = Decoder(generator)
    decoder.join(prompt, GREEDY)
    rows = decoder._rows
    assert rows is not None
    noted = []
    for number in range(count):
        rows.tokens = torch.full_like(rows.tokens, 7 + number)
        rows.spare -= 1
        with torch.no_grad():
            noted.append(decoder._logits(generator.model, rows))
        rows.positions = rows.positions + 1
    return noted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["full", "shared"])
def test_logits_are_those_of_the_forward_pass(
    make_generator: Any, generator: Generator, method: str, attention: str
) -> None:
    own = make_generator(generator.model.config.model_type, attention)
    assert Step.is_supported(own.model)
    got = logits_of_steps(own, prompt_of(own, method, rows=3), 5)
    own.model.register_forward_hook(lambda module, args, output: None)
    assert own.step(None) is None  # a hook must be called
    expected = logits_of_steps(own, prompt_of(own, method, rows=3), 5)
    for step, forward in zip(got, expected, strict=True):
        assert (step - forward).abs().max() <= TOLERANCE * forward.abs().max()


# --- Fewer bits


@pytest.mark.parametrize(("kind", "largest"), [("float16", 1e-3), ("int8", 0.02), ("int4", 0.15)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_is_the_matrix_in_fewer_bits(
    kind: str, largest: float, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96, bias=bias, dtype=dtype)
    inputs = torch.randn(3, 1, 64, dtype=dtype)
    got = quantized.packed(linear, kind)(inputs)
    exact = functional.linear(inputs, linear.weight, linear.bias)
    assert got.shape == exact.shape
    assert got.dtype == dtype
    error = (got.float() - exact.float()).norm() / exact.float().norm()
    assert error <= largest + (dtype == torch.bfloat16) * 0.01


def test_values_of_4_bits_are_kept() -> None:
    levels = torch.randint(0, 16, (32, 2, 32)).float()
    levels[:, :, 0], levels[:, :, 1] = 0, 15
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = (levels * 0.25 - 2).flatten(1)
    inputs = torch.eye(64)[:, None]
    assert torch.equal(quantized.packed(linear, "int4")(inputs)[:, 0], linear.weight.T)


def small_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=1,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_first_tokens_have_the_bits_of_exact_weights(kind: str, tokenizer: Any) -> None:
    exact = Generator(small_model(), tokenizer)
    packed = Generator(small_model(), tokenizer, weights=kind)
    # So an entry of one is an entry of the other.
    assert packed.identity == exact.identity
    ours, theirs = (make_compressor(one, "full") for one in (packed, exact))
    assert ours.fingerprint == theirs.fingerprint
    for one, other in zip(ours.compress(PROSE[:2]), theirs.compress(PROSE[:2]), strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    logits = [logits_of_steps(g, prompt_of(g, "full"), 4) for g in (packed, exact)]
    for got, expected in zip(*logits, strict=True):
        assert not torch.equal(got, expected)
        assert (got - expected).norm() <= 0.2 * expected.norm()
    firsts = [next(next_tokens(g, prompt_of(g, "full"), GREEDY)) for g in (packed, exact)]
    assert torch.equal(*firsts)


def test_weights_without_a_kernel_are_refused(tokenizer: Any, llama: Generator) -> None:
    with pytest.raises(ValueError, match="one of float16, int8, int4, was: 'int3'"):
        Generator(small_model(), tokenizer, weights="int3")
    with pytest.raises(ValueError, match="multiple of 32 inputs, one has 48; give 'int8'"):
        Step(llama.model, "int4")
    with pytest.raises(ValueError, match="needs device='cpu', was: meta"):
        quantized.require_usable("int8", torch.device("meta"))
    hooked = small_model()
    hooked.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(UnsupportedModelError, match="without hooks, was: LlamaForCausalLM"):
        Generator(hooked, tokenizer, weights="int8")
