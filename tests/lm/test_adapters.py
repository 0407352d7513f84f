"""Adapters are on only where they were asked for, whatever was interrupted, and leave unused."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.interrupts import interruptions
from support.models import PROSE, elsewhere, make_compressor, make_model, make_tokenizer
from torch import Tensor

from sac_rag.cached import CachedCompressor
from sac_rag.compressors.anchor_selection import attention_when_read_again, eager_attention
from sac_rag.compressors.base import Compressor
from sac_rag.errors import UnsupportedModelError
from sac_rag.kv import AnchorKV
from sac_rag.lm.adapters import AdapterName, Adapters
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.decode import Decoder
from sac_rag.prompts.format import SPANS
from sac_rag.prompts.generate import Decoding

IDS = torch.tensor([[5, 300, 17, 44, 301, 8]])
LORA_ARGUMENTS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
LORA = LoraConfig(**LORA_ARGUMENTS)
SHORT = Decoding(max_new_tokens=2)


@pytest.fixture
def own(make_generator: Callable[..., Generator]) -> Generator:
    return make_generator("llama")


@torch.no_grad()
def logits(generator: Generator) -> Tensor:
    found: Tensor = generator.model(IDS).logits
    return found


def add(generator: Generator, name: str, seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in generator.add_adapter(name, LORA):
            weight.copy_(torch.randn(weight.shape, generator=random) * 0.3)


def run(generator: Generator, adapter: str | None = None) -> Tensor:
    with generator.running(adapter):
        return logits(generator)


def adapters_of(generator: Generator) -> set[str]:
    """Names of adapters that have weights in the model."""
    return {
        name.split("lora_A.")[1].split(".")[0]
        for name, _ in generator.model.named_parameters()
        if "lora_A." in name
    }


# --- Ctrl-C


def test_an_interrupted_run_leaves_the_model_frozen_and_unlocked(own: Generator) -> None:
    before = logits(own)
    add(own, "a")
    with_a = run(own, "a")
    inside = [run, Generator.running, Generator._restore, Adapters, contextlib]
    for line in interruptions(lambda: run(own, "a"), inside, stride=3):
        assert torch.equal(elsewhere(lambda: run(own)), before), line
        assert torch.equal(logits(own), before), line
    assert torch.equal(run(own, "a"), with_a)


def test_an_interrupted_change_from_one_adapter_to_another_is_repeated(own: Generator) -> None:
    before = logits(own)
    add(own, "a", seed=1)
    add(own, "b", seed=2)
    with_a, with_b = run(own, "a"), run(own, "b")

    def nested() -> None:
        with own.running("a"), own.running("b"), own.running():
            pass

    for line in interruptions(nested, [Generator.running, Adapters], stride=31):
        assert torch.equal(run(own, "b"), with_b), line
        assert torch.equal(run(own, "a"), with_a), line
        assert torch.equal(run(own), before), line


def test_blocks_inside_one_another_each_have_the_adapter_they_asked_for(own: Generator) -> None:
    before = logits(own)
    add(own, "a")
    with own.running("a"):
        with_a = logits(own)
        with own.running():
            assert torch.equal(logits(own), before)
        assert torch.equal(logits(own), with_a)
    assert torch.equal(logits(own), before)


def test_an_interrupted_add_leaves_nothing_behind(own: Generator) -> None:
    before = logits(own)
    layers = torch.nn.Module.named_parameters
    for line in interruptions(
        lambda: add(own, "a"), [Adapters.add, Adapters.switch, layers], stride=61
    ):
        if "a" in adapters_of(own):  # interrupted behind its end
            own._adapters._delete("a")
        assert torch.equal(elsewhere(lambda: run(own)), before), line
        assert not adapters_of(own)
        add(own, "b")
        own._adapters._delete("b")
    add(own, "c")
    assert not torch.equal(run(own, "c"), before)


@pytest.mark.parametrize("method", ["learned", "full"])
def test_interrupted_answers_and_precompression_leave_the_next_ones_right(
    own: Generator, method: str
) -> None:
    """Two pipelines over one model: what one was interrupted in is no matter of the other."""
    adapted = make_compressor(own, "learned", generator_adapter_rank=2)
    other = make_compressor(own, method)
    expected_kv = other.compress(PROSE[:1])[0]
    store: dict[str, AnchorKV] = {}
    rag = SacRAG(CachedCompressor(adapted, store), prompt_format=SPANS)
    expected = rag.answer("What is it?", PROSE[:2], SHORT).text

    def work() -> None:
        store.clear()
        rag.precompress(PROSE[:1])
        rag.answer("What is it?", PROSE[:2], SHORT)
        for _ in rag.stream("What is it?", PROSE[:2], SHORT):
            pass

    work()
    kept = dict(store)
    inside = [Generator.running, Adapters, Compressor._encoder, Decoder, CachedCompressor]
    for line in interruptions(work, inside, stride=23):
        assert elsewhere(lambda: other.compress(PROSE[:1])[0]).bit_equal(expected_kv), line
        assert all(kv.bit_equal(kept[key]) for key, kv in store.items()), line
    assert rag.answer("What is it?", PROSE[:2], SHORT).text == expected


def test_an_interrupted_switch_to_eager_attention_is_undone(own: Generator) -> None:
    tokens = torch.tensor(own.tokenize(PROSE[0]))

    def work() -> None:
        attention_when_read_again(own, own.tokenize("a"), tokens)

    usual = own.model.config._attn_implementation
    for line in interruptions(work, [attention_when_read_again, eager_attention, contextlib]):
        with own.running() as model:
            assert model.config._attn_implementation == usual, line


# --- lifetime


def test_the_weights_of_dropped_pipelines_leave_the_model(own: Generator) -> None:
    before = logits(own)
    rags = [
        SacRAG(CachedCompressor(make_compressor(own, "learned", generator_adapter_rank=2), {}))
        for _ in range(3)
    ]
    last = rags[-1].compressor.inner
    expected = last.compress(PROSE[:1])[0]
    assert len(adapters_of(own)) == 6
    del rags[:2]
    gc.collect()
    with own.running():
        pass
    assert len(adapters_of(own)) == 2
    assert last.compress(PROSE[:1])[0].bit_equal(expected)
    del rags, last
    gc.collect()
    with own.running():
        pass
    assert not adapters_of(own)
    assert not getattr(own.model, "peft_config", None)
    assert torch.equal(logits(own), before)
    assert make_compressor(own, "learned").compress(PROSE[:1])


def test_a_stream_keeps_its_adapter_when_its_pipeline_is_dropped(own: Generator) -> None:
    def make() -> SacRAG:
        compressor = make_compressor(own, "learned", generator_adapter_rank=2)
        return SacRAG(CachedCompressor(compressor, {}), prompt_format=SPANS)

    decoding = Decoding(max_new_tokens=8)
    expected = make().answer("What is it?", PROSE[:2], decoding).text
    stream = make().stream("What is it?", PROSE[:2], decoding)
    gc.collect()
    assert "".join(stream) == expected


def test_a_name_is_not_kept_alive_by_its_adapter(own: Generator) -> None:
    name = AdapterName("a")
    add(own, name)
    alive = weakref.ref(name)
    del name
    gc.collect()
    assert alive() is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_that_has_an_adapter_is_refused_with_the_remedy() -> None:
    model = make_model("llama")
    model.add_adapter(LORA, adapter_name="tuned")
    with pytest.raises(UnsupportedModelError, match=r"no adapters, has: tuned; merge them"):
        Generator(model, make_tokenizer())
    merged = get_peft_model(make_model("llama"), LoraConfig(**LORA_ARGUMENTS)).merge_and_unload()
    assert Generator(merged, make_tokenizer())
