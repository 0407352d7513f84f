"""The bench of decoding measures each way, for each number of rows."""

from __future__ import annotations

from typing import Any

from support.models import PROSE
from transformers import LlamaConfig, LlamaForCausalLM

from sac_rag.benchmarks.decode import measure
from sac_rag.lm.generator import Generator


def test_every_way_is_measured_for_each_number_of_rows(tokenizer: Any) -> None:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=1,
        eos_token_id=0,
    )
    generator = Generator(LlamaForCausalLM(config), tokenizer)
    measured = measure(generator, PROSE[0], rows=(1, 2), tokens=2, repeats=1)
    ways = ["generate", "decoder", "float16", "int8", "int4", "bound"]
    assert [(row.way, row.rows) for row in measured] == [(w, n) for n in (1, 2) for w in ways]
    assert all(row.token_ms > 0 for row in measured)
    assert [row.relative for row in measured if row.way == "generate"] == [1, 1]
