"""Tiny models of every supported architecture, built in memory from configs, with real tokenizers.

Weights are random but seeded, and large enough that every position, head and layer matters to the
logits: with the default initialisation a wrong key would hardly be seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sac_rag.compressors.base import Compressor
from sac_rag.compressors.checkpoint import make
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.full import Full
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Prompt
from sac_rag.prompts.chat import opening
from sac_rag.prompts.decode import Decoder
from sac_rag.prompts.decoding import Decoding

ARCHITECTURES = ("llama", "llama3", "qwen2", "qwen3")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PROSE = (
    "The lighthouse keeper counted seven ships before the fog came in from the west.",
    "Copper conducts electricity better than iron, and silver better than copper.",
    "In 1889 the tower was finished, and for forty-one years nothing was taller.",
    "A glacier moves so slowly that only a patient observer would call it a river.",
    "She planted barley in March, harvested in August, and sold the straw in September.",
    "The treaty was signed in two languages, neither of which the witnesses could read.",
    "Owls hear a mouse under thirty centimetres of snow and never miss it.",
    "Every Thursday the library stays open until the last reader has gone home.",
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens: any text goes in and comes out again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )


def make_model(architecture: str, attention: str = "sdpa", seed: int = 0) -> Any:
    shape = {
        "vocab_size": 512,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "attn_implementation": attention,
    }
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    torch.manual_seed(seed)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "llama3": lambda: LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=llama3)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape)),
    }[architecture]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.15 if "embed" not in name else 0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
        # A random model must not end its answers before they have begun.
        model.lm_head.weight[0] = 0
    return model


# SAC with anchors that each head chooses for itself, by a scorer.
LEARNED = {
    "anchors": "learned",
    "scorer_width": 8,
    "anchor_embedding": "none",
    "attention": "causal",
}


def make_compressor(generator: Generator, method: str, **changes: Any) -> Compressor:
    """A compressor in float32 whose weights, if it has any, are random instead of untrained.

    Args:
        method: A method's name; "learned" for SAC with learned anchors; "shared" for that with a
            budget for each head.
    """
    if method == "shared":
        method, changes = "learned", {"budget": "shared", **changes}
    if method == "learned":
        method, changes = "sac", {**LEARNED, **changes}
    sink = changes.pop("sink", opening(generator.tokenizer))
    if method == "full":
        return Full(generator, Full.default_config(sink=sink, stored_dtype="float32", **changes))
    settings = {"ratio": 3, "lora_rank": 4, "lora_alpha": 8, "stored_dtype": "float32", **changes}
    if method in ("icae", "x500"):
        settings = {"attention": "causal", "anchor_embedding": "slot", **settings}
    compressor = make(generator, CompressorConfig(method=method, sink=sink, **settings))
    random = torch.Generator().manual_seed(1)
    compressor.load_weights(
        {
            name: torch.randn(weight.shape, generator=random) * 0.1
            for name, weight in compressor.weights.items()
        }
    )
    return compressor


@contextmanager
def passes_of(generator: Generator) -> Iterator[list[int]]:
    """Notes every forward pass of the decoder stack, one item each: its rows."""
    passes: list[int] = []
    handle = generator.model.base_model.register_forward_hook(
        lambda module, args, output: passes.append(len(output[0]))
    )
    try:
        yield passes
    finally:
        handle.remove()


def logits_of(generator: Generator, prompt: Prompt) -> Tensor:
    """What is predicted behind each plain token. Shape: (rows, tokens, vocabulary)."""
    with generator.running(prompt.adapter) as model, torch.no_grad():
        logits: Tensor = model(**prompt.inputs()).logits
    return logits


def elsewhere(work: Callable[[], Any]) -> Any:
    """Does work in another thread; one that waits for a locked model forever fails the test."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert results, "the other thread did not get the model"
    return results[0]


def next_tokens(generator: Generator, prompt: Prompt, decoding: Decoding) -> Iterator[Tensor]:
    """Reads a prompt in one forward pass, then generates token by token, whatever the tokens are.

    Yields:
        The next token of every row. Shape: (rows,)
    """
    decoder = Decoder(generator)
    yield decoder.join(prompt, decoding)
    for _ in range(decoding.max_new_tokens - 1):
        yield decoder.step()
