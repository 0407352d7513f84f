"""Concurrent callers are answered in one batch, as each would be alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
from support.models import PROSE, make_compressor

from sac_rag import Answer, Chunk, Decoding, Message, SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.errors import PromptTooLongError
from sac_rag.gathering import Gatherer
from sac_rag.lm.generator import Generator

SHORT = Decoding(max_new_tokens=6)
TIMEOUT = 120


@pytest.fixture
def rag(llama: Generator, home: Any, monkeypatch: pytest.MonkeyPatch) -> SacRAG:
    """A pipeline that waits for prompts as long as a loaded machine takes to submit a few."""
    rag = SacRAG(CachedCompressor(make_compressor(llama, "sac"), {}), decoding=SHORT)
    monkeypatch.setattr(rag, "gatherer", Gatherer(rag.generator, window_s=0.5))
    return rag


@pytest.fixture
def batches(rag: SacRAG, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches of chats that are started."""
    sizes: list[int] = []
    start: Callable[..., Any] = rag._start_chat

    def counted(conversations: Sequence[Any], *args: Any) -> Any:
        sizes.append(len(conversations))
        return start(conversations, *args)

    monkeypatch.setattr(rag, "_start_chat", counted)
    return sizes


def asking(number: int) -> list[Message]:
    return [Message("user", (Chunk(PROSE[number]), f"\n\nWhat is said of number {number}?"))]


def results(futures: Sequence[Future[Answer]]) -> list[Answer]:
    return [future.result(timeout=TIMEOUT) for future in futures]


def test_concurrent_chats_are_one_batch_with_the_answers_they_have_alone(
    rag: SacRAG, batches: list[int]
) -> None:
    alone = [rag.chat([asking(number)])[0].text for number in range(4)]
    batches.clear()
    together = results([rag.submit_chat(asking(number)) for number in range(4)])
    assert [answer.text for answer in together] == alone
    assert batches == [4]


def test_concurrent_completions_have_the_answers_they_have_alone(rag: SacRAG) -> None:
    prompts = [(Chunk(text), "\n\nQ: What is it?\nA:") for text in PROSE[:3]]
    alone = [answer.text for answer in rag.complete(prompts)]
    together = results([rag.submit_complete(prompt) for prompt in prompts])
    assert [answer.text for answer in together] == alone


def test_a_batch_has_at_most_its_size(rag: SacRAG, batches: list[int]) -> None:
    results([rag.submit_chat(asking(number % 8)) for number in range(19)])
    assert sorted(batches) == [3, 16]


@pytest.mark.parametrize(("lengths", "started"), [([3, 6], [2]), ([3, 60], [1, 1])])
def test_places_are_given_to_several_at_a_time_unless_that_takes_long(
    rag: SacRAG,
    batches: list[int],
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    started: list[int],
) -> None:
    monkeypatch.setattr(rag, "gatherer", Gatherer(rag.generator, size=8))
    # Answers of these lengths, whatever the model writes.
    monkeypatch.setattr(type(rag.generator), "eos_ids", frozenset())
    limits = [60] * 6 + lengths
    futures = [rag.submit_chat(asking(n), Decoding(max_new_tokens=m)) for n, m in enumerate(limits)]
    futures += [rag.submit_chat(asking(n), Decoding(max_new_tokens=7)) for n in range(2)]
    results(futures)
    assert batches[-len(started) :] == started
    assert sum(batches) == 10


def test_prompts_with_other_settings_are_batches_of_their_own(
    rag: SacRAG, batches: list[int]
) -> None:
    longer = Decoding(max_new_tokens=9)
    futures = [rag.submit_chat(asking(0)), rag.submit_chat(asking(1), longer)]
    futures += [rag.submit_chat(asking(2)), rag.submit_chat(asking(3), longer)]
    results(futures)
    assert batches == [2, 2]


def test_seeded_samples_are_those_of_the_prompt_alone(rag: SacRAG, batches: list[int]) -> None:
    sampled = Decoding(max_new_tokens=6, temperature=1.0, seed=3)
    alone = [rag.chat([asking(number)], sampled)[0].text for number in range(3)]
    batches.clear()
    together = results([rag.submit_chat(asking(number), sampled) for number in range(3)])
    assert [answer.text for answer in together] == alone
    assert batches == [1, 1, 1]


def test_a_prompt_that_cannot_be_answered_fails_alone(rag: SacRAG) -> None:
    too_long = [Message("user", ("word " * 3000,))]
    futures = [rag.submit_chat(asking(0)), rag.submit_chat(too_long), rag.submit_chat(asking(1))]
    assert futures[0].result(timeout=TIMEOUT).text == rag.chat([asking(0)])[0].text
    with pytest.raises(PromptTooLongError):
        futures[1].result(timeout=TIMEOUT)
    assert futures[2].result(timeout=TIMEOUT).text == rag.chat([asking(1)])[0].text


def test_a_cancelled_prompt_ends_its_batch(rag: SacRAG) -> None:
    running, cancelled = threading.Event(), threading.Event()
    passes: list[int] = []

    def seen(module: Any, arguments: Any) -> None:
        passes.append(1)
        running.set()
        assert cancelled.wait(TIMEOUT)

    handle = rag.generator.model.get_input_embeddings().register_forward_pre_hook(seen)
    future = rag.submit_chat(asking(0), Decoding(max_new_tokens=400))
    assert running.wait(TIMEOUT)
    assert future.cancel()
    cancelled.set()
    with pytest.raises(CancelledError):
        future.result()
    # The thread is free for the next prompt.
    assert results([rag.submit_chat(asking(1))])
    handle.remove()
    assert len(passes) < 40


def test_a_prompt_joins_those_that_are_answered_and_takes_the_place_of_one_that_ended(
    rag: SacRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rag, "gatherer", Gatherer(rag.generator, size=2, window_s=0.01))
    longest, short = Decoding(max_new_tokens=60), Decoding(max_new_tokens=5)
    alone = [rag.chat([asking(0)], longest)[0], *(rag.chat([asking(n)], short)[0] for n in (1, 2))]
    assert alone[0].usage.generated_tokens > 20
    rows: list[int] = []
    running, submitted = threading.Event(), threading.Event()

    def seen(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        rows.append(len(keywords["inputs_embeds"]))
        running.set()
        assert submitted.wait(TIMEOUT)

    handle = rag.generator.model.base_model.register_forward_pre_hook(seen, with_kwargs=True)
    futures = [rag.submit_chat(asking(0), longest)]
    assert running.wait(TIMEOUT)
    futures += [rag.submit_chat(asking(number), short) for number in (1, 2)]
    submitted.set()
    assert [answer.text for answer in results(futures)] == [answer.text for answer in alone]
    handle.remove()
    assert max(rows) == 2
    # Two prompts of five tokens beside the long one, one after the other.
    assert rows.count(2) == 2 * 4
    metrics = rag.metrics()
    assert metrics.questions == 6


def test_the_text_comes_in_pieces_while_it_is_written(rag: SacRAG) -> None:
    pieces: list[list[str]] = [[], [], []]
    futures = [
        rag.submit("What is it?", PROSE[:1], on_text=pieces[0].append),
        rag.submit_chat(asking(1), on_text=pieces[1].append),
        rag.submit("What is it?", PROSE[2:3], on_text=pieces[2].append),
    ]
    answers = results(futures)
    assert ["".join(texts) for texts in pieces] == [answer.text for answer in answers]
    assert max(len(texts) for texts in pieces) > 1
    assert answers[0].text == rag.answer("What is it?", PROSE[:1]).text
    assert answers[1].text == rag.chat([asking(1)])[0].text


def test_a_caller_that_does_not_take_the_text_fails_alone(rag: SacRAG) -> None:
    def refuse(piece: str) -> None:
        raise RuntimeError("no more")

    futures = [rag.submit_chat(asking(0)), rag.submit_chat(asking(1), on_text=refuse)]
    assert futures[0].result(timeout=TIMEOUT).text == rag.chat([asking(0)])[0].text
    with pytest.raises(RuntimeError, match="no more"):
        futures[1].result(timeout=TIMEOUT)


def test_a_prompt_cancelled_while_it_waits_is_not_answered(rag: SacRAG, batches: list[int]) -> None:
    futures = [rag.submit_chat(asking(number)) for number in range(3)]
    assert futures[1].cancel()
    results([futures[0], futures[2]])
    assert batches == [2]


def test_the_thread_ends_when_no_prompt_is_waiting(rag: SacRAG) -> None:
    results([rag.submit_chat(asking(0))])
    for thread in threading.enumerate():
        if thread.name == "sac-rag-gatherer":
            thread.join(timeout=TIMEOUT)
            assert not thread.is_alive()
    assert results([rag.submit_chat(asking(0))])
