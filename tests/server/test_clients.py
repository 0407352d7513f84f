"""Clients that users have: OpenAI's package, LangChain, LlamaIndex and curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from support.models import PROSE
from support.serving import TIMEOUT, Running, running

from sac_rag import Message, SacRAG
from sac_rag.server.service import Service

DOCUMENTS = [{"id": "d", "title": "T", "text": PROSE[0]}]
TURNS: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is it?"},
]
TOKEN = "token-0123456789"


@pytest.fixture
def expected(rag: SacRAG) -> str:
    messages = [Message("system", ("Be brief.",)), Message("user", ("What is it?",))]
    return rag.chat([messages])[0].text


@pytest.fixture
def address(service: Service) -> Any:
    with running(service, [TOKEN]) as served:
        yield f"{served.url}/v1"


def test_the_openai_package(address: str, expected: str) -> None:
    with openai.OpenAI(base_url=address, api_key=TOKEN, timeout=TIMEOUT) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        answer = client.chat.completions.create(model="tiny", messages=TURNS)
        assert answer.choices[0].message.content == expected
        assert answer.usage is not None and answer.usage.completion_tokens > 0
        documents = {"documents": DOCUMENTS}
        cited = client.chat.completions.create(
            model="tiny", messages=TURNS, temperature=0, extra_body=documents
        )
        citations = cited.model_dump()["metadata"]["citations"]
        assert [citation["document"] for citation in citations] == ["d"]
        events = list(
            client.chat.completions.create(
                model="tiny",
                messages=TURNS,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
        assert "".join(pieces) == expected
        assert events[-1].usage == answer.usage
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            client.chat.completions.create(model="tiny", messages=TURNS, tools=[{}])  # type: ignore[list-item]
        with pytest.raises(openai.NotFoundError, match="tiny"):
            client.chat.completions.create(model="gpt-5", messages=TURNS)
    with (
        openai.OpenAI(base_url=address, api_key="wrong-0123456789") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


async def test_the_openai_package_leaving_a_stream(address: str) -> None:
    async with openai.AsyncOpenAI(base_url=address, api_key=TOKEN, timeout=TIMEOUT) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=TURNS, stream=True, max_tokens=1000
        )
        async with stream:
            async for _ in stream:
                break
        answer = await client.chat.completions.create(model="tiny", messages=TURNS)
        assert answer.choices[0].message.content


def test_langchain(address: str, expected: str) -> None:
    model = ChatOpenAI(
        model="tiny",
        base_url=address,
        api_key=TOKEN,  # type: ignore[arg-type]
        temperature=0,
        timeout=TIMEOUT,
        stream_usage=True,
    )
    turns = [("system", "Be brief."), ("human", "What is it?")]
    answer = model.invoke(turns)
    assert answer.content == expected
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] > 0
    assert "".join(str(piece.content) for piece in model.stream(turns)) == expected
    assert [one.content for one in model.batch([turns, turns])] == [expected] * 2
    cited = model.bind(extra_body={"documents": DOCUMENTS}).invoke(turns)
    assert cited.content
    assert cited.usage_metadata is not None
    assert cited.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]


def test_llama_index(address: str, expected: str) -> None:
    settings: Any = {"api_base": address, "api_key": TOKEN, "is_chat_model": True}
    # Its default temperature is 0.1.
    model = OpenAILike(model="tiny", temperature=0, timeout=TIMEOUT, **settings)
    turns = [ChatMessage(role=turn["role"], content=turn["content"]) for turn in TURNS]
    assert model.chat(turns).message.content == expected
    assert [*model.stream_chat(turns)][-1].message.content == expected
    cited = model.chat(turns, extra_body={"documents": DOCUMENTS})
    assert cited.raw is not None
    citations = cited.raw.model_dump()["metadata"]["citations"]
    assert [citation["document"] for citation in citations] == ["d"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(address: str, expected: str) -> None:
    def curl(fields: dict[str, Any], *more: str) -> str:
        body = json.dumps({"model": "tiny", "messages": TURNS, **fields})
        command = ["curl", "-sS", "--fail-with-body", f"{address}/chat/completions", "--json", body]
        headers = ["-H", f"Authorization: Bearer {TOKEN}", *more]
        return subprocess.run(
            [*command, *headers], capture_output=True, text=True, check=False
        ).stdout

    assert json.loads(curl({}))["choices"][0]["message"]["content"] == expected
    assert curl({"stream": True}, "-N").endswith("data: [DONE]\n\n")
    assert "n: " in json.loads(curl({"n": 2}))["error"]["message"]


def test_a_client_that_sends_a_session_id_is_told_so(served: Running) -> None:
    answer = served.ask(user="u1")
    assert answer.status_code == 400
    assert "user is not supported" in answer.json()["error"]["message"]
