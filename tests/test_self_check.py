"""Only a model that is proven to read moved chunks like plain text is used, and proven once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import ARCHITECTURES, PROSE, make_compressor, make_model, passes_of
from transformers import PreTrainedTokenizerFast

from sac_rag.errors import UnsupportedModelError
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import assemble
from sac_rag.self_check import self_check

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAC_RAG_HOME", str(tmp_path))
    return tmp_path


def generator_of(name: str, tokenizer: Any, **changes: Any) -> Generator:
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.15)
    return Generator(model, tokenizer)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-3), (torch.float16, 0.03), (torch.bfloat16, 0.1)]
)
@pytest.mark.parametrize("architecture", ["llama", "llama3", "qwen2", "qwen3"])
def test_supported_models_pass_in_every_dtype(
    architecture: str, dtype: torch.dtype, rounding: float, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert 0 < self_check(Generator(make_model(architecture).to(dtype), tokenizer)) < rounding


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mistral", {"sliding_window": None}),
        ("Gemma", {}),
        ("Olmo2", {}),
        ("Phi", {"num_key_value_heads": 4}),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 1024,
                }
            },
        ),
    ],
    ids=["mistral", "gemma", "olmo2", "phi", "yarn"],
)
@torch.no_grad()
def test_what_passes_reads_a_moved_chunk_like_plain_text(
    name: str, changes: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = generator_of(name, tokenizer, **changes)
    self_check(generator)
    prefix = "<|im_start|>user\n" + PROSE[1]
    before = generator.tokenize(prefix, special=True)
    chunk, after = generator.tokenize(PROSE[0]), generator.tokenize(" Who counted?")
    kvs = make_compressor(generator, "full", sink=prefix).compress_tokens([chunk])
    prompt = assemble([[before, *kvs, after]], generator)
    got = generator.model(**prompt.inputs()).logits[0, -1]
    expected = generator.model(torch.tensor([[*before, *chunk, *after]])).logits[0, -1]
    assert (got - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ["Cohere", "Glm", "SmolLM3"])
def test_models_that_rotate_otherwise_are_refused_with_the_error(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"at most 0\.001 in torch\.float32\), was: [0-9]"
    ):
        self_check(generator_of(name, tokenizer))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GPTNeoX", {}),
        (
            "DeepseekV3",
            {
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 16,
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
            },
        ),
    ],
)
def test_models_of_another_make_pass_or_are_refused_but_do_not_crash(
    name: str, changes: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    shape = {**changes}
    if name == "GPTNeoX":
        shape["num_key_value_heads"] = None
    try:
        error = self_check(generator_of(name, tokenizer, **shape))
    except UnsupportedModelError:
        return
    assert error < 1e-3


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.01, -1.0])
def test_wrong_frequencies_are_refused_every_time(
    make_generator: Callable[..., Generator], factor: float
) -> None:
    generator = make_generator("llama")
    generator.frequencies = generator.frequencies * factor
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(
            UnsupportedModelError, match="llama: a moved chunk must read like plain"
        ):
            self_check(generator)


def test_a_model_without_finite_numbers_is_refused(
    make_generator: Callable[..., Generator],
) -> None:
    generator = make_generator("llama")
    generator.model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="was: nan"):
        self_check(generator)


def test_a_success_is_remembered_without_running_the_model(
    make_generator: Callable[..., Generator],
) -> None:
    measured = self_check(make_generator("llama"))
    again = make_generator("llama")
    with passes_of(again) as passes:
        assert self_check(again) == measured
    assert passes == []


@pytest.mark.parametrize("other", [("qwen3",), ("llama", "eager"), ("llama", "sdpa", 1)])
def test_another_model_or_backend_is_measured_anew(
    make_generator: Callable[..., Generator], other: tuple[Any, ...]
) -> None:
    self_check(make_generator("llama"))
    generator = make_generator(*other)
    with passes_of(generator) as passes:
        self_check(generator)
    assert passes


@pytest.mark.parametrize("content", ["", "{", "[]", '{"relative_error": null}', "null", "1"])
def test_a_damaged_record_is_measured_anew_and_mended(
    make_generator: Callable[..., Generator], home: Path, content: str
) -> None:
    generator = make_generator("llama")
    measured = self_check(generator)
    (record,) = home.rglob("*.json")
    whole = record.read_text()
    record.write_text(content)
    with passes_of(generator) as passes:
        assert self_check(generator) == measured
    assert passes
    assert record.read_text() == whole
    assert list(home.rglob("*.part")) == []


def test_a_home_that_cannot_be_written_costs_only_the_memory(
    make_generator: Callable[..., Generator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SAC_RAG_HOME", str(tmp_path / "file" / "home"))
    generator = make_generator("llama")
    assert self_check(generator) == self_check(generator)


def test_the_adapter_of_a_compressor_does_not_disturb_the_check(
    make_generator: Callable[..., Generator],
) -> None:
    generator = make_generator("llama")
    make_compressor(generator, "sac")
    assert self_check(generator) < 1e-3


@pytest.mark.parametrize("max_positions", [40, 600])
def test_a_model_of_few_positions_can_be_checked(
    tokenizer: PreTrainedTokenizerFast, max_positions: int
) -> None:
    generator = generator_of("Llama", tokenizer, max_position_embeddings=max_positions)
    assert self_check(generator) < 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_heads_that_keep_different_tokens_are_checked_where_budgets_are_shared(
    make_generator: Any, architecture: str, attention: str, home: Path
) -> None:
    assert 0 < self_check(make_generator(architecture, attention), ragged=True) < 1e-3


@pytest.mark.parametrize("name", ["StableLm", "DiffLlama"])
def test_models_whose_layers_know_no_masks_of_each_head_are_refused_for_shared_budgets_alone(
    name: str, tokenizer: PreTrainedTokenizerFast, home: Path
) -> None:
    generator = generator_of(name, tokenizer)
    assert self_check(generator) < 1e-3
    with pytest.raises(UnsupportedModelError, match="use compressor='full' or budget='uniform'"):
        self_check(generator, ragged=True)
