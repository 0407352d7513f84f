"""The compressor that comes with the package: it loads, it is small, and what it keeps is read."""

from __future__ import annotations

import hashlib

import pytest

from sac_rag.cached import CachedCompressor
from sac_rag.compressors import checkpoint
from sac_rag.pipeline import SacRAG

pytestmark = pytest.mark.real_model

# Nothing of it is in the prompt's own examples, and no question says its answer.
FACTS = {
    "The tower of Brakel was rebuilt in 1753 after a fire that began in the bakery.": {
        "When was the tower rebuilt?": "1753",
        "Where did the fire begin?": "bakery",
    },
    "Tenzin Dorje led the second expedition, which carried a barometer and nine dogs.": {
        "Who led the second expedition?": "Tenzin Dorje",
        "How many dogs did the expedition carry?": "nine",
    },
    "Salt from the mines at Orva was shipped to Lisbon in barrels made of chestnut.": {
        "Where was the salt shipped?": "Lisbon",
        "What were the barrels made of?": "chestnut",
    },
}
ASKED = [
    (text, question, gold) for text, asked in FACTS.items() for question, gold in asked.items()
]


@pytest.fixture(scope="module")
def shipped() -> SacRAG:
    return SacRAG.from_pretrained("smollm2-135m", dtype="float32")


def at_ratio(rag: SacRAG, ratio: int) -> SacRAG:
    compressor = rag.compressor.inner.at_ratio(ratio)
    return SacRAG(CachedCompressor(compressor, {}), prompt_format=rag.prompt_format)


def right(rag: SacRAG, shift: int = 0) -> int:
    """How many questions are answered, each from its text or from another's."""
    texts = list(FACTS)
    answers = rag.batch(
        [
            (question, [texts[(texts.index(text) + shift) % len(texts)]])
            for text, question, _ in ASKED
        ]
    )
    pairs = zip(answers, ASKED, strict=True)
    return sum(gold.lower() in answer.text.lower() for answer, (_, _, gold) in pairs)


def test_it_is_the_default_and_brings_its_prompt(shipped: SacRAG) -> None:
    config = shipped.compressor.config
    assert (config.method, config.stored_dtype) == ("sac", "bfloat16")
    assert shipped.prompt_format == checkpoint.load_prompt_format(
        checkpoint.WEIGHTS / "smollm2-135m"
    )
    assert shipped.prompt_format.prefix.startswith(config.sink)


def test_it_is_small_and_of_the_named_model(shipped: SacRAG) -> None:
    folder = checkpoint.WEIGHTS / "smollm2-135m"
    assert (folder / "compressor.safetensors").stat().st_size <= 10_000_000
    _, weights = checkpoint.read(folder)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert weights.keys() == shipped.compressor.inner.weights.keys()


@pytest.mark.parametrize(("ratio", "least"), [(1, 5), (2, 5), (3, 4), (5, 3)])
def test_what_it_keeps_is_what_is_answered(shipped: SacRAG, ratio: int, least: int) -> None:
    rag = at_ratio(shipped, ratio)
    assert right(rag) >= least
    assert right(rag, shift=1) == 0


def test_answers_are_written_by_the_frozen_model(shipped: SacRAG) -> None:
    """The weights are on while a chunk is read, and off while an answer is written."""
    without = SacRAG.from_pretrained("smollm2-135m", compressor="full", dtype="float32")
    for question in ("What is the capital of France?", "Who painted the Mona Lisa?"):
        asked = SacRAG(without.compressor, prompt_format=shipped.prompt_format).answer(question, [])
        assert shipped.answer(question, []).text == asked.text


def test_the_fitted_one_keeps_what_is_answered_too_and_ends_by_itself() -> None:
    rag = SacRAG.from_pretrained("smollm2-135m", compressor="fitted", dtype="float32")
    config = rag.compressor.config
    assert (config.budget, config.ratio, config.lora_targets) == ("shared", 5, ())
    answers = rag.batch([(question, [text]) for text, question, _ in ASKED])
    pairs = zip(answers, ASKED, strict=True)
    assert sum(gold.lower() in answer.text.lower() for answer, (_, _, gold) in pairs) >= 4
    assert all(answer.finish_reason == "eos" for answer in answers)


@pytest.mark.parametrize("name", ["smollm2-135m", "fitted/smollm2-135m"])
def test_its_card_is_of_these_weights(name: str) -> None:
    folder = checkpoint.WEIGHTS / name
    digest = hashlib.sha256((folder / "compressor.safetensors").read_bytes()).hexdigest()
    assert digest in (folder / "README.md").read_text(encoding="utf-8")
