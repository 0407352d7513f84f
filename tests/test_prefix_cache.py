"""A prefix is read once, and nobody can tell from an answer that it was not read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PROSE, logits_of, make_compressor, make_model, make_tokenizer

from sac_rag.answering import tokenize
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prefix_cache import Prefixes, Split
from sac_rag.prompts.assemble import Part, assemble
from sac_rag.prompts.chat import Message
from sac_rag.prompts.format import SPANS, PromptFormat
from sac_rag.prompts.generate import Decoding

SHORT = Decoding(max_new_tokens=12)
QUESTION = "Who counted the ships?"
# Tiny random models write anything: a stop text of one character would hide most of it.
PLAIN = replace(SPANS, stop=())
CHAT = PromptFormat()
BEGINNING = list(range(5, 25))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAC_RAG_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    return make_compressor(llama, "sac")


@pytest.fixture
def make_rag(sac: Compressor) -> Callable[..., SacRAG]:
    """Makes a pipeline with short answers over a store of its own."""

    def make(compressor: Compressor = sac, **options: Any) -> SacRAG:
        return SacRAG(CachedCompressor(compressor, {}), **{"decoding": SHORT, **options})

    return make


class ReadAnew(Prefixes):
    """Leaves every prompt whole, so that its prefix is read in the one pass."""

    def split(self, beginning: Sequence[int], rows: Sequence[Sequence[Part]]) -> Split:
        return Split(None, [list(row) for row in rows], reused=0)


def reading_anew(rag: SacRAG) -> SacRAG:
    rag.prefixes = ReadAnew(rag.generator)
    return rag


@contextmanager
def tokens_read(generator: Generator) -> Iterator[list[int]]:
    """Notes the tokens of every forward pass of the decoder stack."""
    passes: list[int] = []
    handle = generator.model.base_model.register_forward_hook(
        lambda module, args, output: passes.append(output[0].shape[1])
    )
    try:
        yield passes
    finally:
        handle.remove()


# --- the same


@pytest.mark.parametrize("prompt_format", [CHAT, PLAIN], ids=["chat", "plain"])
@pytest.mark.parametrize("method", ["sac", "full", "shared", "icae", "x500"])
def test_a_prompt_behind_its_prefix_has_the_logits_of_reading_both(
    generator: Generator, prompt_format: PromptFormat, method: str
) -> None:
    compressor = make_compressor(generator, method, sink=prompt_format.opening(make_tokenizer()))
    rag = SacRAG(CachedCompressor(compressor, {}), prompt_format=prompt_format)
    kvs = iter(compressor.compress(PROSE[:2]))
    row: list[Part] = [
        next(kvs) if isinstance(piece, Chunk) else tokenize(piece, rag.compressor)
        for piece in prompt_format.pieces(generator.tokenizer, QUESTION, [*map(Chunk, PROSE[:2])])
    ]
    split = rag.prefixes.split(rag.beginning_ids(), [row])
    assert split.prefix is not None
    assert split.prefix.num_tokens == len(rag.beginning_ids())
    expected = logits_of(generator, assemble([row], generator, cue=compressor.cue))
    for _ in range(2):  # computed, then kept
        split = rag.prefixes.split(rag.beginning_ids(), [row])
        prompt = assemble(split.rows, generator, prefix=split.prefix, cue=compressor.cue)
        got = logits_of(generator, prompt)
        # float32, other shapes of the same sums: rounding only.
        torch.testing.assert_close(got, expected[:, -got.shape[1] :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt_format", [CHAT, PLAIN], ids=["chat", "plain"])
@pytest.mark.parametrize("on_miss", ["compress", "text"])
def test_answers_are_those_of_reading_the_prefix_anew(
    make_rag: Callable[..., SacRAG], prompt_format: PromptFormat, on_miss: Any
) -> None:
    options = {"prompt_format": prompt_format, "on_miss": on_miss}
    rag, other = make_rag(**options), reading_anew(make_rag(**options))
    asked: list[tuple[str, Sequence[ChunkLike]]] = [
        (QUESTION, PROSE[:3]),
        ("And when?", [Chunk(PROSE[2], title="Towers"), PROSE[0]]),
        ("Without any chunk?", []),
        ("With one that is empty?", [" "]),
    ]
    expected = [other.answer(question, chunks) for question, chunks in asked]
    for _ in range(2):
        whole = [rag.answer(question, chunks) for question, chunks in asked]
        assert [answer.text for answer in whole] == [answer.text for answer in expected]
        assert ["".join(rag.stream(q, c)) for q, c in asked] == [a.text for a in expected]
        assert [answer.text for answer in rag.batch(asked)] == [a.text for a in expected]
        for got, want in zip(whole, expected, strict=True):
            assert got.usage.positions_attended == want.usage.positions_attended
            assert got.usage.plain_tokens == want.usage.plain_tokens
    assert len({answer.text for answer in expected}) == 4


def test_chats_with_and_without_one_system_prompt_are_answered_as_each_alone(
    make_rag: Callable[..., SacRAG],
) -> None:
    long, other = " ".join(PROSE[:4]), "Be brief."
    turns = [Message("user", (Chunk(PROSE[0]), " Who?")), Message("user", ("When?",))]
    for systems in ((long, long), (long, other), (other, long)):
        chats = [
            [Message("system", (system,)), turn]
            for system, turn in zip(systems, turns, strict=True)
        ]
        alone = [reading_anew(make_rag()).chat([chat])[0].text for chat in chats]
        rag = make_rag()
        assert [answer.text for answer in rag.chat(chats)] == alone
        again = rag.chat(chats)
        assert [answer.text for answer in again] == alone
        assert all(answer.usage.plain_tokens_reused > 0 for answer in again) == (
            systems[0] == systems[1]
        )


def test_a_chunk_in_the_system_prompt_ends_the_prefix(make_rag: Callable[..., SacRAG]) -> None:
    chat = [Message("system", ("Know this: ", Chunk(PROSE[0]))), Message("user", ("Who?",))]
    rag = make_rag()
    expected = reading_anew(make_rag()).chat([chat])[0].text
    before = [
        *rag.generator.tokenize("<|im_start|>system\n", special=True),
        *rag.generator.tokenize("Know this: "),
    ]
    for reused in (0, len(before)):
        (answer,) = rag.chat([chat])
        assert answer.text == expected
        assert answer.usage.plain_tokens_reused == reused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_answer_and_later_ones_are_the_same_bits(dtype: torch.dtype) -> None:
    """What is kept is what was used at first: no answer depends on who came before."""
    generator = Generator(make_model("llama").to(dtype), make_tokenizer())
    prefixes = Prefixes(generator)
    rows = [[[*BEGINNING, 30 + i, 31]] for i in range(3)]
    first = [prefixes.split(BEGINNING, [row]) for row in rows]
    later = Prefixes(generator).split(BEGINNING, [rows[2]])
    assert first[0].prefix is not None and first[2].prefix is not None
    assert later.prefix is not None
    assert first[0].prefix.bit_equal(first[2].prefix)
    assert first[2].prefix.bit_equal(later.prefix)
    assert first[0].prefix.dtype == dtype


# --- once


@pytest.mark.parametrize("prompt_format", [CHAT, PLAIN], ids=["chat", "plain"])
def test_the_prefix_is_read_by_the_first_question_only(
    make_rag: Callable[..., SacRAG], prompt_format: PromptFormat
) -> None:
    rag = make_rag(prompt_format=prompt_format)
    rag.precompress(PROSE)
    prefix = len(rag.beginning_ids())
    read = []
    for i in range(3):
        with tokens_read(rag.generator) as passes:
            usage = rag.answer(f"Question {i}?", PROSE[i : i + 2]).usage
        read.append(sum(passes))
        assert usage.plain_tokens_reused == (prefix if i else 0)
        assert usage.anchors_computed == 0
        assert usage.positions_attended == usage.plain_tokens + usage.anchors_from_store
    assert read[1] == read[2] == read[0] - prefix


def test_threads_that_come_at_once_read_it_once(make_rag: Callable[..., SacRAG]) -> None:
    rag = make_rag(prompt_format=PLAIN)
    rag.precompress(PROSE)
    with tokens_read(rag.generator) as passes, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: rag.answer(f"Question {i}?", [PROSE[i]]), range(8)))
    assert passes.count(len(rag.beginning_ids())) == 1


def test_so_many_prefixes_are_kept_and_the_one_used_longest_ago_goes(llama: Generator) -> None:
    prefixes = Prefixes(llama, capacity=2)
    one, two, three = ([first, *BEGINNING] for first in (2, 3, 4))

    def reused(ids: list[int]) -> int:
        return prefixes.split(ids, [[[*ids, 9]]]).reused

    assert [reused(ids) for ids in (one, two, one, three)] == [0, 0, 21, 0]
    assert reused(one) == 21
    assert reused(two) == 0  # three came, and two was used longest ago


# --- how much of it


def test_a_prompt_that_leaves_the_beginning_early_shares_what_it_has_of_it(
    llama: Generator,
) -> None:
    row = [BEGINNING[:7], [*BEGINNING[7:15], 400, 401]]
    split = Prefixes(llama).split(BEGINNING, [row])
    assert split.prefix is not None
    assert split.prefix.num_tokens == 15
    assert split.rows == [[[400, 401]]]
    expected = logits_of(llama, assemble([row], llama))
    got = logits_of(llama, assemble(split.rows, llama, prefix=split.prefix))
    torch.testing.assert_close(got, expected[:, -2:], rtol=1e-4, atol=1e-4)


def test_a_batch_shares_what_all_its_rows_share(llama: Generator) -> None:
    rows = [[[*BEGINNING, 400]], [[*BEGINNING[:12], 401]], [[*BEGINNING[:16], 402]]]
    split = Prefixes(llama).split(BEGINNING, rows)
    assert split.prefix is not None
    assert split.prefix.num_tokens == 12
    assert split.rows == [[[*BEGINNING[12:], 400]], [[401]], [[*BEGINNING[12:16], 402]]]


@pytest.mark.parametrize(
    "row",
    [[[400, 401]], [[*BEGINNING[:10], 400]], [[400, *BEGINNING]]],
    ids=["other", "half", "late"],
)
def test_what_is_mostly_not_shared_is_not_read(llama: Generator, row: list[Part]) -> None:
    rows: list[list[Part]] = [[[*BEGINNING, 9]], row]
    with tokens_read(llama) as passes:
        split = Prefixes(llama).split(BEGINNING, rows)
    assert (split.prefix, split.rows, split.reused) == (None, rows, 0)
    assert passes == []


@pytest.mark.parametrize("row", [[BEGINNING], [BEGINNING[:4], BEGINNING[4:]]])
def test_the_last_token_of_a_prompt_is_always_read(llama: Generator, row: list[Part]) -> None:
    split = Prefixes(llama).split(BEGINNING, [row])
    assert split.rows == [[BEGINNING[-1:]]]


def test_a_chunk_may_follow_the_prefix_at_once(llama: Generator) -> None:
    (kv,) = make_compressor(llama, "full").compress([PROSE[0]])
    assert Prefixes(llama).split(BEGINNING, [[BEGINNING, kv, [9]]]).rows == [[kv, [9]]]


def test_a_prompt_that_begins_with_a_chunk_has_no_prefix(llama: Generator) -> None:
    (kv,) = make_compressor(llama, "full").compress([PROSE[0]])
    assert Prefixes(llama).split(BEGINNING, [[kv, [9]]]).prefix is None


@pytest.mark.parametrize("beginning", [[], [5]])
def test_no_beginning_and_no_prompts_are_no_prefix(llama: Generator, beginning: list[int]) -> None:
    assert Prefixes(llama).split(beginning, []).prefix is None
    assert Prefixes(llama).split(beginning, [[[9]]]).prefix is None


def test_the_least_recently_used_leave_when_their_bytes_pass_the_cap(llama: Generator) -> None:
    prefixes = Prefixes(llama)
    rows = [[start, *BEGINNING] for start in range(5)]
    prefixes.split(rows[0], [[[*rows[0], 7]]])
    each = prefixes.nbytes
    prefixes.max_bytes = 3 * each
    for row in rows:
        prefixes.split(row, [[[*row, 7]]])
    assert prefixes.nbytes == 3 * each
    assert prefixes.split(rows[4], [[[*rows[4], 7]]]).reused == len(rows[4])
    assert prefixes.split(rows[0], [[[*rows[0], 7]]]).reused == 0
    prefixes.max_bytes = each - 1
    split = prefixes.split(rows[1], [[[*rows[1], 7]]])
    assert (split.prefix is not None, prefixes.nbytes) == (True, 0)
