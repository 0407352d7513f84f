"""The bench of batches answers the same questions in both ways."""

from __future__ import annotations

from support.models import PROSE, make_compressor, passes_of

from sac_rag.benchmarks.batches import measure
from sac_rag.benchmarks.first_token import FORMAT
from sac_rag.cached import CachedCompressor
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG


def test_the_same_questions_are_answered_one_by_one_and_together(llama: Generator) -> None:
    cached = CachedCompressor(make_compressor(llama, "shared"), {})
    rag = SacRAG(cached, prompt_format=FORMAT)
    options = {"questions": 3, "chunk_tokens": 40, "repeats": 1}
    with passes_of(llama) as passes:
        rows = list(measure(rag, PROSE * 20, ks=(1, 2), answer_tokens=(1, 4), **options))
    assert [(row.k, row.answer_tokens) for row in rows] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    # Behind compressing: two rounds of four tokens each way, for two numbers of chunks.
    assert sorted(passes[-64:]) == [1] * 3 * 4 * 4 + [3] * 4 * 4
    for row in rows:
        assert row.questions == 3
        assert row.one_by_one.median > 0 and row.together.median > 0
        assert row.faster == row.one_by_one.median / row.together.median
