"""An MCP client asks, searches and compresses ahead, under the limits of the endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.models import PROSE
from typer.testing import CliRunner

pytest.importorskip("mcp")

from mcp import Client

from sac_rag import SacRAG
from sac_rag.cli import app
from sac_rag.server.mcp import make_mcp
from sac_rag.server.service import Service


def talk(service: Service, about: Callable[[Client], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        # "legacy" is what clients of today speak: JSON-RPC behind an initialize handshake.
        async with Client(make_mcp(service), mode="legacy") as client:
            return await about(client)

    return asyncio.run(run())


def test_the_tools_are_listed_with_their_arguments(service: Service) -> None:
    tools = {tool.name: tool for tool in talk(service, Client.list_tools).tools}
    assert tools.keys() == {"ask", "search", "precompress"}
    assert tools["ask"].input_schema["required"] == ["question"]
    assert all(tool.description for tool in tools.values())


def test_texts_are_compressed_ahead_and_then_hits(service: Service, rag: SacRAG) -> None:
    async def about(client: Client) -> list[Any]:
        texts = list(PROSE[:2])
        calls = [
            ("precompress", {"texts": texts}),
            ("precompress", {"texts": texts}),
            ("ask", {"question": "What is it?", "texts": texts, "max_tokens": 8}),
        ]
        return [await client.call_tool(name, arguments) for name, arguments in calls]

    first, again, asked = (call.structured_content for call in talk(service, about))
    assert first == {"computed": 2, "stored_before": 0}
    assert again == {"computed": 0, "stored_before": 2}
    assert [cited["status"] for cited in asked["citations"]] == ["hit", "hit"]
    assert asked["answer"] == rag.answer("What is it?", PROSE[:2]).text


def test_the_collection_is_searched_and_asked(service: Service) -> None:
    async def about(client: Client) -> list[Any]:
        arguments = {"query": PROSE[4], "k": 2}
        searched = await client.call_tool("search", arguments)
        asked = await client.call_tool("ask", {"question": PROSE[4], "k": 2, "max_tokens": 4})
        return [searched.structured_content, asked.structured_content]

    searched, asked = talk(service, about)
    found = searched["result"]
    assert PROSE[4] in [chunk["text"] for chunk in found]
    assert [c["document"] for c in asked["citations"]] == [c["document"] for c in found]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ask", {"question": ""}, "the last message must be a user's and have text"),
        ("ask", {"question": "Who?", "max_tokens": 10**6}, "an answer must have at most"),
        ("search", {"query": "Who?", "k": 10**6}, "may have at most 64 documents"),
        ("precompress", {"texts": ["a"] * 65}, "may have at most 64 documents"),
    ],
)
def test_limits_and_bad_arguments_are_errors_of_the_call(
    service: Service, name: str, arguments: dict[str, Any], message: str
) -> None:
    result = talk(service, lambda client: client.call_tool(name, arguments))
    assert result.is_error
    text = result.content[0].text
    assert message in text


def test_the_command_says_what_it_serves() -> None:
    done = CliRunner().invoke(app, ["mcp", "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "ask, search and precompress" in done.output
