"""Configs are checked at birth, and a fingerprint covers everything that determines a KV."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.models import make_compressor, make_model, make_tokenizer
from torch import Tensor

from sac_rag.compressors import base, checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.full import Full
from sac_rag.compressors.sac import SAC
from sac_rag.lm.generator import Generator

# For every field a value other than the one make_compressor sets, and what else it must change.
CHANGES: dict[str, tuple[Any, set[str]]] = {
    "method": ("other", set()),
    "ratio": (4, set()),
    "heading": ("text: ", set()),
    "anchors": ("surprisal", set()),
    "budget": ("shared", {"compressor_weights"}),
    "scorer_width": (16, set()),
    "anchor_embedding": ("none", {"compressor_weights"}),
    "positions": ("uniform", set()),
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
UNLIKE_LEARNED = {
    "method", "ratio", "anchors", "anchor_embedding", "attention", "budget", "positions",
}  # fmt: skip


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


def nudge(weight: Tensor) -> None:
    """Changes one element by as little as can be."""
    flat = weight.data.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))


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
    with pytest.raises(ValueError, match="one of sac, full, icae, x500, was: 'other'"):
        checkpoint.make(llama, CompressorConfig(method="other"))


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


def test_every_field_of_the_config_is_covered_below() -> None:
    assert set(CHANGES) == {field.name for field in fields(CompressorConfig)}


@pytest.mark.parametrize("field", CHANGES)
def test_changing_a_config_field_changes_the_fingerprint_for_that_field(
    llama: Generator, sac: Compressor, field: str
) -> None:
    value, also = CHANGES[field]
    base = {"budget": "learned", "positions": "x500"}.get(field, "sac")
    before = sac if base == "sac" else make_compressor(llama, base)
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
        "positions": "appended",
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
