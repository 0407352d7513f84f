"""What the README says is in the key: change it, and the entry is a miss, never a wrong answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from tokenizers import AddedToken

from sac_rag.cached import CachedCompressor
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.generate import Decoding

TEXT = PROSE[0]


def rag_with(store: dict[str, AnchorKV], **changes: Any) -> SacRAG:
    """A pipeline that differs from the default one in what is named."""
    model = make_model(changes.get("architecture", "llama"), seed=changes.get("seed", 0))
    changes.get("model", lambda model: None)(model)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(changes.get("tokens", []))
    generator = Generator(model.to(changes.get("dtype", torch.float32)), tokenizer)
    compressor = make_compressor(generator, "sac", **changes.get("config", {}))
    changes.get("weights", lambda weights: None)(compressor.weights)
    cached = CachedCompressor(compressor, store, namespace=changes.get("namespace", ""))
    return SacRAG(cached, decoding=Decoding(max_new_tokens=6))


def nudge(weight: torch.Tensor) -> None:
    """Changes the last bit of one number."""
    flat = weight.data.view(-1)
    flat[7] = torch.nextafter(flat[7], torch.tensor(torch.inf))


def nudge_model(model: Any) -> None:
    nudge(model.model.layers[1].mlp.down_proj.weight)


def other_epsilon(model: Any) -> None:
    model.config.rms_norm_eps = 1e-5


def nudge_cue(weights: dict[str, torch.Tensor]) -> None:
    nudge(weights["cue"])


def nudge_lora(weights: dict[str, torch.Tensor]) -> None:
    nudge(next(weight for name, weight in weights.items() if "lora_B" in name))


def described(value: Any) -> str:
    """The same in every process: a function by its name, not by its address."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {getattr(v, '__name__', v)}" for k, v in value.items())
    return str(value)[:20]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 1}, TEXT),
        ({"model": nudge_model}, TEXT),
        ({"model": other_epsilon}, TEXT),
        ({"architecture": "llama3"}, TEXT),
        ({"dtype": torch.bfloat16}, TEXT),
        ({"tokens": ["glacier"]}, TEXT),
        ({"tokens": [AddedToken("<tool_call>", special=False)]}, TEXT),
        ({"config": {"ratio": 4}}, TEXT),
        ({"config": {"heading": "Text: "}}, TEXT),
        ({"config": {"sink": "Once"}}, TEXT),
        ({"config": {"attention": "anchors"}}, TEXT),
        ({"config": {"segment_tokens": 100}}, TEXT),
        ({"config": {"stored_dtype": "bfloat16"}}, TEXT),
        ({"config": {"stored_dtype": "int8"}}, TEXT),
        ({"weights": nudge_cue}, TEXT),
        ({"weights": nudge_lora}, TEXT),
        ({"namespace": "tenant"}, TEXT),
        ({}, f"{TEXT} "),
        ({}, TEXT.replace("seven", "Seven")),
        ({}, f"{TEXT}\u200b"),
    ],
    ids=described,
)
def test_a_change_is_a_miss_and_the_answer_that_of_an_empty_store(
    changes: dict[str, Any], text: str
) -> None:
    store: dict[str, AnchorKV] = {}
    rag_with(store).precompress([TEXT])
    changed = rag_with(store, **changes).answer("How many?", [text])
    fresh = rag_with({}, **changes).answer("How many?", [text])
    assert [report.status for report in changed.chunks] != ["hit"]
    assert changed.text == fresh.text
    assert len(store) == 2


def test_how_a_chunk_is_used_is_no_change() -> None:
    store: dict[str, AnchorKV] = {}
    rag_with(store).precompress([TEXT])
    for question, chunks in (("Who?", [TEXT]), ("How many?", [PROSE[1], TEXT])):
        assert rag_with(store).answer(question, chunks).chunks[-1].status == "hit"
