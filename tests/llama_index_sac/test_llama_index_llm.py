"""One answer whichever way it is asked for; loops go on, and what is left or wrong ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
from llama_index.core import Settings, SummaryIndex
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index_sac import SACLLM, SACPostprocessor, UnanswerableError, text_qa_template
from llama_index_sac.markers import pieces
from support.models import PROSE, make_model, make_tokenizer, passes_of
from tiny_index import (  # noqa: F401
    QUESTION,
    SHORT,
    home_of_module,
    make_nodes,
    make_rag,
    no_loop_is_left,
    query_engine,
    scored,
)

from sac_rag import Chunk, ChunkMissError, Decoding, Message, SacRAG
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import SPANS

Ask = Callable[..., Awaitable[str]]


async def complete(llm: SACLLM, prompt: str, **options: Any) -> str:
    return llm.complete(prompt, **options).text


async def chat(llm: SACLLM, prompt: str) -> str:
    return str(llm.chat([ChatMessage(prompt)]).message.content)


async def stream_complete(llm: SACLLM, prompt: str, **options: Any) -> str:
    return "".join(str(r.delta) for r in llm.stream_complete(prompt, **options))


async def stream_chat(llm: SACLLM, prompt: str) -> str:
    return "".join(str(r.delta) for r in llm.stream_chat([ChatMessage(prompt)]))


async def acomplete(llm: SACLLM, prompt: str, **options: Any) -> str:
    return (await llm.acomplete(prompt, **options)).text


async def achat(llm: SACLLM, prompt: str) -> str:
    return str((await llm.achat([ChatMessage(prompt)])).message.content)


async def astream_complete(llm: SACLLM, prompt: str, **options: Any) -> str:
    return "".join([str(r.delta) async for r in await llm.astream_complete(prompt, **options)])


async def astream_chat(llm: SACLLM, prompt: str) -> str:
    stream = await llm.astream_chat([ChatMessage(prompt)])
    return "".join([str(r.delta) async for r in stream])


SYNC: list[Ask] = [complete, chat, stream_complete, stream_chat]
ASYNC: list[Ask] = [acomplete, achat, astream_complete, astream_chat]


@pytest.fixture(params=[False, True], ids=["chat", "plain"])
def llm(request: pytest.FixtureRequest, llama: Generator) -> SACLLM:
    return SACLLM(make_rag(llama), plain=request.param)


def prompt_of(llm: SACLLM) -> str:
    """A prompt with two nodes in it, as a response synthesizer writes it."""
    nodes = SACPostprocessor(llm.rag).postprocess_nodes(scored(make_nodes(2)))
    first, second = (node.get_content("llm") for node in nodes)
    return f"First {first} and then {second}. {QUESTION}"


def expected(llm: SACLLM, **changes: Any) -> str:
    """What the pipeline itself answers to that."""
    first, second = map(Chunk, PROSE[:2])
    content = ("First ", first, " and then ", second, f". {QUESTION}")
    decoding = Decoding(**{"max_new_tokens": 6, **changes})
    if llm.plain:
        return llm.rag.complete([content], decoding)[0].text
    return llm.rag.chat([[Message("user", content)]], decoding)[0].text


@pytest.mark.parametrize("ask", SYNC + ASYNC)
async def test_every_way_of_asking_gives_the_pipelines_answer(llm: SACLLM, ask: Ask) -> None:
    assert await ask(llm, prompt_of(llm)) == expected(llm)


def test_a_streams_last_response_is_the_whole_one(llm: SACLLM) -> None:
    *parts, last = llm.stream_complete("Why?")
    whole = llm.complete("Why?")
    assert (last.text, last.raw) == (whole.text, whole.raw)
    assert all(part.raw is None for part in parts)
    usage = last.raw["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert last.raw["finish_reason"] == "length"


def test_a_call_may_change_how_it_is_answered(llm: SACLLM) -> None:
    prompt = prompt_of(llm)
    assert llm.complete(prompt, max_tokens=3).text == expected(llm, max_new_tokens=3)
    sampled = llm.complete(prompt, temperature=2.0, seed=3).text
    assert sampled == expected(llm, temperature=2.0, seed=3)
    with pytest.raises(TypeError, match=r"no argument tempo; its arguments are .*temperature"):
        llm.complete(prompt, tempo=1)


@pytest.mark.parametrize("plain", [False, True], ids=["chat", "plain"])
def test_a_ratio_is_the_models_the_calls_or_the_postprocessors(
    llama: Generator, plain: bool
) -> None:
    rag = make_rag(llama, "shared")
    nodes = scored(make_nodes(1))
    before = [node.to_dict() for node in nodes]
    marker, other = (
        SACPostprocessor(rag, ratio=ratio).postprocess_nodes(nodes)[0].get_content("llm")
        for ratio in (None, 1)
    )
    assert marker != other
    assert [node.to_dict() for node in nodes] == before
    own, at_6 = (SACLLM(rag, plain=plain, ratio=ratio) for ratio in (None, 6))

    def ratios(response: Any) -> list[int]:
        chunks = response.additional_kwargs["sac"]["chunks"]
        return [round(chunk["num_tokens"] / chunk["num_anchors"]) for chunk in chunks]

    prompt = f"{marker} and {other} {QUESTION}"
    assert ratios(own.complete(prompt)) == [3, 1]
    assert ratios(at_6.complete(prompt)) == ratios(own.complete(prompt, ratio=6)) == [6, 1]
    assert ratios(at_6.complete(prompt, ratio=2)) == [2, 1]
    assert at_6.complete(prompt).text == own.complete(prompt, ratio=6).text


def test_a_ratio_that_the_compressor_does_not_have_is_refused(llama: Generator) -> None:
    rag = make_rag(llama)
    for make in (SACLLM, SACPostprocessor):
        with pytest.raises(ValueError, match=r"ratio must be 3, .*was: 7"):
            make(rag, ratio=7)
    with pytest.raises(UnanswerableError, match=r"ratio must be 3, .*was: 7"):
        SACLLM(rag).complete(QUESTION, ratio=7)


def test_roles_become_the_chat_templates_and_plain_paragraphs(llama: Generator) -> None:
    rag = make_rag(llama)
    messages = [ChatMessage("Be brief.", role="system"), ChatMessage(QUESTION)]
    conversation = [Message("system", ("Be brief.",)), Message("user", (QUESTION,))]
    assert SACLLM(rag).chat(messages).message.content == rag.chat([conversation])[0].text
    plain = SACLLM(rag, plain=True).chat(messages).message.content
    assert plain == rag.complete([[f"Be brief.\n\n{QUESTION}"]])[0].text


# --- which prompt


@pytest.fixture
def spans(llama: Generator) -> SacRAG:
    """A pipeline with a plain prompt whose answers end at their second letter."""
    said = make_rag(llama, prompt_format=replace(SPANS, stop=())).answer(QUESTION, PROSE[:2]).text
    return make_rag(llama, prompt_format=replace(SPANS, stop=(said[1],)))


def own_prompt(rag: SacRAG, count: int = 2) -> str:
    """A question about nodes in the format's prompt, as a response synthesizer writes it."""
    nodes = SACPostprocessor(rag).postprocess_nodes(scored(make_nodes(count)))
    context = "\n\n".join(node.get_content("llm") for node in nodes)
    return text_qa_template(rag).format(context_str=context, query_str=QUESTION)


@pytest.mark.parametrize("ask", SYNC + ASYNC)
async def test_the_formats_own_prompt_is_plain_and_ends_at_its_stop_texts(
    spans: SacRAG, ask: Ask
) -> None:
    expected = spans.answer(QUESTION, PROSE[:2])
    assert (len(expected.text), expected.finish_reason) == (1, "stop")
    assert await ask(SACLLM(spans), own_prompt(spans)) == expected.text


def test_everything_else_is_a_chat_that_ends_where_it_ends(spans: SacRAG) -> None:
    llm, own = SACLLM(spans), own_prompt(spans, 0)
    conversations = [
        [("user", QUESTION)],
        [("user", f"What does {SPANS.prefix!r} mean?\nQuestion: Who?\nAnswer:")],
        [("user", f"{own}\nBe brief.")],
        [("system", "Be brief."), ("user", own)],
        [("system", own)],
        [("user", QUESTION), ("assistant", "Seven."), ("user", own)],
    ]
    for turns in conversations:
        turn = [Message(role, (text,)) for role, text in turns]
        (expected,) = spans.chat([turn], replace(SHORT, stop=()))
        said = llm.chat([ChatMessage(text, role=role) for role, text in turns])
        assert said.message.content == expected.text
    (expected,) = spans.chat([[Message("user", (QUESTION,))]])
    assert llm.complete(QUESTION).text == expected.text


def test_a_stop_of_the_model_or_the_call_takes_the_place_of_the_formats(
    llama: Generator, spans: SacRAG
) -> None:
    prompt = own_prompt(spans)
    whole = make_rag(llama, prompt_format=replace(SPANS, stop=())).answer(QUESTION, PROSE[:2]).text
    assert SACLLM(spans).complete(prompt).text != whole
    assert SACLLM(spans).complete(prompt, stop=()).text == whole
    assert SACLLM(spans).complete(prompt, stop=whole[3]).text == whole.split(whole[3])[0]
    unstopped = SACLLM(spans, decoding=replace(SHORT, stop=()))
    assert unstopped.complete(prompt).text == whole


@pytest.mark.parametrize("ask", [complete, stream_complete, acomplete, astream_complete])
async def test_a_formatted_prompt_gets_no_template(spans: SacRAG, ask: Ask) -> None:
    (completion,) = spans.complete([[QUESTION]])
    (chat,) = spans.chat([[Message("user", (QUESTION,))]])
    assert completion.text != chat.text
    for plain, expected in ((None, completion), (True, completion), (False, chat)):
        assert await ask(SACLLM(spans, plain=plain), QUESTION, formatted=True) == expected.text


def test_how_prompts_are_read_can_be_fixed(spans: SacRAG) -> None:
    prompt = own_prompt(spans)
    turn = Message("user", pieces(prompt, spans))
    assert SACLLM(spans, plain=False).complete(prompt).text == spans.chat([[turn]])[0].text
    assert SACLLM(spans, plain=True).complete(prompt).text == SACLLM(spans).complete(prompt).text
    assert SACLLM(spans, plain=True).complete(QUESTION).text == spans.complete([[QUESTION]])[0].text


def test_a_prompt_wrapper_of_the_users_own_is_used(llama: Generator) -> None:
    wrapped = SACLLM(make_rag(llama), completion_to_prompt=lambda prompt: f"Q: {prompt}")
    bare = SACLLM(wrapped.rag)
    assert wrapped.complete("Why?").text == bare.complete("Q: Why?").text
    formatted = wrapped.complete("Q: Why?", formatted=True).text
    assert formatted == bare.complete("Q: Why?", formatted=True).text


def test_llama_index_is_told_lengths_and_kind(llm: SACLLM) -> None:
    metadata = llm.metadata
    assert metadata.context_window == 8192 > metadata.num_output == 6
    assert metadata.is_chat_model is not llm.plain
    assert SACLLM(llm.rag).metadata.is_chat_model is True
    assert metadata.model_name == "llama"


def test_answers_as_long_as_the_context_are_refused(llama: Generator) -> None:
    with pytest.raises(ValueError, match="shorter than the model's context of 8192 tokens, may ha"):
        SACLLM(make_rag(llama), decoding=Decoding(max_new_tokens=8192))


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a SacRAG, got: str; SacRAG\.from_pretrained"):
        SACLLM("smollm2-135m")  # type: ignore[arg-type]


def test_pictures_are_refused_and_not_left_out(llama: Generator) -> None:
    picture = ChatMessage([TextBlock(text="What is this?"), ImageBlock(image=b"png")])
    with pytest.raises(UnanswerableError, match="reads text only, got a ImageBlock"):
        SACLLM(make_rag(llama)).chat([picture])


def test_a_saved_model_is_loaded_in_one_line(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "decoding": SHORT}
    llm = SACLLM.from_pretrained(tmp_path, plain=True, **options)
    assert llm.complete(QUESTION).text == llm.rag.complete([[QUESTION]])[0].text
    assert llm.metadata.model_name == tmp_path.name


# --- loops go on, and what is left ends


@pytest.mark.parametrize("ask", ASYNC)
async def test_the_event_loop_goes_on_while_the_model_is_taken(llama: Generator, ask: Ask) -> None:
    llm = SACLLM(make_rag(llama))
    with llama.running():  # this thread may still take it: what ran here would not wait
        asking = asyncio.create_task(ask(llm, QUESTION))
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not asking.done()
    assert await asking == llm.complete(QUESTION).text


async def test_nodes_are_compressed_while_the_event_loop_goes_on(llama: Generator) -> None:
    rag = make_rag(llama)
    with llama.running():
        retrieving = asyncio.create_task(
            SACPostprocessor(rag).apostprocess_nodes(scored(make_nodes(2)))
        )
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not retrieving.done()
    assert len(await retrieving) == 2


async def test_answers_at_the_same_time_are_those_one_at_a_time(llama: Generator) -> None:
    llm = SACLLM(make_rag(llama))
    prompts = [f"{prompt_of(llm)} {i}" for i in range(3)]
    together = await asyncio.gather(*(acomplete(llm, prompt) for prompt in prompts))
    assert together == [llm.complete(prompt).text for prompt in prompts]


async def test_answers_at_the_same_time_are_computed_together(llama: Generator) -> None:
    llm = SACLLM(make_rag(llama))
    prompts = [f"{QUESTION} {i}" for i in range(4)]
    expected = [llm.complete(prompt).text for prompt in prompts]
    with passes_of(llama) as passes:
        answers = await asyncio.gather(*(llm.acomplete(prompt) for prompt in prompts))
    assert [answer.text for answer in answers] == expected
    assert max(passes) > 1


LONG = {"max_tokens": 4000}


def test_a_stream_that_is_closed_writes_no_more(llm: SACLLM) -> None:
    stream = llm.stream_complete("Why?", **LONG)
    next(stream)
    stream.close()
    assert llm.rag.metrics().questions == 1
    assert llm.rag.metrics().generated_tokens < 5


async def test_an_async_stream_that_is_closed_writes_no_more(llm: SACLLM) -> None:
    stream = await llm.astream_complete("Why?", **LONG)
    await anext(stream)
    await stream.aclose()
    await until(lambda: llm.rag.metrics().questions == 1)
    assert llm.rag.metrics().generated_tokens < 5


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_call_that_is_cancelled_writes_no_more(llm: SACLLM, streamed: bool) -> None:
    async def asked() -> None:
        if streamed:
            async for _ in await llm.astream_complete("Why?", **LONG):
                pass
        else:
            await llm.acomplete("Why?", **LONG)

    asking = asyncio.create_task(asked())
    await until(lambda: llm.rag.metrics().first_tokens == 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    del asking
    await until(lambda: llm.rag.metrics().questions == 1)
    assert llm.rag.metrics().generated_tokens < 1000


async def until(done: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not done():
        assert time.monotonic() < ends, "waited in vain"
        await asyncio.sleep(0.002)


# --- what is wrong reaches the caller


@pytest.mark.parametrize("ask", SYNC + ASYNC)
async def test_a_chunk_that_has_left_the_store_is_missed_by_the_caller(
    llama: Generator, ask: Ask
) -> None:
    store: dict[str, Any] = {}
    rag = make_rag(llama, store=store)
    prompt = prompt_of(SACLLM(rag))
    store.clear()
    rag.on_miss = "raise"
    with pytest.raises(ChunkMissError, match="2 of 2 chunks are not in the store"):
        await ask(SACLLM(rag), prompt)


@pytest.mark.parametrize("ask", SYNC + ASYNC)
async def test_what_breaks_in_the_middle_of_an_answer_reaches_the_caller(
    make_generator: Callable[..., Generator], ask: Ask
) -> None:
    generator = make_generator()
    rag = make_rag(generator)
    passes = iter(range(3))

    def broken(*_: Any) -> None:
        if next(passes, None) is None:
            raise OSError("the device is lost")

    generator.model.base_model.register_forward_hook(broken)
    with pytest.raises(OSError, match="the device is lost"):
        await ask(SACLLM(rag), QUESTION)


@pytest.fixture
def narrow(make_generator: Callable[..., Generator]) -> Generator:
    """A model of 1024 positions."""
    generator = make_generator()
    generator.model.config.max_position_embeddings = 1024
    return generator


@pytest.fixture
def llama_indexs_own_tokenizer() -> Iterator[None]:
    yield
    llama_index.core.global_tokenizer = None


async def test_too_much_is_an_error_and_no_empty_response(narrow: Generator) -> None:
    """LlamaIndex counts markers, not what they stand for, and swallows ValueErrors."""
    nodes = make_nodes(8)
    for node in nodes:
        node.text = f"{node.text} " * 8
    engine = query_engine(make_rag(narrow), nodes)
    with pytest.raises(UnanswerableError, match=r"needs \d+ positions .* the model has 1024"):
        engine.query(QUESTION)
    with pytest.raises(UnanswerableError, match=r"needs \d+ positions .* the model has 1024"):
        await engine.aquery(QUESTION)


@pytest.mark.usefixtures("llama_indexs_own_tokenizer")
def test_with_the_models_own_tokenizer_too_much_is_several_prompts(narrow: Generator) -> None:
    nodes = make_nodes(8)
    for node in nodes:
        node.text = f"{node.text} " * 8
    rag = make_rag(narrow)
    llm = SACLLM(rag)
    Settings.tokenizer = llm.tokenize
    engine = SummaryIndex(nodes).as_query_engine(
        llm=llm, node_postprocessors=[SACPostprocessor(rag)]
    )
    assert engine.query(QUESTION).response
    assert rag.metrics().questions > 1
    assert rag.metrics().hits >= 8


@pytest.mark.usefixtures("llama_indexs_own_tokenizer")
def test_what_simple_summarize_leaves_out_is_said(
    narrow: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = make_nodes(4)
    for node in nodes:
        node.text = f"{node.text} " * 17
    rag = make_rag(narrow)
    Settings.tokenizer = SACLLM(rag).tokenize
    response = query_engine(rag, nodes, response_mode="simple_summarize").query(QUESTION)
    reports = [source.node.sac["read_as"] for source in response.source_nodes]
    assert reports == ["anchors", "anchors", "nothing", "nothing"]
    assert "simple_summarize left out 2 of 4 retrieved texts" in caplog.text
    caplog.clear()
    assert query_engine(rag, nodes, response_mode="tree_summarize").query(QUESTION).response
    assert caplog.text == ""


def test_a_marker_is_as_long_as_what_it_stands_for(llama: Generator) -> None:
    llm = SACLLM(make_rag(llama))
    (node,) = SACPostprocessor(llm.rag).postprocess_nodes(scored(make_nodes(1)))
    marker = node.get_content("llm")
    assert llm.tokenize(marker) == llama.tokenize(PROSE[0])
    assert llm.tokenize(f"{marker} <|sac:") == llama.tokenize(PROSE[0]) + llama.tokenize(" <|sac:")
