"""Compressors lay segments out as their method says, know themselves by digest, and can be trained.

ROUNDING: float32 sums of one layer in another order.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from torch import Tensor
from torch.autograd import backward
from transformers import LlamaConfig, LlamaForCausalLM

from sac_rag.compressors import base, checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.full import Full
from sac_rag.compressors.layout import Layout, after_sink, causal
from sac_rag.compressors.sac import SAC
from sac_rag.errors import PromptTooLongError
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Part, assemble

ROUNDING = 1e-4
SINK = "<|im_start|>system\n"

# For every field a value other than the one make_compressor sets, and what else it must change.
CHANGES: dict[str, tuple[Any, set[str]]] = {
    "method": ("other", set()),
    "ratio": (4, set()),
    "heading": ("text: ", set()),
    "anchors": ("surprisal", set()),
    "budget": ("shared", {"compressor_weights"}),
    "scorer_width": (16, set()),
    "anchor_embedding": ("none", {"compressor_weights"}),
    "first_position": (1, set()),
    "segment_tokens": (100, set()),
    "sink": ("<|im_start|>user\n", set()),
    "attention": ("anchors", set()),
    "cue": (False, {"compressor_weights"}),
    "lora_rank": (2, {"compressor_weights"}),
    "lora_alpha": (16, set()),
    "lora_targets": (("q_proj",), {"compressor_weights"}),
    "generator_adapter_rank": (2, {"compressor_weights"}),
    "stored_dtype": ("float16", set()),
}


# A scorer and budgets leave no choice of these.
UNLIKE_LEARNED = {"method", "ratio", "anchors", "anchor_embedding", "attention", "budget"}


class Other(SAC):
    """A method of its own that does what SAC does."""

    method: ClassVar[str] = "other"


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    """A compressor that no test changes."""
    return make_compressor(llama, "sac")


@pytest.fixture
def own(make_generator: Callable[..., Generator]) -> Compressor:
    """A compressor on a generator of this test's own, to be changed."""
    return make_compressor(make_generator("llama"), "sac")


@contextmanager
def passes_of(generator: Generator) -> Iterator[list[tuple[int, int]]]:
    """Notes (rows, slots) of every forward pass of the decoder stack."""
    passes: list[tuple[int, int]] = []
    handle = generator.model.base_model.register_forward_hook(
        lambda module, args, output: passes.append(tuple(output[0].shape[:2]))
    )
    try:
        yield passes
    finally:
        handle.remove()


def nudge(weight: Tensor) -> None:
    """Changes one element by as little as can be."""
    flat = weight.data.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))


# --- config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", 0),
        ("ratio", -5),
        ("ratio", 2.5),
        ("ratio", "5"),
        ("ratio", True),
        ("segment_tokens", 0),
        ("segment_tokens", 510.0),
        ("scorer_width", -1),
        ("lora_rank", 0),
        ("lora_alpha", 0),
        ("generator_adapter_rank", -1),
        ("budget", "even"),
        ("attention", "bidirectional"),
        ("attention", None),
        ("stored_dtype", "int4"),
        ("stored_dtype", torch.float32),
        ("sink", None),
        ("sink", 3),
        ("cue", "no"),
        ("lora_targets", "q_proj"),  # not the six modules q, _, p, r, o and j
    ],
)
def test_a_value_out_of_range_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} must .*was.*: .*{str(value)[-3:]}"):
        CompressorConfig(**{field: value})


def test_a_config_survives_json() -> None:
    config = CompressorConfig(ratio=15, sink='{"\n☃', lora_targets=["k_proj"], cue=False)  # type: ignore[arg-type]
    assert CompressorConfig.from_json(config.to_json()) == config


def test_fields_that_are_not_named_have_their_default() -> None:
    assert CompressorConfig.from_json('{"ratio": 51}') == CompressorConfig(ratio=51)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[5]", r"must be a JSON object, was: \[5\]"),
        ('{"ratio": 5, "zoom": 2, "new": 1}', "unknown fields .*: new, zoom; .*upgrade"),
        ('{"ratio": "5"}', "ratio must be an integer"),
    ],
)
def test_json_that_is_no_config_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressorConfig.from_json(text)


def test_an_unknown_method_is_refused_with_the_known_ones(llama: Generator) -> None:
    with pytest.raises(ValueError, match="one of sac, full, was: 'icae'"):
        checkpoint.make(llama, CompressorConfig(method="icae"))


def test_a_config_of_another_method_is_refused(llama: Generator) -> None:
    with pytest.raises(ValueError, match=r"config\.method must be 'sac', was: 'full'"):
        SAC(llama, Full.default_config())


@pytest.mark.parametrize(
    "changes",
    [{"ratio": 5}, {"cue": True}, {"attention": "full"}, {"lora_targets": ("q_proj",)}],
)
def test_full_refuses_what_is_not_plain_reading(llama: Generator, changes: dict[str, Any]) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        Full(llama, Full.default_config(**changes))


# --- fingerprint


def test_every_field_of_the_config_is_covered_below() -> None:
    assert set(CHANGES) == {field.name for field in fields(CompressorConfig)}


@pytest.mark.parametrize("field", CHANGES)
def test_changing_a_config_field_changes_the_fingerprint_for_that_field(
    llama: Generator, sac: Compressor, field: str
) -> None:
    value, also = CHANGES[field]
    base = "learned" if field == "budget" else "sac"
    before = make_compressor(llama, base) if field == "budget" else sac
    assert asdict(before.config)[field] != value
    if field == "method":
        changed: Compressor = Other(llama, replace(sac.config, method="other"))
        changed.load_weights(sac.weights)
    else:
        changed = make_compressor(llama, base, **{field: value})
    assert difference(before, changed) == {f"config.{field}", *also}
    assert changed.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget", "layers"),
        ("anchors", "attention"),
        ("attention", "full"),
        *((f, v) for f, (v, _) in CHANGES.items() if f not in UNLIKE_LEARNED),
    ],
)
def test_fields_of_nested_ratios_count_too(llama: Generator, field: str, value: Any) -> None:
    before, changes = make_compressor(llama, "shared"), {field: value}
    assert asdict(before.config)[field] != value
    also = {"compressor_weights"}
    if field == "anchors":
        changes["budget"] = "uniform"
        also |= {"config.budget", "config.ratio"}
    found = difference(before, make_compressor(llama, "shared", **changes))
    assert f"config.{field}" in found
    assert found <= {f"config.{field}", *also}


@pytest.mark.parametrize("budget", ["shared", "layers", "uniform"])
def test_the_ratio_of_nested_ones_is_not_in_the_fingerprint(llama: Generator, budget: str) -> None:
    compressor = make_compressor(llama, "learned", budget=budget)
    assert compressor.is_nested
    others = [compressor.at_ratio(15), make_compressor(llama, "learned", budget=budget, ratio=2)]
    for other in others:
        assert difference(compressor, other) == set()
        assert other.fingerprint == compressor.fingerprint


def test_only_fields_that_are_not_at_their_default_are_in_the_fingerprint() -> None:
    """A field that comes later, at its default, changes no fingerprint that is in use."""
    assert CompressorConfig().fingerprint_fields() == {}
    for field, (value, _) in CHANGES.items():
        if field not in ("budget", "anchor_embedding"):
            covered = CompressorConfig(**{field: value}).fingerprint_fields()
            assert covered.keys() == {f"config.{field}"}
            assert covered[f"config.{field}"] == repr(
                list(value) if isinstance(value, tuple) else value
            )


def test_defaults_are_what_fingerprints_in_use_take_them_to_be() -> None:
    """A field at its default is in no fingerprint: another default would change what they mean."""
    assert asdict(CompressorConfig()) == {
        "method": "sac",
        "ratio": 5,
        "anchors": "uniform",
        "budget": "uniform",
        "scorer_width": 0,
        "segment_tokens": 510,
        "sink": "",
        "heading": "",
        "attention": "full",
        "anchor_embedding": "shared",
        "first_position": 0,
        "cue": True,
        "lora_rank": 128,
        "lora_alpha": 256,
        "lora_targets": ("q_proj", "v_proj"),
        "generator_adapter_rank": 0,
        "stored_dtype": "bfloat16",
    }


@pytest.mark.parametrize("anchors", ["uniform", "surprisal", "attention"])
@pytest.mark.parametrize("budget", ["shared", "layers"])
def test_budgets_need_a_scorer_to_be_fitted_with(anchors: Any, budget: Any) -> None:
    with pytest.raises(
        ValueError, match=f"budget='{budget}' .* anchors='learned', was: '{anchors}'"
    ):
        CompressorConfig(anchors=anchors, budget=budget)


def test_changing_any_weight_changes_the_fingerprint(own: Compressor) -> None:
    kinds = {name.split(".")[-2] if "." in name else name for name in own.weights}
    assert kinds == {"lora_A", "lora_B", "anchor_embedding", "cue"}
    seen = {own.fingerprint}
    for weight in own.weights.values():
        nudge(weight)
        seen.add(own.fingerprint)
    assert len(seen) == len(own.weights) + 1


def test_the_same_bits_under_another_name_are_another_fingerprint(own: Compressor) -> None:
    before = own.fingerprint
    names = [name for name in own.weights if "lora_A" in name][:2]
    first, second = (own.weights[name].detach().clone() for name in names)
    with torch.no_grad():
        own.weights[names[0]].copy_(second)
        own.weights[names[1]].copy_(first)
    assert own.fingerprint != before


def test_changing_the_base_weights_changes_the_fingerprint(
    make_generator: Callable[..., Generator], sac: Compressor
) -> None:
    model = make_model("llama")
    nudge(model.model.layers[1].mlp.up_proj.weight)
    changed = make_compressor(Generator(model, make_tokenizer()), "sac")
    assert difference(sac, changed) == {"generator.weights"}


def test_changing_the_tokenizer_changes_the_fingerprint(sac: Compressor) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["lighthouse keeper"])
    changed = make_compressor(Generator(make_model("llama"), tokenizer), "sac")
    assert difference(sac, changed) == {"generator.tokenizer"}


def test_a_new_format_of_kv_changes_the_fingerprint(
    sac: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sac.fingerprint
    monkeypatch.setattr(base, "KV_FORMAT", base.KV_FORMAT + 1)
    assert sac.fingerprint != before


def difference(one: Compressor, other: Compressor) -> set[str]:
    ours, theirs = one.fingerprint_fields(), other.fingerprint_fields()
    assert (one.fingerprint != other.fingerprint) == (ours != theirs)
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def test_device_neutral_differences_keep_the_fingerprint(
    make_generator: Callable[..., Generator], sac: Compressor
) -> None:
    assert difference(sac, make_compressor(make_generator("llama", "eager"), "sac")) == set()


def test_a_second_compressor_does_not_change_the_fingerprint(own: Compressor) -> None:
    before = own.fingerprint
    make_compressor(own.generator, "sac", ratio=7)
    assert own.fingerprint == before


LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
from support.models import make_model, make_tokenizer
from sac_rag.compressors import checkpoint
from sac_rag.lm.generator import Generator
compressor = checkpoint.load(sys.argv[2], Generator(make_model("llama"), make_tokenizer()))
print(hash("sac"), compressor.fingerprint)
"""


def test_a_process_with_another_hash_seed_has_the_same_fingerprint(
    sac: Compressor, tmp_path: Path
) -> None:
    checkpoint.save(sac, tmp_path)
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(Path(__file__).parents[1]), str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": seed},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    hashed, fingerprint = other.stdout.split()
    assert int(hashed) != hash("sac")
    assert fingerprint == sac.fingerprint


# --- checkpoint


@pytest.mark.parametrize("changes", [{}, {"cue": False}, {"lora_targets": ()}])
def test_a_loaded_compressor_gives_the_same_bits(
    make_generator: Callable[..., Generator], tmp_path: Path, changes: dict[str, Any]
) -> None:
    saved = make_compressor(make_generator("llama"), "sac", **changes)
    checkpoint.save(saved, tmp_path)
    loaded = checkpoint.load(tmp_path, make_generator("llama"))
    assert loaded.config == saved.config
    assert loaded.fingerprint == saved.fingerprint
    for one, other in zip(loaded.compress(PROSE), saved.compress(PROSE), strict=True):
        assert one.bit_equal(other)


def test_full_is_saved_and_loaded_too(llama: Generator, tmp_path: Path) -> None:
    full = make_compressor(llama, "full")
    checkpoint.save(full, tmp_path)
    assert checkpoint.load(tmp_path, llama).fingerprint == full.fingerprint


def test_saving_leaves_the_two_files_and_nothing_else(sac: Compressor, tmp_path: Path) -> None:
    for _ in range(2):
        checkpoint.save(sac, tmp_path / "new" / "folder")
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"config.json", "compressor.safetensors"}


def test_another_ratio_changes_the_ratio_only(
    sac: Compressor, llama: Generator, tmp_path: Path
) -> None:
    checkpoint.save(sac, tmp_path)
    loaded = checkpoint.load(tmp_path, llama, ratio=15)
    assert loaded.config == replace(sac.config, ratio=15)
    assert difference(loaded, sac) == {"config.ratio"}


def test_another_models_compressor_is_refused_with_the_shapes(
    sac: Compressor, tmp_path: Path
) -> None:
    checkpoint.save(sac, tmp_path)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    other = Generator(LlamaForCausalLM(config), make_tokenizer())
    with pytest.raises(
        ValueError, match=r"'anchor_embedding': expected shape \(32,\), got \(48,\); load it with"
    ):
        checkpoint.load(tmp_path, other)


def test_a_compressor_of_more_layers_is_refused(sac: Compressor, tmp_path: Path) -> None:
    checkpoint.save(sac, tmp_path)
    config = LlamaConfig.from_dict({**make_model("llama").config.to_dict(), "num_hidden_layers": 2})
    other = Generator(LlamaForCausalLM(config), make_tokenizer())
    with pytest.raises(ValueError, match=r"4 of .*layers\.2\..*expected shape None, got \(4, 48\)"):
        checkpoint.load(tmp_path, other)


@pytest.mark.parametrize("missing", ["config.json", "compressor.safetensors"])
def test_a_missing_file_is_named(
    sac: Compressor, llama: Generator, tmp_path: Path, missing: str
) -> None:
    checkpoint.save(sac, tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"must hold config.json .*{missing}"):
        checkpoint.load(tmp_path, llama)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b'{"method": "sac", "surprise": 1}'),
        ("compressor.safetensors", b""),
        ("compressor.safetensors", b"\x80\x04not safetensors" * 10),
    ],
)
def test_a_damaged_file_is_refused(
    sac: Compressor, llama: Generator, tmp_path: Path, file: str, content: bytes
) -> None:
    checkpoint.save(sac, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError):
        checkpoint.load(tmp_path, llama)


def test_a_truncated_weights_file_is_refused(
    sac: Compressor, llama: Generator, tmp_path: Path
) -> None:
    checkpoint.save(sac, tmp_path)
    weights = tmp_path / "compressor.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"must hold config\.json and compressor\.s"):
        checkpoint.load(tmp_path, llama)


def test_the_config_beside_the_weights_can_be_read_by_people(
    sac: Compressor, tmp_path: Path
) -> None:
    checkpoint.save(sac, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sink"] == SINK


# --- layout of SAC


def rows_of(mask: Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ("causal", ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]),
        ("anchors", ["x....", "xxxxx", "xxx..", "xxxx.", "xxxxx"]),
        ("full", ["xxxxx"] * 5),
    ],
)
def test_who_sees_whom(llama: Generator, attention: str, expected: list[str]) -> None:
    compressor = make_compressor(llama, "sac", ratio=3, attention=attention)
    layout = compressor.layout(torch.tensor([9, 8, 7, 6, 5]))
    assert layout.kept.tolist() == [1, 4]
    assert rows_of(layout.sees) == expected
    assert layout.positions.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("attention", ["causal", "anchors", "full"])
def test_a_sink_sees_itself_and_is_seen_by_all(llama: Generator, attention: str) -> None:
    compressor = make_compressor(llama, "sac", ratio=3, attention=attention)
    layout = compressor.layout(torch.tensor([9, 8, 7, 6, 5]))
    behind = after_sink(layout, llama.embed([1, 2]))
    assert rows_of(behind.sees[:2]) == ["x......", "xx....."]
    assert behind.sees[2:, :2].all()
    assert torch.equal(behind.sees[2:, 2:], layout.sees)
    assert behind.positions.tolist() == [-2, -1, 0, 1, 2, 3, 4]
    assert behind.kept.tolist() == [3, 6]
    assert torch.equal(behind.embeds, torch.cat([llama.embed([1, 2]), layout.embeds]))


def test_no_sink_changes_nothing(sac: Compressor) -> None:
    layout = sac.layout(torch.tensor([9, 8, 7]))
    behind = after_sink(layout, sac.generator.embed([]))
    assert torch.equal(behind.sees, layout.sees)
    assert torch.equal(behind.embeds, layout.embeds)


def test_the_anchor_embedding_is_added_at_the_anchors_and_nowhere_else(own: Compressor) -> None:
    tokens = torch.tensor([9, 8, 7, 6, 5])
    plain, marked = own.generator.embed(tokens), own.layout(tokens).embeds
    for slot in (0, 2, 3):
        assert torch.equal(marked[slot], plain[slot])
    for slot in (1, 4):
        assert torch.equal(marked[slot], plain[slot] + own.weights["anchor_embedding"])


def test_full_keeps_every_token_of_plain_reading(llama: Generator) -> None:
    layout = make_compressor(llama, "full").layout(torch.tensor([9, 8, 7]))
    assert torch.equal(layout.sees, causal(3, llama.device))
    assert layout.kept.tolist() == layout.positions.tolist() == [0, 1, 2]
    assert torch.equal(layout.embeds, llama.embed([9, 8, 7]))


# --- encoding


def test_an_untrained_compressor_keeps_the_frozen_models_own_kv(
    make_generator: Callable[..., Generator],
) -> None:
    generator = make_generator("llama")
    settings: dict[str, Any] = {"ratio": 3, "sink": "", "stored_dtype": "float32"}
    untrained = SAC(generator, CompressorConfig(attention="causal", **settings))
    ids = generator.tokenize(PROSE[0])
    (kv,) = untrained.compress_tokens([ids])
    with torch.no_grad():
        layers = generator.model(torch.tensor([ids]), use_cache=True).past_key_values.layers
    keys, values, _ = kv.by_head()
    for layer, plain in enumerate(layers):
        torch.testing.assert_close(keys[layer], plain.keys[0, :, 1::3], atol=ROUNDING, rtol=0)
        torch.testing.assert_close(values[layer], plain.values[0, :, 1::3], atol=ROUNDING, rtol=0)


def test_lora_is_on_while_encoding_and_off_afterwards(own: Compressor) -> None:
    ids = torch.tensor([own.generator.tokenize(PROSE[0])])
    with torch.no_grad():
        plain = own.generator.model(ids).logits
    (with_lora,) = own.compress([PROSE[0]])
    with torch.no_grad():
        assert torch.equal(own.generator.model(ids).logits, plain)
        for name, weight in own.weights.items():
            if "lora_B" in name:
                weight.zero_()
    (without,) = own.compress([PROSE[0]])
    assert (with_lora.keys - without.keys).abs().max() > 0.01


@pytest.mark.parametrize("stored_dtype", ["float16", "bfloat16"])
def test_what_is_stored_is_the_rounded_float32(
    llama: Generator, sac: Compressor, stored_dtype: Any
) -> None:
    rounded = make_compressor(llama, "sac", stored_dtype=stored_dtype).compress(PROSE[:3])
    for kv, exact in zip(rounded, sac.compress(PROSE[:3]), strict=True):
        assert kv.bit_equal(exact.to(dtype=getattr(torch, stored_dtype)))


class EverySecond(SAC):
    """A method that keeps as many tokens as it likes, whatever the ratio."""

    method: ClassVar[str] = "every-second"

    def layout(self, tokens: Tensor) -> Layout:
        return replace(super().layout(tokens), kept=torch.arange(0, len(tokens), 2))


def test_int8_keeps_all_that_a_method_keeps(llama: Generator, sac: Compressor) -> None:
    config = replace(sac.config, method="every-second", ratio=5)
    ids = llama.tokenize(PROSE[0])
    exact, rounded = (
        EverySecond(llama, replace(config, stored_dtype=dtype)).compress_tokens([ids])[0]
        for dtype in ("float32", "int8")
    )
    assert torch.equal(rounded.positions, exact.positions)
    assert rounded.num_entries == 6 * len(range(0, len(ids), 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_encodes(dtype: torch.dtype) -> None:
    generator = Generator(make_model("llama").to(dtype), make_tokenizer())
    stored = str(dtype).removeprefix("torch.")
    for kv in make_compressor(generator, "sac", stored_dtype=stored).compress(PROSE[:3]):
        assert kv.dtype == dtype
        assert kv.keys.isfinite().all()


def test_trained_weights_are_kept_in_float32_whatever_the_model(own: Compressor) -> None:
    """Small steps of training would be lost in bfloat16, and bits of a checkpoint too."""
    generator = Generator(make_model("llama").to(torch.bfloat16), make_tokenizer())
    compressor = make_compressor(generator, "sac")
    assert {weight.dtype for weight in compressor.weights.values()} == {torch.float32}


def test_positions_count_source_tokens(sac: Compressor) -> None:
    (kv,) = sac.compress_tokens([list(range(3, 13))])
    _, _, positions = kv.by_head()
    assert positions.tolist() == [[[1, 4, 7]] * 2] * 3
    assert kv.num_tokens == 10


def test_results_come_in_the_order_of_the_texts(sac: Compressor) -> None:
    texts = sorted(PROSE, key=len)
    for text, kv in zip(texts, sac.compress(texts), strict=True):
        (alone,) = sac.compress([text])
        assert kv.num_tokens == len(sac.tokenize(text))
        torch.testing.assert_close(kv.keys, alone.keys, atol=ROUNDING, rtol=ROUNDING)


def test_nothing_is_compressed_to_nothing(sac: Compressor) -> None:
    with passes_of(sac.generator) as passes:
        assert sac.compress([]) == []
    assert passes == []


@pytest.mark.parametrize("text", ["", " ", "\n\t\u2003"])
def test_a_text_without_text_is_refused(sac: Compressor, text: str) -> None:
    with pytest.raises(ValueError, match="a chunk must have text"):
        sac.compress(["a", text])


def test_a_text_longer_than_the_model_is_refused_before_any_work(sac: Compressor) -> None:
    with (
        passes_of(sac.generator) as passes,
        pytest.raises(PromptTooLongError, match=r"chunk 1 has 8[0-9]{3} tokens, .* 8192 positions"),
    ):
        sac.compress(["short", "lighthouse " * 4200])
    assert passes == []


def test_many_short_segments_share_passes(sac: Compressor) -> None:
    sink = len(sac.generator.tokenize(SINK, special=True))
    a_pass = Compressor.batch_tokens // (sink + 20)
    chunks = [[3 + (i + j) % 500 for j in range(20)] for i in range(a_pass * 2 + 1)]
    with passes_of(sac.generator) as passes:
        sac.compress_tokens(chunks)
    assert passes == [(a_pass, sink + 20), (a_pass, sink + 20), (1, sink + 20)]


def test_no_pass_is_larger_than_its_bound_unless_one_segment_is(llama: Generator) -> None:
    compressor = make_compressor(llama, "sac", segment_tokens=Compressor.batch_tokens)
    lengths = [Compressor.batch_tokens, 900, 30, 700, 5, 1000, 1, 300]
    with passes_of(llama) as passes:
        compressor.compress_tokens([[7] * length for length in lengths])
    assert sum(rows for rows, _ in passes) == len(lengths)
    assert all(rows == 1 or rows * slots <= Compressor.batch_tokens for rows, slots in passes)
    assert len(passes) < len(lengths)


# --- training


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
