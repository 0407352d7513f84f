"""A token attends to exactly what it may, and a model that was wrapped is otherwise as it came."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import (
    ARCHITECTURES,
    PROSE,
    logits_of,
    make_compressor,
    make_model,
    make_tokenizer,
    next_tokens,
)
from support.slow_reading import read_slowly
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sac_rag.compressors.anchor_selection import attention_when_read_again
from sac_rag.compressors.full import read_plain
from sac_rag.kv import AnchorKV
from sac_rag.lm.attention import NAMES, Masks
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Branches, Part, Prompt, assemble
from sac_rag.prompts.generate import Decoding, Generation

TOLERANCE = 1e-4  # as in test_exactness
# bfloat16 has 8 binary digits; measured on these models: at most 0.03 of the largest logit.
BFLOAT16 = 0.06

WHO, WHY = [60, 61, 62], [70, 71]


def ragged(generator: Generator, count: int, **changes: Any) -> list[AnchorKV]:
    kvs = make_compressor(generator, "shared", **changes).compress(PROSE[:count])
    assert all(int(kv.counts.min()) < int(kv.counts.max()) for kv in kvs)
    return kvs


def made_up(generator: Generator, num_tokens: int, *, whole: bool) -> AnchorKV:
    """A chunk of noise, no two values of which are alike; whole, or what chance leaves of it."""
    layers, kv_heads, width = generator.kv_shape
    random = torch.Generator().manual_seed(num_tokens)
    keys, values = torch.randn(2, layers, kv_heads, num_tokens, width, generator=random)
    every = AnchorKV.uniform(keys, values, torch.arange(num_tokens).int(), num_tokens)
    selected = torch.randperm(every.num_entries, generator=random)[: every.num_entries // 3]
    return every if whole else every.map(lambda tensor: tensor[selected])


# --- masks


def table_of(prompt: Prompt, rows: Sequence[Sequence[Any]], cue: bool) -> list[Tensor]:
    """What each token may attend to in each layer, from parts alone; entries by their values.

    Returns:
        bool. Shape of each: (rows, kv_heads, tokens, entries + tokens)
    """
    tables = []
    for number, layer in enumerate(prompt.cache.layers):
        assert layer.values is not None
        count, kv_heads, entries, _ = layer.values.shape
        tokens = prompt.embeds.shape[1]
        table = torch.zeros(count, kv_heads, tokens, entries + tokens, dtype=torch.bool)
        for row, parts in enumerate(rows):
            # (index of the part, branch, index of a chunk that it is the cue of) of each token
            labels: list[tuple[int, int, bool]] = []
            for index, part in enumerate(parts):
                if isinstance(part, AnchorKV):
                    labels += [(index, 0, True)] * cue
                elif isinstance(part, Branches):
                    labels += [(index, b, False) for b, t in enumerate(part.texts) for _ in t]
                else:
                    labels += [(index, 0, False)] * len(part)
            begin = tokens - len(labels)
            for head in range(kv_heads):
                owners = owners_of(layer.values[row, head], parts, number * kv_heads + head)
                for at, (index, branch, is_cue) in enumerate(labels):
                    seen = table[row, head, begin + at]
                    for slot, owner in enumerate(owners):
                        seen[slot] = owner is not None and owner < index + is_cue
                    for other, (index_2, branch_2, _) in enumerate(labels[: at + 1]):
                        seen[entries + begin + other] = index_2 < index or branch_2 == branch
            # Padding attends to itself, so that no softmax is over nothing.
            for pad in range(begin):
                table[row, :, pad, entries + pad] = True
        tables.append(table)
    return tables


def owners_of(values: Tensor, parts: Sequence[Any], head: int) -> list[int | None]:
    """Which part each entry in the cache is of; None for padding."""
    owners: list[int | None] = []
    for value in values:
        attended = [
            index
            for index, part in enumerate(parts)
            if isinstance(part, AnchorKV)
            and (part.values[part.heads == head].to(value.dtype) == value).all(-1).any()
        ]
        assert len(attended) <= 1
        assert attended or not value.any(), "an entry of no chunk that is not padding"
        owners.append(attended[0] if attended else None)
    return owners


def assert_exactly(masks: Masks, tables: list[Tensor], dtype: torch.dtype) -> None:
    assert len(masks) in (1, len(tables))
    for layer, table in enumerate(tables):
        mask = masks[layer if len(masks) > 1 else 0].expand(table.shape)
        assert mask.dtype == dtype
        assert torch.equal(mask == 0, table)
        assert (mask[~table] == torch.finfo(dtype).min).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["whole", "ragged", "both"])
@pytest.mark.parametrize("cue", [False, True])
def test_a_token_attends_to_exactly_what_it_may(
    tokenizer: PreTrainedTokenizerFast, kind: str, cue: bool, dtype: torch.dtype
) -> None:
    generator = Generator(make_model("llama").to(dtype), tokenizer)
    wholes = {"whole": [True] * 4, "ragged": [False] * 4, "both": [True, True, False, False]}[kind]
    a, b, c, d = (made_up(generator, 7 + n, whole=whole) for n, whole in enumerate(wholes))
    branches = Branches(([5, 6], [7], [8, 9, 10]))
    rows: list[list[Part | Branches]] = [
        [WHO, a, WHY, b, WHO],
        [c, WHO, branches],
        [WHY],
        [d, b, WHY, WHO, a, c, WHO],
        [WHO, branches],
    ]
    prompt = assemble(rows, generator, cue=torch.randn(48) if cue else None)
    # One mask serves all heads only where all of them have the same entries.
    assert (len(prompt.masks) == 1) == (kind == "whole")
    assert_exactly(prompt.masks, table_of(prompt, rows, cue), dtype)


def test_all_tokens_attend_to_a_prefix(llama: Generator) -> None:
    prefix, kvs = read_plain(llama, WHO), [made_up(llama, n, whole=False) for n in (7, 8)]
    rows = [[kvs[0], WHY], [WHY, kvs[1], WHO]]
    prompt = assemble(rows, llama, prefix=prefix)
    as_parts = [[prefix, *row] for row in rows]
    assert_exactly(prompt.masks, table_of(prompt, as_parts, cue=False), torch.float32)


def test_one_mask_is_for_all_layers_where_chunks_are_none(llama: Generator) -> None:
    prompt = assemble([[WHO], [WHY, WHO]], llama)
    assert prompt.inputs()["attention_mask"].shape == (2, 1, 5, 5)
    assert "entry_masks" not in prompt.inputs()


@pytest.mark.parametrize("kind", ["ragged", "whole", "none"])
def test_masks_of_what_follows_let_each_new_token_see_all_before_it(
    llama: Generator, kind: str
) -> None:
    kvs = {
        "ragged": ragged(llama, 2),
        "whole": make_compressor(llama, "full").compress(PROSE[:2]),
        "none": [],
    }[kind]
    rows = [[*kvs, WHO], [WHY, *kvs[1:], WHY, WHO]]
    prompt = assemble(rows, llama)
    for count in (1, 4):
        masks = prompt.masks.of_next(count)
        assert len(masks) == len(prompt.masks) == (3 if kind == "ragged" else 1)
        # As if the tokens that follow were the last part's own, and read with it.
        longer = assemble([[*row[:-1], [*row[-1], *[9] * count]] for row in rows], llama)
        for of_next, whole in zip(masks, (longer.masks[i] for i in range(len(masks))), strict=True):
            assert torch.equal(of_next, whole[:, :, -1:])
        for layer, mask in enumerate(masks):
            assert torch.equal(mask[..., :-count], prompt.masks[layer][:, :, -1:])
            assert not mask[..., -count:].any()


def test_the_cache_of_a_layer_is_as_long_as_its_longest_head(llama: Generator) -> None:
    (kv,) = ragged(llama, 1)
    prompt = assemble([[kv, WHO]], llama)
    lengths = [layer.keys.shape[2] for layer in prompt.cache.layers if layer.keys is not None]
    assert lengths == kv.counts.amax(dim=1).tolist()
    assert prompt.num_anchors == (kv.num_anchors,)


def test_layers_differ_and_so_do_their_masks(llama: Generator) -> None:
    prompt = assemble([[*ragged(llama, 3), WHO]], llama)
    widths = {prompt.masks[layer].shape[-1] for layer in range(3)}
    assert len(widths) > 1, "all layers are alike: the other tests tell less"
    assert {prompt.masks[layer].shape[1] for layer in range(3)} == {2}


@torch.no_grad()
def test_slots_that_are_padding_in_all_rows_are_not_attended_to(
    llama: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvs = ragged(llama, 4)
    rows: list[list[Part]] = [[*kvs[:2], WHO], [kvs[2], WHY, kvs[3], WHO], [kvs[3], WHO]]
    prompt = assemble(rows, llama)
    for layer, cached in enumerate(prompt.cache.layers):
        begins = prompt.masks.padding(layer)
        entries = cached.keys.any(dim=-1).any(dim=0)  # padding is zero
        assert (begins or [0, 0]) == entries.int().argmax(dim=1).tolist()
    assert any(prompt.masks.padding(layer) for layer in range(3))
    skipped = llama.model(**prompt.inputs()).logits
    monkeypatch.setattr(Masks, "padding", lambda self, layer: None)
    attended = llama.model(**assemble(rows, llama).inputs()).logits
    torch.testing.assert_close(skipped[:, -3:], attended[:, -3:], atol=TOLERANCE, rtol=0)


# --- reading


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_bfloat16_reads_what_each_head_keeps_too(
    tokenizer: PreTrainedTokenizerFast, architecture: str, attention: str
) -> None:
    generator = Generator(make_model(architecture, attention).to(torch.bfloat16), tokenizer)
    kvs = ragged(generator, 2, stored_dtype="bfloat16")
    rows: list[list[Part]] = [[kvs[0], WHO, kvs[1], WHY], [WHY]]
    got = logits_of(generator, assemble(rows, generator))[0].float()
    expected = read_slowly(generator, rows[0]).float()
    assert (got - expected).abs().max() < BFLOAT16 * expected.abs().max()
    generation = Generation(generator, assemble(rows, generator), Decoding(max_new_tokens=4))
    for _ in generation:
        pass
    assert all(generation.num_tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_reach_the_entries_and_the_cue_and_are_those_of_slow_reading(
    make_generator: Any, attention: str
) -> None:
    generator = make_generator("qwen3", attention)
    compressor = make_compressor(generator, "shared")
    kvs = compressor.compress(PROSE[:2])
    assert compressor.cue is not None

    def gradients(slowly: bool) -> list[Tensor]:
        leaves = [[t.clone().requires_grad_() for t in (kv.keys, kv.values)] for kv in kvs]
        cue = compressor.cue.detach().clone().requires_grad_()  # type: ignore[union-attr]
        parts: list[Any] = [
            AnchorKV(
                keys, values, kv.positions, kv.heads, kv.num_layers, kv.num_kv_heads, kv.num_tokens
            )
            for kv, (keys, values) in zip(kvs, leaves, strict=True)
        ]
        row = [WHO, parts[0], WHY, parts[1], WHO]
        if slowly:
            logits = read_slowly(generator, row, cue)
        else:
            logits = generator.model(**assemble([row], generator, cue=cue).inputs()).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[-3:], torch.tensor([4, 5, 6]))
        return list(torch.autograd.grad(loss, [*leaves[0], *leaves[1], cue]))

    for got, expected in zip(gradients(False), gradients(True), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_model_of_one_layer_has_masks_for_each_head_too(
    tokenizer: PreTrainedTokenizerFast, attention: str
) -> None:
    config = {**make_model("llama", attention).config.to_dict(), "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config, attn_implementation=attention))
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(std=0.3)
    generator = Generator(model, tokenizer)
    row: list[Part] = [ragged(generator, 1)[0], WHO]
    got = logits_of(generator, assemble([row], generator))[0]
    assert (got - read_slowly(generator, row)).abs().max() <= TOLERANCE
    assert len(list(next_tokens(generator, assemble([row], generator), Decoding(3)))) == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_prompt_reads_the_masks_of_another(make_generator: Any, attention: str) -> None:
    """What a prompt needs travels with its own forward pass: nothing is state of the model."""
    generator = make_generator("llama", attention)
    kvs = ragged(generator, 6)
    rows: list[list[Part]] = [
        [kvs[0], WHO],
        [WHY, *kvs[1:4], WHO],
        [kvs[4], WHY, kvs[5], WHO],
        [WHO, *make_compressor(generator, "full").compress(PROSE[6:]), WHY],
    ]
    decoding = Decoding(max_new_tokens=6)

    def written(row: list[Part]) -> list[int]:
        return [int(t) for t in next_tokens(generator, assemble([row], generator), decoding)]

    alone = [written(row) for row in rows]
    # One thread, a token of each in turn.
    steps = zip(
        *(next_tokens(generator, assemble([row], generator), decoding) for row in rows), strict=True
    )
    assert [[int(token) for token in of_row] for of_row in zip(*steps, strict=True)] == alone
    # Two threads, while a third has the model show its attention.
    stop = threading.Event()

    def measure() -> None:
        while not stop.is_set():
            attention_when_read_again(generator, [], torch.tensor(WHO))

    with ThreadPoolExecutor(3) as threads:
        measuring = threads.submit(measure)
        together = list(threads.map(written, rows * 2))
        stop.set()
        measuring.result()
    assert together == alone * 2
    # And without taking turns for the model at all.
    with torch.no_grad():
        expected = [generator.model(**assemble([r], generator).inputs()).logits for r in rows]
    with ThreadPoolExecutor(4) as threads:
        for got, index in threads.map(lambda i: (read(generator, rows[i % 4]), i), range(12)):
            torch.testing.assert_close(got, expected[index % 4], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def read(generator: Generator, row: list[Part]) -> Tensor:
    logits: Tensor = generator.model(**assemble([row], generator).inputs()).logits
    return logits


# --- the model that was wrapped


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_wrapped_model_does_without_our_masks_what_it_did_before(
    tokenizer: PreTrainedTokenizerFast, architecture: str, attention: str
) -> None:
    came = make_model(architecture, attention).eval()
    wrapped = Generator(make_model(architecture, attention), tokenizer).model
    assert wrapped.config._attn_implementation == NAMES[attention]
    ids = torch.tensor([tokenizer(text).input_ids[:12] for text in PROSE[:2]])
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    for inputs in ({}, {"attention_mask": padding}, {"use_cache": False}):
        assert torch.equal(wrapped(ids, **inputs).logits, came(ids, **inputs).logits)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for inputs in ({}, {"attention_mask": padding}):
        assert torch.equal(
            wrapped.generate(ids, **inputs, **options), came.generate(ids, **inputs, **options)
        )
    if attention == "eager":
        shown = wrapped(ids, output_attentions=True).attentions
        expected = came(ids, output_attentions=True).attentions
        assert len(shown) == len(expected) == 3
        assert all(map(torch.equal, shown, expected))


@torch.no_grad()
def test_a_model_that_caps_its_scores_still_does(tokenizer: PreTrainedTokenizerFast) -> None:
    """Eager attention is not the same in all of transformers' models."""
    config = transformers.Gemma2Config(
        **SMALL, head_dim=16, layer_types=["full_attention"] * 2, attn_logit_softcapping=2.0
    )
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(std=0.3)
    model.eval()
    ids = torch.tensor([WHO + WHY])
    capped = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (model(ids).logits - capped).abs().max() > 1e-3, "the cap makes no difference"
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 2.0
    generator = Generator(model, tokenizer)
    assert torch.equal(generator.model(ids).logits, capped)
    # With a mask for each head as with one for all.
    (kv,) = make_compressor(generator, "full", sink="").compress_tokens([WHO])
    prompt = assemble([[kv, WHY]], generator)
    expected = logits_of(generator, prompt)
    assert (expected[0] - capped[0, -2:]).abs().max() <= TOLERANCE
    each = [prompt.masks[0].expand(-1, 2, -1, -1)] * 2
    inputs = assemble([[kv, WHY]], generator).inputs() | {"entry_masks": each}
    assert (generator.model(**inputs).logits - expected).abs().max() <= TOLERANCE


SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}


@pytest.mark.parametrize("name", ["StableLm", "Falcon", "Nemotron"])
def test_a_model_that_loses_the_masks_on_the_way_fails_and_does_not_answer_wrong(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Some of transformers' models hand no keywords to their layers, or attend on their own."""
    changes = {"new_decoder_architecture": True} if name == "Falcon" else {}
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**SMALL, **changes)
    )
    generator = Generator(model, tokenizer)
    whole, some = (made_up(generator, 7, whole=whole) for whole in (True, False))
    assert read(generator, [whole, WHO]).isfinite().all()
    with pytest.raises(RuntimeError, match="size"):
        read(generator, [some, WHO])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_wrapping_a_model_again_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, attention: str
) -> None:
    model = make_model("llama", attention)
    config = model.config.to_dict()
    once = Generator(model, tokenizer)
    twice = Generator(model, tokenizer)
    assert twice.identity == once.identity
    assert model.config.to_dict() == config
    compressor = make_compressor(once, "shared")
    (kv,) = compressor.compress(PROSE[:1])
    got = read(once, [kv, WHO])
    assert torch.equal(read(twice, [kv, WHO]), got)
    assert torch.equal(read(once, [kv, WHO]), got)
    assert compressor.fingerprint == make_compressor(twice, "shared").fingerprint


def test_wrapping_leaves_no_trace_in_identity_or_saved_config(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """What is saved must load where sac_rag is not there."""
    identities = []
    for attention in ("sdpa", "eager"):
        wrapped = Generator(make_model("llama", attention), tokenizer)
        identities.append((wrapped.identity, make_compressor(wrapped, "shared").fingerprint))
        folder = tmp_path / attention
        LlamaForCausalLM(wrapped.model.config).save_pretrained(folder)
        assert "sac_rag" not in (folder / "config.json").read_text()
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
        loaded = LlamaForCausalLM.from_pretrained(folder)
        assert loaded.config._attn_implementation == "sdpa"
    assert identities[0] == identities[1]


@torch.no_grad()
def test_a_model_beside_a_wrapped_one_is_left_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    beside = make_model("qwen3").eval()
    ids = torch.tensor([WHO])
    before = beside(ids).logits
    generator = Generator(make_model("qwen3"), make_tokenizer())
    read(generator, [ragged(generator, 1)[0], WHO])
    assert beside.config._attn_implementation == "sdpa"
    assert torch.equal(beside(ids).logits, before)
