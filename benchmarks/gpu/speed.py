"""Speed on one device: first token and decoding against HF reading the text, and compression.

Prints a table and writes JSON, row by row, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.chat import Markup
from sac_rag.prompts.format import PromptFormat
from sac_rag.prompts.generate import Decoding
from sac_rag.stores.memory import MemoryStore

QUESTION = "What is the most important thing that these passages say?"
CHUNK_TOKENS = 510


def main() -> None:
    """Measures every setting and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    parser.add_argument("--k", type=int, nargs="*", default=[1, 8, 15])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    options = parser.parse_args()

    generator = Generator.from_pretrained("smollm2-135m", device=options.device)
    folder = checkpoint.find("shipped", "smollm2-135m")
    compressor = checkpoint.load(folder, generator)
    texts = chunks_of(generator, max(options.k, default=1))
    rows: list[dict[str, Any]] = []

    def add(**row: Any) -> None:
        row = {"device": device_name(generator), "dtype": generator.dtype_name, **row}
        rows.append(row)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
        shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        sys.stdout.write(" ".join(shown) + "\n")

    def median(work: Callable[[], Any]) -> float:
        work()
        return statistics.median(seconds(work, generator) for _ in range(options.repeats))

    def add_answers(answer: Callable[[int], Any], **row: Any) -> None:
        first, whole = (median(partial(answer, count)) for count in (1, options.tokens))
        add(**row, first_token_s=first, later_token_s=(whole - first) / (options.tokens - 1))

    add_answers(ask(compressor, []), reads="nothing", k=0)
    for k in options.k:
        for ratio in (1, 5, 15):
            answer = ask(compressor.at_ratio(ratio), texts[:k])
            add_answers(answer, reads="anchors", k=k, ratio=ratio)
        add_answers(read_text(generator, texts[:k]), reads="text", k=k)
    many = [generator.tokenize(text) for text in texts] * 4
    count = sum(map(len, many))
    compress = partial(compressor.merged().compress_tokens, many)
    add(compresses="at 5x", tokens_per_s=count / median(compress))
    add(compresses="bare prefill", tokens_per_s=count / median(partial(prefill, generator, many)))


def chunks_of(generator: Generator, count: int) -> list[str]:
    """Texts of about CHUNK_TOKENS tokens each."""
    words = "The keeper of lighthouse number {} counted ships, gulls and lamps in the year {}. "
    texts = []
    for number in range(count):
        text = "".join(words.format(number, 1800 + i) for i in range(60))
        ids = generator.tokenize(text)[:CHUNK_TOKENS]
        texts.append(generator.tokenizer.decode(ids))
    return texts


def ask(compressor: Compressor, texts: list[str]) -> Callable[[int], Any]:
    """Answers from anchors in memory, with as many tokens as the call says."""
    cached = CachedCompressor(compressor, MemoryStore(), guard=False)
    rag = SacRAG(cached, prompt_format=PromptFormat(chunk="{chunk}"))
    rag.precompress(texts)
    return lambda count: rag.answer(QUESTION, texts, Decoding(max_new_tokens=count))


def read_text(generator: Generator, texts: list[str]) -> Callable[[int], Any]:
    """HF's generate on the same prompt as text."""
    prompt = PromptFormat(chunk="{chunk}")
    pieces = prompt.pieces(generator.tokenizer, QUESTION, [Chunk(text) for text in texts])
    ids = [
        i
        for piece in pieces
        for i in generator.tokenize(
            piece if isinstance(piece, str) else piece.text, special=isinstance(piece, Markup)
        )
    ]
    row = torch.tensor([ids], device=generator.device)

    def generate(count: int) -> Any:
        with generator.running() as model, torch.no_grad():
            return model.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )

    return generate


@torch.no_grad()
def prefill(generator: Generator, chunks: list[list[int]]) -> None:
    """The bare model over the same tokens, eight chunks per pass."""
    with generator.running() as model:
        for begin in range(0, len(chunks), 8):
            rows = [torch.tensor(ids) for ids in chunks[begin : begin + 8]]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(generator.device)
            model.base_model(input_ids=padded, use_cache=True)


def seconds(work: Callable[[], Any], generator: Generator) -> float:
    """Wall time of some work, with what it left running on the device."""
    synchronize(generator)
    begin = time.perf_counter()
    work()
    synchronize(generator)
    return time.perf_counter() - begin


def synchronize(generator: Generator) -> None:
    """Waits for the device."""
    if generator.device.type == "cuda":
        torch.cuda.synchronize()


def device_name(generator: Generator) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if generator.device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
