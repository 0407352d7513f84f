"""The device gives what the CPU gives: run on CUDA where there is one, else on the CPU.

`SAC_RAG_DEVICE` names another device. TOLERANCE: logits are of order 10; float32 sums in another
order differ by less than 1e-3, a wrong position by more than 0.1.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from torch import Tensor

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.evaluation.questions import Question
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.assemble import assemble
from sac_rag.prompts.format import SPANS, PromptFormat
from sac_rag.prompts.generate import Decoding
from sac_rag.stores.memory import MemoryStore

pytestmark = pytest.mark.cuda

DEVICE = os.environ.get("SAC_RAG_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-3
# Logits that lie closer in bfloat16 may change places.
NEAR_TIE = 0.25
QUESTION = "Who counted ships?"
TOKENIZER = make_tokenizer()


def make(
    architecture: str = "llama",
    attention: str = "sdpa",
    *,
    device: str = DEVICE,
    dtype: torch.dtype = torch.float32,
) -> Generator:
    model = make_model(architecture, attention).to(device, dtype)
    return Generator(model, TOKENIZER)


def logits_of(generator: Generator, parts: list[Any], cue: Tensor | None = None) -> Tensor:
    """Logits of every plain token. Shape: (tokens, vocabulary)"""
    prompt = assemble([parts], generator, cue=cue)
    with generator.running(prompt.adapter) as model, torch.no_grad():
        logits: Tensor = model(**prompt.inputs()).logits[0]
    return logits.float().cpu()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "llama3", "qwen2", "qwen3"])
def test_full_equals_plain_reading(architecture: str, attention: str) -> None:
    generator = make(architecture, attention)
    prefix = "<|im_start|>user\n"
    full = make_compressor(generator, "full", sink=prefix)
    before = generator.tokenize(prefix, special=True)
    chunk, after = generator.tokenize(PROSE[0]), generator.tokenize(QUESTION)
    (kv,) = full.compress_tokens([chunk])
    got = logits_of(generator, [before, kv, after])
    ids = torch.tensor([[*before, *chunk, *after]], device=generator.device)
    with torch.no_grad():
        expected = generator.model(ids).logits[0].float().cpu()
    torch.testing.assert_close(got[-len(after) :], expected[-len(after) :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["sac", "learned", "shared"])
def test_anchors_and_answers_are_those_of_the_cpu(method: str, attention: str) -> None:
    logits, entries = [], []
    for device in ("cpu", DEVICE):
        generator = make("llama", attention, device=device)
        compressor = make_compressor(generator, method)
        chunks = [generator.tokenize(text) for text in PROSE[:3]]
        kvs = compressor.compress_tokens(chunks)
        entries.append([(kv.heads.cpu().tolist(), kv.positions.cpu().tolist()) for kv in kvs])
        before = generator.tokenize("<|im_start|>user\n", special=True)
        parts = [before, *kvs, generator.tokenize(QUESTION)]
        logits.append(logits_of(generator, parts, compressor.cue))
    assert entries[0] == entries[1]
    torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", ["full", "shared"])
def test_batches_streams_and_stored_chunks_answer_alike(method: str) -> None:
    generator = make()
    rag = SacRAG(
        CachedCompressor(make_compressor(generator, method), MemoryStore()),
        prompt_format=PromptFormat(),
        decoding=Decoding(max_new_tokens=12),
    )
    asked = [(QUESTION, PROSE[:3]), ("What is slow?", PROSE[3:4]), ("When?", PROSE[2:6])]
    computed = [rag.answer(*one).text for one in asked]
    assert [answer.text for answer in rag.batch(asked)] == computed
    assert ["".join(rag.stream(*one)) for one in asked] == computed
    assert all(chunk.status == "hit" for chunk in rag.answer(*asked[0]).chunks)


def test_bfloat16_decodes_as_hf_does_up_to_near_ties() -> None:
    generator = make(dtype=torch.bfloat16)
    prefix = "<|im_start|>user\n"
    full = make_compressor(generator, "full", sink=prefix).storing("bfloat16")
    before = generator.tokenize(prefix, special=True)
    chunk, after = generator.tokenize(PROSE[3]), generator.tokenize("\nWhat is slow?")
    (kv,) = full.compress_tokens([chunk])
    ids = torch.tensor([[*before, *chunk, *after]], device=generator.device)
    written = generator.model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
    answer = written[0, ids.shape[1] :].tolist()
    with torch.no_grad():
        expected = generator.model(written).logits[0, ids.shape[1] - 1 : -1].float().cpu()
    got = logits_of(generator, [before, kv, [*after, *answer]])[len(before) :]
    got = got[len(after) - 1 : len(after) - 1 + len(answer)]
    best = expected.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] > NEAR_TIE
    assert clear.sum() >= len(answer) // 4
    assert torch.equal(got.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize("match", ["none", "self"])
def test_a_training_step_has_the_loss_and_the_gradient_of_the_cpu(match: Any) -> None:
    pytest.importorskip("accelerate", reason="needs the 'train' extra")
    from sac_rag.training.objective import Objective
    from sac_rag.training.rows import RowMaker

    losses, gradients = [], []
    for device in ("cpu", DEVICE):
        generator = make(device=device)
        compressor = make_compressor(generator, "shared")
        maker = RowMaker(generator, [SPANS, PromptFormat()])
        questions = [Question("0", QUESTION, ("The lighthouse keeper",))]
        rows = [maker.ask([Chunk(PROSE[1]), Chunk(PROSE[0])], questions, prompt=i) for i in (0, 1)]
        for name, weight in compressor.weights.items():
            weight.requires_grad_(name not in compressor.fitted)
        loss = Objective(compressor, maker.prefix_ids, match=match).loss(rows, 3)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        gradients.append(
            torch.cat(
                [w.grad.flatten().cpu() for w in compressor.weights.values() if w.grad is not None]
            )
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    scale = float(gradients[0].abs().max())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3 * scale, rtol=1e-2)
