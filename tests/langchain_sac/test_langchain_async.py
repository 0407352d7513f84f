"""Async calls share batches, leave the event loop free, and end when they are cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_sac import ChatSAC
from langchain_sac.marker import mark
from langchain_scenes import QUESTION, SHORT, home_of_module, make_rag  # noqa: F401
from support.models import PROSE, passes_of

from sac_rag import PromptTooLongError, SacRAG
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import SPANS


@pytest.fixture
def rag(llama: Generator) -> SacRAG:
    return make_rag(llama)


@pytest.fixture
def chat(rag: SacRAG) -> ChatSAC:
    return ChatSAC(rag)


def asked(rag: SacRAG, number: int) -> str:
    return f"{mark(PROSE[number], rag.compressor.key(PROSE[number]))} {QUESTION}"


async def collected(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


WAYS: dict[str, Callable[[ChatSAC, Any], Any]] = {
    "ainvoke": lambda chat, prompt: chat.ainvoke(prompt),
    "abatch": lambda chat, prompt: chat.abatch([prompt, prompt]),
    "agenerate": lambda chat, prompt: chat.agenerate([[HumanMessage(prompt)]] * 2),
    "astream": lambda chat, prompt: collected(chat.astream(prompt)),
}


@pytest.mark.parametrize("plain", [False, True], ids=["chats", "completions"])
async def test_concurrent_calls_are_answered_in_padded_batches(
    llama: Generator, plain: bool
) -> None:
    rag = make_rag(llama, prompt_format=SPANS)
    chat = ChatSAC(rag, plain=plain)
    prompts = [asked(rag, number) for number in range(8)]
    expected = [chat.invoke(prompt).text for prompt in prompts]
    with passes_of(llama) as passes:
        said = await asyncio.gather(*map(chat.ainvoke, prompts))
    assert [one.text for one in said] == expected
    # One batch, or a few if the calls come late: never one call at a time.
    assert len(passes) <= len(prompts) * SHORT.max_new_tokens / 2


async def test_calls_with_settings_of_their_own_get_the_answers_they_get_alone(
    rag: SacRAG, chat: ChatSAC
) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"max_tokens": 3},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 2},
        {"stop": ["e"]},
    ]
    expected = [chat.invoke(asked(rag, 0), **one).text for one in settings]
    said = await asyncio.gather(*(chat.ainvoke(asked(rag, 0), **one) for one in settings))
    assert [one.text for one in said] == expected


async def test_a_call_that_fails_fails_no_other(rag: SacRAG, chat: ChatSAC) -> None:
    expected = chat.invoke(asked(rag, 0)).text
    bad, good = await asyncio.gather(
        chat.ainvoke("long " * 9000), chat.ainvoke(asked(rag, 0)), return_exceptions=True
    )
    assert isinstance(bad, PromptTooLongError)
    assert good.text == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("way", WAYS)
async def test_the_event_loop_turns_while_an_answer_is_computed(
    rag: SacRAG, chat: ChatSAC, llama: Generator, way: str
) -> None:
    began, turned = threading.Event(), threading.Event()

    def wait_for_the_loop(*args: Any) -> None:
        began.set()
        assert turned.wait(timeout=30), "the event loop was blocked by the model"

    handle = llama.model.base_model.register_forward_hook(wait_for_the_loop)
    try:
        asking = asyncio.create_task(WAYS[way](chat, asked(rag, 0)))
        while not began.is_set():
            await asyncio.sleep(0.005)
        turned.set()
        await asking
    finally:
        handle.remove()


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"abatch"}))
async def test_whoever_cancels_ends_the_work(rag: SacRAG, llama: Generator, way: str) -> None:
    chat = ChatSAC(rag, max_tokens=4000)
    with passes_of(llama) as passes:
        task = asyncio.create_task(WAYS[way](chat, "Hello"))
        while len(passes) < 5:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        seen = -1
        while seen < len(passes):
            seen = len(passes)
            await asyncio.sleep(0.3)
    assert seen < 2000
    assert chat.invoke("Hello", max_tokens=2).text  # the model is free


class Hangs(AsyncCallbackHandler):
    """Never lets a run begin."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()

    async def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.reached.set()
        await asyncio.Event().wait()


async def test_a_batch_that_is_cancelled_before_all_have_asked_is_not_computed(
    chat: ChatSAC, llama: Generator
) -> None:
    hangs = Hangs()
    with passes_of(llama) as passes:
        configs: Any = [{}, {"callbacks": [hangs]}]
        task = asyncio.create_task(chat.abatch(["one", "two"], configs))
        await asyncio.wait_for(hangs.reached.wait(), timeout=30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)
    assert passes == []
