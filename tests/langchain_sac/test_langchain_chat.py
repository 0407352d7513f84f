"""ChatSAC says what the pipeline says, whole, streamed, batched, sync and async."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import (
    BaseCallbackHandler,
    get_usage_metadata_callback,
)
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import ConfigurableField
from langchain_sac import ChatSAC, SACCompressor, format_docs, prompt_template
from langchain_sac.marker import mark
from langchain_sac.messages import conversation
from langchain_scenes import QUESTION, SHORT, home_of_module, make_rag  # noqa: F401
from support.models import PROSE, make_model, make_tokenizer, passes_of

from sac_rag import Chunk, ChunkMissError, Decoding, Message, PromptTooLongError, SacRAG
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import SPANS


@pytest.fixture
def rag(llama: Generator) -> SacRAG:
    return make_rag(llama)


@pytest.fixture
def chat(rag: SacRAG) -> ChatSAC:
    return ChatSAC(rag)


def asked(rag: SacRAG, *numbers: int, question: str = QUESTION) -> list[BaseMessage]:
    """A question about marked chunks."""
    marked = "".join(f"{mark(PROSE[i], rag.compressor.key(PROSE[i]))}\n" for i in numbers)
    return [SystemMessage("Be brief."), HumanMessage(f"{marked}{question}")]


def same_in_the_pipeline(*numbers: int, question: str = QUESTION) -> list[Message]:
    chunks: list[str | Chunk] = []
    for i in numbers:
        chunks += [Chunk(PROSE[i]), "\n"]
    return [Message("system", ("Be brief.",)), Message("user", (*chunks, question))]


ROWS: list[tuple[int, ...]] = [(0, 1), (2,), (), (5, 4, 3)]


# --- the same answer


async def test_every_way_of_asking_gives_the_pipelines_answer(rag: SacRAG, chat: ChatSAC) -> None:
    expected = [rag.chat([same_in_the_pipeline(*row)])[0].text for row in ROWS]
    assert len(set(expected)) == len(ROWS)
    inputs: list[Any] = [asked(rag, *row) for row in ROWS]
    assert [chat.invoke(row).text for row in inputs] == expected
    assert [(await chat.ainvoke(row)).text for row in inputs] == expected
    assert ["".join(piece.text for piece in chat.stream(row)) for row in inputs] == expected
    for row, text in zip(inputs, expected, strict=True):
        assert "".join([piece.text async for piece in chat.astream(row)]) == text
    assert [said.text for said in chat.batch(inputs)] == expected
    assert [said.text for said in await chat.abatch(inputs)] == expected


async def test_every_way_of_asking_gives_the_same_account(rag: SacRAG, chat: ChatSAC) -> None:
    messages = asked(rag, 0, 1)
    chat.invoke(messages)  # reads the chunks into the store

    def account(said: Any) -> Any:
        return said.text, said.usage_metadata, said.response_metadata

    async def sum_of_astream() -> Any:
        chunks = [chunk async for chunk in chat.astream(messages)]
        return sum(chunks[1:], start=chunks[0])

    first, *rest = chat.stream(messages)
    expected = account(chat.invoke(messages))
    assert account(sum(rest, start=first)) == expected
    assert account(await chat.ainvoke(messages)) == expected
    assert account(await sum_of_astream()) == expected
    assert [account(said) for said in chat.batch([messages, messages])] == [expected, expected]
    assert [account(said) for said in await chat.abatch([messages])] == [expected]


async def test_events_have_the_tokens_and_the_answer(rag: SacRAG, chat: ChatSAC) -> None:
    messages = asked(rag, 0)
    rag.precompress([PROSE[0]])
    expected = chat.invoke(messages)
    events = [event async for event in chat.astream_events(messages, version="v2")]
    streamed = [e["data"]["chunk"].text for e in events if e["event"] == "on_chat_model_stream"]
    assert "".join(streamed) == expected.text
    assert len([text for text in streamed if text]) > 1
    (end,) = [e["data"]["output"] for e in events if e["event"] == "on_chat_model_end"]
    assert end.usage_metadata == expected.usage_metadata
    assert end.response_metadata["model_name"] == chat.model


def test_threads_get_the_answers_they_would_get_alone(rag: SacRAG, chat: ChatSAC) -> None:
    inputs = [asked(rag, i, i + 1) for i in range(6)]
    expected = [chat.invoke(row).text for row in inputs]
    with ThreadPoolExecutor(max_workers=6) as threads:
        assert [said.text for said in threads.map(chat.invoke, inputs)] == expected


def test_a_completion_is_the_pipelines(llama: Generator) -> None:
    rag = make_rag(llama, prompt_format=SPANS, decoding=Decoding(max_new_tokens=24))
    chat = ChatSAC(rag, plain=True)
    prompt: list[str | Chunk] = ["Text:\n", Chunk(PROSE[0]), "\n\nQuestion: Who?\nAnswer:"]
    expected = rag.complete([prompt])[0].text
    marked = mark(PROSE[0], rag.compressor.key(PROSE[0]))
    messages = [SystemMessage(f"Text:\n{marked}"), HumanMessage("Question: Who?\nAnswer:")]
    assert chat.invoke(messages).text == expected
    assert "".join(piece.text for piece in chat.stream(messages)) == expected
    assert [said.text for said in chat.batch([messages, messages])] == [expected] * 2
    assert ChatSAC(rag).invoke(messages).text != expected
    with pytest.raises(ValueError, match="must end in text"):
        chat.invoke(marked)


# --- which prompt


def own_prompt(rag: SacRAG, *numbers: int) -> BaseMessage:
    """A question in the format's prompt, as a chain writes it."""
    documents = [Document(PROSE[i]) for i in numbers]
    context = format_docs(rag)(SACCompressor(rag).invoke(documents))
    prompt = prompt_template(rag).invoke({"context": context, "question": QUESTION})
    (message,) = prompt.to_messages()
    return message


@pytest.fixture
def spans(llama: Generator) -> SacRAG:
    """A pipeline with a plain prompt whose answers end at their second letter."""
    said = make_rag(llama, prompt_format=replace(SPANS, stop=())).answer(QUESTION, PROSE[:2]).text
    return make_rag(llama, prompt_format=replace(SPANS, stop=(said[1],)))


async def test_the_formats_own_prompt_is_plain_and_ends_at_its_stop_texts(spans: SacRAG) -> None:
    chat, messages = ChatSAC(spans), [own_prompt(spans, 0, 1)]
    expected = spans.answer(QUESTION, PROSE[:2])
    assert (len(expected.text), expected.finish_reason) == (1, "stop")
    said = chat.invoke(messages)
    assert said.text == expected.text
    assert said.usage_metadata is not None
    assert said.usage_metadata["input_tokens"] == expected.usage.positions_attended
    assert (await chat.ainvoke(messages)).text == expected.text
    assert "".join(piece.text for piece in chat.stream(messages)) == expected.text
    assert [said.text for said in chat.batch([messages] * 2)] == [expected.text] * 2


def test_everything_else_is_a_chat_that_ends_where_it_ends(spans: SacRAG) -> None:
    own = own_prompt(spans, 0, 1)
    key = spans.compressor.key
    conversations: list[list[BaseMessage]] = [
        [HumanMessage(QUESTION)],
        [HumanMessage(f"What does {SPANS.prefix!r} mean?\nQuestion: Who?\nAnswer:")],
        [HumanMessage(f"{own.text}\nBe brief.")],
        [SystemMessage("Be brief."), own],
        [SystemMessage(own.text)],
        [HumanMessage(QUESTION), AIMessage("Seven."), own],
        asked(spans, 0, 1),
    ]
    expected = [
        spans.chat([conversation(messages, key)], replace(SHORT, stop=()))[0].text
        for messages in conversations
    ]
    assert [ChatSAC(spans).invoke(messages).text for messages in conversations] == expected


def test_a_batch_may_have_plain_prompts_among_chats(spans: SacRAG) -> None:
    chat = ChatSAC(spans)
    inputs: Any = [asked(spans, 2), [own_prompt(spans, 0, 1)], "Hello", [own_prompt(spans, 3)]]
    expected = [chat.invoke(row).text for row in inputs]
    assert expected[1] == spans.answer(QUESTION, PROSE[:2]).text
    assert [said.text for said in chat.batch(inputs)] == expected


def test_a_stop_of_the_model_or_the_call_takes_the_place_of_the_formats(
    llama: Generator, spans: SacRAG
) -> None:
    messages = [own_prompt(spans, 0, 1)]
    whole = make_rag(llama, prompt_format=replace(SPANS, stop=())).answer(QUESTION, PROSE[:2]).text
    assert ChatSAC(spans).invoke(messages).text != whole
    assert ChatSAC(spans).invoke(messages, stop=[]).text == whole
    assert ChatSAC(spans, stop=[]).invoke(messages).text == whole
    assert (
        ChatSAC(spans, stop=[]).invoke(messages, stop=[whole[3]]).text == whole.split(whole[3])[0]
    )


def test_how_prompts_are_read_can_be_fixed(spans: SacRAG) -> None:
    messages = [own_prompt(spans, 0, 1)]
    turns = conversation(messages, spans.compressor.key)
    assert ChatSAC(spans, plain=False).invoke(messages).text == spans.chat([turns])[0].text
    assert ChatSAC(spans, plain=True).invoke(messages).text == ChatSAC(spans).invoke(messages).text
    assert ChatSAC(spans, plain=True).invoke("Hello").text == spans.complete([["Hello"]])[0].text


# --- the account


def test_usage_counts_positions_and_anchors(rag: SacRAG, chat: ChatSAC) -> None:
    messages = asked(rag, 0, 1)
    first, second = chat.invoke(messages), chat.invoke(messages)
    (answer,) = rag.chat([same_in_the_pipeline(0, 1)])
    assert first.usage_metadata is not None
    assert second.usage_metadata == {
        "input_tokens": answer.usage.positions_attended,
        "output_tokens": answer.usage.generated_tokens,
        "total_tokens": answer.usage.positions_attended + answer.usage.generated_tokens,
        "input_token_details": {
            "cache_read": answer.usage.anchors_from_store,
            "cache_creation": 0,
            "sac_source_tokens": answer.usage.source_tokens,
        },
    }
    details = first.usage_metadata["input_token_details"]
    assert (details["cache_read"], details["cache_creation"]) == (
        0,
        answer.usage.anchors_from_store,
    )


def test_metadata_says_what_became_of_each_chunk(rag: SacRAG, chat: ChatSAC) -> None:
    rag.precompress([PROSE[1]])
    said = chat.invoke(asked(rag, 0, 1))
    assert said.response_metadata["model_name"] == "llama"
    assert said.response_metadata["finish_reason"] == "length"
    chunks = said.response_metadata["sac"]
    assert [chunk["status"] for chunk in chunks] == ["absent", "hit"]
    assert [chunk["key"] for chunk in chunks] == [rag.compressor.key(PROSE[i]) for i in (0, 1)]
    assert [chunk["read_as"] for chunk in chunks] == ["anchors", "anchors"]
    assert all(chunk["num_tokens"] > chunk["num_anchors"] > 0 for chunk in chunks)


def test_usage_callbacks_are_told(rag: SacRAG, chat: ChatSAC) -> None:
    with get_usage_metadata_callback() as usage:
        said = chat.invoke(asked(rag, 0))
        chat.batch([asked(rag, 0)] * 2)
    assert said.usage_metadata is not None
    (counted,) = usage.usage_metadata.values()
    assert counted["output_tokens"] == 3 * said.usage_metadata["output_tokens"]


# --- decoding


def test_settings_of_a_call_go_before_the_models_and_those_before_the_pipelines(
    rag: SacRAG,
) -> None:
    def tokens(said: AIMessage) -> int:
        assert said.usage_metadata is not None
        return said.usage_metadata["output_tokens"]

    assert tokens(ChatSAC(rag).invoke("Hello")) == SHORT.max_new_tokens
    chat = ChatSAC(rag, max_tokens=5)
    assert tokens(chat.invoke("Hello")) == 5
    assert tokens(chat.invoke("Hello", max_tokens=3)) == 3
    assert tokens(chat.bind(max_tokens=2).invoke("Hello")) == 2
    assert tokens(next(iter(chat.batch(["Hello"], max_tokens=4)))) == 4


def test_sampling_with_a_seed_is_repeatable(chat: ChatSAC) -> None:
    sampled = {"temperature": 2.0, "top_k": 50, "top_p": 0.99}
    texts = [chat.invoke("Hello", **sampled, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] != chat.invoke("Hello").text


def test_stop_texts_of_the_call_take_the_place_of_the_models(rag: SacRAG) -> None:
    text = ChatSAC(rag).invoke("Hello").text
    first, second = text[2], text[5]
    chat = ChatSAC(rag, stop=[first])
    assert chat.invoke("Hello").text == text.split(first)[0]
    said = chat.invoke("Hello", stop=[second])
    assert said.text == text.split(second)[0]
    assert said.response_metadata["finish_reason"] == "stop"
    assert "".join(chunk.text for chunk in chat.stream("Hello", stop=[second])) == said.text
    assert chat.bind(stop=[second]).invoke("Hello").text == said.text


def test_impossible_settings_are_refused_when_they_are_given(rag: SacRAG, chat: ChatSAC) -> None:
    with pytest.raises(ValueError, match="temperature must be 0 or above, was: -1"):
        ChatSAC(rag, temperature=-1)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, was: 0"):
        chat.invoke("Hello", max_tokens=0)


def test_what_a_call_cannot_take_is_refused_by_name(chat: ChatSAC) -> None:
    with pytest.raises(TypeError, match=r"takes max_tokens, .* got: max_length, tools; it calls"):
        chat.invoke("Hello", max_length=3, tools=[])
    with pytest.raises(ValueError, match="has 'llama' loaded, was asked for 'gpt'; make another"):
        chat.invoke("Hello", model="gpt")
    assert chat.invoke("Hello", model="llama", timeout=3, max_retries=2).text


@pytest.mark.parametrize("plain", [False, True], ids=["chat", "plain"])
def test_a_ratio_is_the_models_the_calls_or_the_markers(llama: Generator, plain: bool) -> None:
    rag = make_rag(llama, "shared")
    own, at_6 = (ChatSAC(rag, plain=plain, ratio=ratio) for ratio in (None, 6))
    key = rag.compressor.key(PROSE[0])
    prompt = f"{mark(PROSE[0], key)} {mark(PROSE[0], key, 1)} {QUESTION}"

    def ratios(message: Any) -> list[int]:
        chunks = message.response_metadata["sac"]
        return [round(chunk["num_tokens"] / chunk["num_anchors"]) for chunk in chunks]

    assert ratios(own.invoke(prompt)) == [3, 1]
    said = at_6.invoke(prompt)
    assert ratios(said) == ratios(own.invoke(prompt, ratio=6)) == [6, 1]
    (row,) = own.batch([prompt], ratio=6)
    assert row.text == said.text == "".join(p.text for p in own.stream(prompt, ratio=6))
    assert ratios(at_6.invoke(prompt, ratio=2)) == [2, 1]
    assert own._identifying_params["ratio"] == 3
    assert at_6._identifying_params["ratio"] == 6


def test_a_ratio_that_the_compressor_does_not_have_is_refused(rag: SacRAG, chat: ChatSAC) -> None:
    with pytest.raises(ValueError, match=r"ratio must be 3, .*was: 7"):
        ChatSAC(rag, ratio=7)
    with pytest.raises(ValueError, match=r"ratio must be 3, .*was: 7"):
        chat.invoke("Hello", ratio=7)


def test_settings_can_be_chosen_by_configuration(rag: SacRAG) -> None:
    chat = ChatSAC(rag).configurable_fields(max_tokens=ConfigurableField("max_tokens"))
    said = chat.invoke("Hello", {"configurable": {"max_tokens": 3}})
    assert said.usage_metadata is not None
    assert said.usage_metadata["output_tokens"] == 3


def test_tokens_are_counted_by_the_models_own_tokenizer(chat: ChatSAC) -> None:
    assert chat.get_num_tokens(PROSE[0]) == len(chat.rag.generator.tokenize(PROSE[0]))


# --- batches


class Starts(BaseCallbackHandler):
    """Notes how runs began and ended."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("start")

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.events.append(response.generations[0][0].text)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.events.append(type(error).__name__)


@pytest.mark.parametrize("way", ["batch", "abatch"])
async def test_a_batch_is_one_padded_batch(
    rag: SacRAG, chat: ChatSAC, llama: Generator, way: str
) -> None:
    inputs: list[Any] = [asked(rag, *row) for row in ROWS]
    chat.batch(inputs)  # every chunk and the prefix are there now
    handlers = [Starts() for _ in ROWS]
    configs: Any = [{"callbacks": [handler]} for handler in handlers]
    with passes_of(llama) as passes:
        said = chat.batch(inputs, configs) if way == "batch" else await chat.abatch(inputs, configs)
    assert passes == [len(ROWS)] * SHORT.max_new_tokens
    assert [handler.events for handler in handlers] == [["start", row.text] for row in said]


def test_a_batch_has_no_more_rows_than_it_may(rag: SacRAG, llama: Generator) -> None:
    chat = ChatSAC(rag, batch_size=3, max_tokens=1)
    chat.invoke("warm")
    with passes_of(llama) as passes:
        said = chat.batch([f"Say {i}" for i in range(7)])
        assert passes == [3, 3, 1]
        chat.batch([f"Say {i}" for i in range(4)], {"max_concurrency": 2})
    assert passes == [3, 3, 1, 2, 2]
    assert [row.text for row in said] == [chat.invoke(f"Say {i}").text for i in range(7)]
    assert chat.batch([]) == []


@pytest.mark.parametrize("way", ["batch", "abatch"])
async def test_a_bad_row_is_only_its_own(rag: SacRAG, chat: ChatSAC, way: str) -> None:
    picture: Any = [HumanMessage([{"type": "image", "url": "http://x/y.png"}])]
    inputs: list[Any] = ["Hello", picture, asked(rag, 0), "long " * 9000, "Hey"]

    async def ask(**options: Any) -> list[Any]:
        return (
            await chat.abatch(inputs, **options)
            if way == "abatch"
            else chat.batch(inputs, **options)
        )

    said = await ask(return_exceptions=True)
    assert isinstance(said[1], ValueError)
    assert isinstance(said[3], PromptTooLongError)
    for i in (0, 2, 4):
        assert said[i].text == chat.invoke(inputs[i]).text
    with pytest.raises(ValueError, match=r"reads text only: .* got: 'image'"):
        await ask()


def test_a_row_that_fails_alone_is_tried_once(rag: SacRAG, chat: ChatSAC) -> None:
    with pytest.raises(PromptTooLongError):
        chat.batch(["long " * 9000])
    assert rag.metrics().failed == 1


def test_a_batch_asks_only_what_the_cache_does_not_know(rag: SacRAG, llama: Generator) -> None:
    chat = ChatSAC(rag, cache=InMemoryCache(), max_tokens=1)
    known = chat.invoke("Known")
    with passes_of(llama) as passes:
        said = chat.batch(["Known", "New", "Newer"])
        assert [row.text for row in chat.batch(["Known", "New"])] == [row.text for row in said[:2]]
    assert passes == [2]
    assert said[0].text == known.text
    assert [row.text for row in said[1:]] == [chat.invoke(text).text for text in ("New", "Newer")]


async def test_rows_that_stream_do_not_wait_for_others(chat: ChatSAC) -> None:
    from langchain_core.runnables import RunnableLambda

    async def ask(_: str) -> list[str]:
        return [said.text for said in await chat.abatch(["Hello", "Hey"])]

    events = [event async for event in RunnableLambda(ask).astream_events("go", version="v2")]
    assert events[-1]["data"]["output"] == [chat.invoke(text).text for text in ("Hello", "Hey")]


# --- leaving


def test_a_stream_that_is_left_ends_the_work(chat: ChatSAC, llama: Generator) -> None:
    long = ChatSAC(chat.rag, max_tokens=2000)
    with passes_of(llama) as passes:
        stream = long.stream("Hello")
        for _ in range(3):
            next(stream)
        stream.close()
        done = len(passes)
        time.sleep(0.1)
        assert len(passes) == done < 20
    assert chat.rag.metrics().questions == 1  # accounted for as far as it came


# --- who shares an answer


def test_models_with_one_cache_never_share_an_answer(make_generator: Any) -> None:
    cache = InMemoryCache()
    llama = make_generator("llama")
    rag = make_rag(llama)
    chats = {
        "first": ChatSAC(rag, cache=cache),
        "other weights": ChatSAC(make_rag(make_generator("llama", seed=1)), cache=cache),
        "another architecture": ChatSAC(make_rag(make_generator("qwen3")), cache=cache),
        "another tenant": ChatSAC(make_rag(llama, namespace="tenant"), cache=cache),
        "misses as text": ChatSAC(make_rag(llama, on_miss="text"), cache=cache),
        "completions": ChatSAC(rag, cache=cache, plain=True),
        "another prompt format": ChatSAC(make_rag(llama, prompt_format=SPANS), cache=cache),
        "other words": ChatSAC(
            make_rag(llama, prompt_format=replace(SPANS, prefix="Q")), cache=cache
        ),
        "no stop": ChatSAC(make_rag(llama, prompt_format=SPANS), cache=cache, stop=[]),
        "longer": ChatSAC(rag, cache=cache, max_tokens=9),
        "another stop": ChatSAC(rag, cache=cache, stop=["e"]),
        "sampled": ChatSAC(rag, cache=cache, temperature=1.0, seed=1),
        "another seed": ChatSAC(rag, cache=cache, temperature=1.0, seed=2),
    }
    strings = {name: chat._get_llm_string() for name, chat in chats.items()}
    assert len(set(strings.values())) == len(chats)
    assert not any("tenant" in string for string in strings.values())
    texts = [chat.invoke("Hello").text for chat in chats.values()]
    assert [chat.invoke("Hello").text for chat in chats.values()] == texts


def test_an_answer_out_of_the_cache_costs_nothing(rag: SacRAG, llama: Generator) -> None:
    chat = ChatSAC(rag, cache=InMemoryCache())
    first = chat.invoke(asked(rag, 0))
    with passes_of(llama) as passes:
        second = ChatSAC(rag, cache=chat.cache).invoke(asked(rag, 0))
    assert passes == []
    assert second.text == first.text
    assert chat.invoke(asked(rag, 1)).text != first.text


# --- failing


def test_a_missing_chunk_is_refused_where_the_pipeline_refuses_it(llama: Generator) -> None:
    rag = make_rag(llama, on_miss="raise")
    handler = Starts()
    with pytest.raises(ChunkMissError, match="1 of 1 chunks are not in the store"):
        ChatSAC(rag).invoke(asked(rag, 0), {"callbacks": [handler]})
    assert handler.events == ["start", "ChunkMissError"]
    with pytest.raises(ChunkMissError):
        list(ChatSAC(rag).stream(asked(rag, 0)))


def test_a_missing_chunk_is_text_where_the_pipeline_reads_it(llama: Generator) -> None:
    rag = make_rag(llama, on_miss="text")
    said = ChatSAC(rag).invoke(asked(rag, 0))
    assert [chunk["read_as"] for chunk in said.response_metadata["sac"]] == ["text"]
    plain = [SystemMessage("Be brief."), HumanMessage(f"{PROSE[0]}\n{QUESTION}")]
    assert said.usage_metadata is not None
    assert said.usage_metadata["input_tokens"] > 0
    assert ChatSAC(rag).invoke(plain).response_metadata["sac"] == []


# --- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_is_loaded_in_one_line(saved: Path) -> None:
    chat = ChatSAC.from_pretrained(
        saved, device="cpu", dtype="float32", decoding=SHORT, temperature=0, stop=["zz"]
    )
    assert chat.model == "tiny"
    assert (chat.temperature, chat.stop, chat.rag.decoding) == (0, ["zz"], SHORT)
    text = chat.invoke(asked(chat.rag, 0)).text
    assert text == chat.rag.chat([same_in_the_pipeline(0)])[0].text
    assert ChatSAC(chat.rag).model == "tiny"
    assert str(saved.parent) not in repr(chat) + str(chat._get_llm_string())
