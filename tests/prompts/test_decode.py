"""Rows that come and go have the tokens that they have alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from support.models import PROSE, make_compressor, next_tokens
from torch import Tensor

from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Prompt, assemble
from sac_rag.prompts.decode import Decoder
from sac_rag.prompts.generate import Decoding

GREEDY = Decoding(max_new_tokens=80)
QUESTIONS = ("Who counted?", "What conducts electricity, and what does it better?", "And then?")


def prompt_of(compressor: Compressor, chunks: Sequence[str], question: str) -> Prompt:
    generator = compressor.generator
    kvs = compressor.compress(list(chunks))
    return assemble([[*kvs, generator.tokenize(f"\n\nQ: {question}\nA:")]], generator)


@pytest.fixture(scope="module", params=["full", "sac", "shared"])
def compressor(request: pytest.FixtureRequest, llama: Generator) -> Compressor:
    return make_compressor(llama, request.param)


@pytest.fixture(scope="module")
def prompts(compressor: Compressor) -> list[Callable[[], Prompt]]:
    """Prompts of different lengths; a pass changes a prompt's cache, so each call makes them."""
    return [
        lambda count=count, question=question: prompt_of(compressor, PROSE[:count], question)
        for count, question in zip((2, 1, 4), QUESTIONS, strict=True)
    ]


def alone(generator: Generator, prompt: Prompt, count: int, decoding: Decoding) -> list[int]:
    tokens = next_tokens(generator, prompt, decoding)
    return [int(token) for token, _ in zip(tokens, range(count), strict=False)]


def test_rows_join_and_leave_without_a_change_to_the_others(
    compressor: Compressor, prompts: list[Callable[[], Prompt]]
) -> None:
    generator = compressor.generator
    expected = [alone(generator, prompt(), 12, GREEDY) for prompt in prompts]
    got: list[list[int]] = [[], [], []]
    decoder = Decoder(generator)

    def note(rows: Sequence[int], tokens: Tensor) -> None:
        for row, token in zip(rows, tokens.tolist(), strict=True):
            got[row].append(token)

    note([0], decoder.join(prompts[0](), GREEDY))
    note([0], decoder.step())
    note([1], decoder.join(prompts[1](), GREEDY))
    note([0, 1], decoder.step())
    note([0, 1], decoder.step())
    note([2], decoder.join(prompts[2](), GREEDY))
    for _ in range(3):
        note([0, 1, 2], decoder.step())
    decoder.keep([0, 2])
    assert len(decoder) == 2
    for _ in range(4):
        note([0, 2], decoder.step())
    decoder.keep([1])
    for _ in range(2):
        note([2], decoder.step())
    decoder.keep([])
    assert len(decoder) == 0
    assert list(map(len, got)) == [11, 6, 10]
    for tokens, whole in zip(got, expected, strict=True):
        assert tokens == whole[: len(tokens)]


def test_chunks_with_and_without_budgets_are_rows_side_by_side(llama: Generator) -> None:
    equal, shared = make_compressor(llama, "sac"), make_compressor(llama, "shared")
    pairs = [(equal, QUESTIONS[0]), (shared, QUESTIONS[1]), (equal, QUESTIONS[2])]
    expected = [alone(llama, prompt_of(c, PROSE[:3], q), 6, GREEDY) for c, q in pairs]
    decoder = Decoder(llama)
    firsts = [int(decoder.join(prompt_of(c, PROSE[:3], q), GREEDY)) for c, q in pairs]
    steps = [decoder.step().tolist() for _ in range(5)]
    assert [list(row) for row in zip(firsts, *steps, strict=True)] == expected


def test_an_answer_may_be_of_any_length(llama: Generator) -> None:
    full = make_compressor(llama, "full", sink="")
    many = Decoding(max_new_tokens=150)
    whole = prompt_of(full, PROSE[:1], QUESTIONS[0])
    tokens = alone(llama, whole, 150, many)
    assert len(tokens) == 150
    # The same by plain reading of everything before each token.
    ids = [*llama.tokenize(PROSE[0]), *llama.tokenize(f"\n\nQ: {QUESTIONS[0]}\nA:")]
    for count in (63, 64, 65, 130):
        plain = assemble([[ids + tokens[:count]]], llama)
        assert alone(llama, plain, 1, GREEDY) == [tokens[count]]


def test_samples_have_their_own_random_numbers(llama: Generator) -> None:
    full = make_compressor(llama, "full")
    sampled = [Decoding(max_new_tokens=6, temperature=1.0, seed=seed) for seed in (1, 2)]
    made = [prompt_of(full, PROSE[:2], QUESTIONS[0]) for _ in range(4)]
    expected = [alone(llama, one, 6, how) for one, how in zip(made[:2], sampled, strict=True)]
    assert expected[0] != expected[1]
    decoder = Decoder(llama)
    firsts = [int(decoder.join(one, how)) for one, how in zip(made[2:], sampled, strict=True)]
    steps = [decoder.step().tolist() for _ in range(5)]
    assert [list(row) for row in zip(firsts, *steps, strict=True)] == expected


def test_what_nobody_attends_to_is_dropped(llama: Generator) -> None:
    full = make_compressor(llama, "full")
    decoder = Decoder(llama)
    decoder.join(prompt_of(full, PROSE[:1], QUESTIONS[0]), GREEDY)
    lengths = []
    for number in range(6):
        decoder.join(prompt_of(full, PROSE[:1], QUESTIONS[0]), GREEDY)
        for _ in range(5):
            decoder.step()
        decoder.keep([1])
        assert decoder._rows is not None
        lengths.append(decoder._rows.cache.layers[0].keys.shape[2])
        assert number < 1 or lengths[-1] == lengths[1]


def test_rows_of_another_adapter_are_refused(llama: Generator) -> None:
    full = make_compressor(llama, "full")
    decoder = Decoder(llama)
    with pytest.raises(ValueError, match="needs rows"):
        decoder.step()
    decoder.join(prompt_of(full, PROSE[:1], QUESTIONS[0]), GREEDY)
    ids = llama.tokenize("Q:")
    with pytest.raises(ValueError, match="must have the adapter of the others"):
        decoder.join(assemble([[ids]], llama, adapter="another"), GREEDY)
