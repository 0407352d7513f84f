"""A second LoRA answers, where a compressor was trained with one, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import (
    PROSE,
    logits_of,
    make_compressor,
    make_model,
    make_tokenizer,
    next_tokens,
)

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.evaluation.comparison import to_markdown
from sac_rag.evaluation.quality import evaluate
from sac_rag.evaluation.questions import QAExample, Question
from sac_rag.evaluation.sample import draw
from sac_rag.lm.generator import Generator
from sac_rag.origin import Origin
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.assemble import Prompt, assemble
from sac_rag.prompts.format import SPANS
from sac_rag.prompts.generate import Decoding
from sac_rag.training.objective import Objective
from sac_rag.training.rows import RowMaker

ADAPTER = "generator_adapter."
SAMPLE = draw(
    [
        QAExample((Chunk(text),), (Question(str(i), "What about it?", (text.split()[0],)),))
        for i, text in enumerate(PROSE[:4])
    ],
    k=1,
    seed=0,
)


@pytest.fixture
def own(make_generator: Callable[..., Generator]) -> Generator:
    return make_generator("llama")


@pytest.fixture(params=["learned", "shared"])
def adapted(own: Generator, request: pytest.FixtureRequest) -> Compressor:
    """With a generator adapter that makes a difference."""
    return make_compressor(own, request.param, generator_adapter_rank=2)


def prompt_of(compressor: Compressor) -> Prompt:
    return assemble(
        [[compressor.compress(PROSE[:1])[0], compressor.generator.tokenize("And then?")]],
        compressor.generator,
        cue=compressor.cue,
        adapter=compressor.generator_adapter,
    )


def test_it_changes_answers_but_neither_anchors_nor_the_model(adapted: Compressor) -> None:
    generator = adapted.generator
    ids = torch.tensor([generator.tokenize(PROSE[1])])
    with torch.no_grad():
        plain = generator.model(ids).logits
    frozen = adapted.without_generator_adapter()
    assert adapted.compress(PROSE[:1])[0].bit_equal(frozen.compress(PROSE[:1])[0])
    with_it, without = (logits_of(generator, prompt_of(c)) for c in (adapted, frozen))
    assert (with_it - without).abs().max() > 0.01
    with torch.no_grad():
        assert torch.equal(generator.model(ids).logits, plain)


def test_answers_are_written_with_it(adapted: Compressor) -> None:
    generator, prompt = adapted.generator, prompt_of(adapted)
    first = next(next_tokens(generator, prompt_of(adapted), Decoding()))
    assert first.item() == logits_of(generator, prompt)[0, -1].argmax()
    rag = SacRAG(CachedCompressor(adapted, {}), prompt_format=SPANS)
    plain = SacRAG(CachedCompressor(adapted.without_generator_adapter(), {}), prompt_format=SPANS)
    answers = [
        r.answer("What is it?", PROSE[:2], Decoding(max_new_tokens=20)).text for r in (rag, plain)
    ]
    assert answers[0] != answers[1]


def test_untrained_it_changes_nothing(own: Generator) -> None:
    adapted = make_compressor(own, "learned", generator_adapter_rank=2)
    for name, weight in adapted.weights.items():
        if name.startswith(ADAPTER) and "lora_B" in name:
            weight.detach().zero_()
    frozen = adapted.without_generator_adapter()
    assert torch.equal(*(logits_of(own, prompt_of(c)) for c in (adapted, frozen)))


def test_both_learn_and_what_is_saved_reads_the_same(adapted: Compressor, tmp_path: Path) -> None:
    generator = adapted.generator
    maker = RowMaker(generator, SPANS)
    row = maker.ask([Chunk(PROSE[0])], [Question("0", "What is it?", ("the harbour",))])
    objective = Objective(adapted, maker.prefix_ids)
    learned = [n for n in adapted.weights if n not in adapted.fitted]
    gradients = torch.autograd.grad(
        objective.loss([row], 3), [adapted.weights[n] for n in learned], allow_unused=True
    )
    moved = {n for n, g in zip(learned, gradients, strict=True) if g is not None and g.any()}
    # What the last layer makes of its attention goes into no key or value.
    idle = {n for n in learned if "layers.2.self_attn.q_proj" in n and not n.startswith(ADAPTER)}
    assert moved == set(learned) - idle
    checkpoint.save(adapted, tmp_path)
    loaded = checkpoint.load(tmp_path, Generator(make_model("llama"), make_tokenizer()))
    before = objective.predict([row], 3).logits
    assert torch.equal(Objective(loaded, maker.prefix_ids).predict([row], 3).logits, before)


def test_text_is_read_by_the_frozen_model_and_the_figures_say_who_answered(own: Generator) -> None:
    results = {}
    for rank in (0, 2):
        compressor = make_compressor(own, "learned", generator_adapter_rank=rank)
        rag = SacRAG(CachedCompressor(compressor, {}), prompt_format=SPANS)
        for system in ("compressed", "full-text"):
            results[rank, system] = evaluate(rag, SAMPLE, system=system, max_new_tokens=6)
    assert {at: result.generator_adapter for at, result in results.items()} == {
        (0, "compressed"): 0,
        (0, "full-text"): 0,
        (2, "compressed"): 2,
        (2, "full-text"): 0,
    }
    table = to_markdown(list(results.values())).splitlines()
    assert [line.split(" | ")[5] for line in table if not line.startswith("| ---")] == [
        "generator adapter",
        "none",
        "none",
        "rank 2",
        "none",
    ]
    assert "adapter" not in to_markdown([results[0, "compressed"]])


def test_text_is_answered_as_if_there_were_none(adapted: Compressor, tmp_path: Path) -> None:
    answers = []
    for number, compressor in enumerate((adapted, adapted.without_generator_adapter())):
        rag = SacRAG(CachedCompressor(compressor, {}), prompt_format=SPANS)
        out = tmp_path / str(number)
        evaluate(rag, SAMPLE, system="full-text", max_new_tokens=20, out=out)
        answers.append([line.split('"em"')[0] for line in out.read_text().splitlines()[1:]])
    assert answers[0] == answers[1]


def test_what_it_belongs_to_cannot_be_carried_without_it(adapted: Compressor) -> None:
    with pytest.raises(ValueError, match=r"generator adapter \(rank 2\).*load the compressor"):
        Origin.of(adapted)


def test_it_needs_modules(own: Generator) -> None:
    with pytest.raises(ValueError, match="lora_targets must name the modules of the generator ad"):
        make_compressor(own, "learned", generator_adapter_rank=2, lora_targets=())
