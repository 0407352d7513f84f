"""An MCP server over a service: tools for agents, under the limits of the endpoint's requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
from pydantic import ValidationError

from sac_rag.server import refusals
from sac_rag.server.schemas import ChatRequest
from sac_rag.server.service import Asked, Service, refusal_of

try:
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
except ImportError as error:
    raise ImportError(
        "sac_rag.server.mcp needs the 'mcp' extra: pip install 'sac-rag[mcp]'"
    ) from error


def make_mcp(service: Service, namespace: str = "") -> MCPServer[Any]:
    """The MCP server of a service; the caller closes the service.

    Args:
        service: What is served.
        namespace: One of the service's, in which everything is asked and compressed.
    """
    server: MCPServer[Any] = MCPServer("sac-rag", log_level="WARNING")

    async def prepared(question: str, **fields: Any) -> Asked:
        turn = {"role": "user", "content": question}
        body = {"model": service.name, "messages": [turn], **fields}
        try:
            wanted = ChatRequest.model_validate(body)
        except ValidationError as error:
            raise refusals.of_validation(error) from None
        return await anyio.to_thread.run_sync(service.prepare, wanted, namespace)

    @server.tool()
    async def ask(
        question: str, texts: list[str] | None = None, k: int = 4, max_tokens: int = 128
    ) -> dict[str, Any]:
        """Answers a question from texts, or from the k chunks of the collection most like it."""
        source: dict[str, Any] = {"documents": _documents(texts)} if texts else {"retrieve": k}
        with _tool_errors():
            asked = await prepared(question, max_tokens=max_tokens, **source)
            answer = await asyncio.wrap_future(asked.submit())
        citations = [
            {"document": report.chunk.id, "title": report.chunk.title, "status": report.status}
            for report in answer.chunks
        ]
        return {"answer": answer.text, "citations": citations}

    @server.tool()
    async def search(query: str, k: int = 4) -> list[dict[str, Any]]:
        """Finds the k chunks of the collection that are most like a query."""
        with _tool_errors():
            asked = await prepared(query, retrieve=k)
        return [{"document": c.id, "title": c.title, "text": c.text} for c in asked.chunks]

    @server.tool()
    async def precompress(texts: list[str]) -> dict[str, int]:
        """Compresses texts ahead of questions, so that asking about them is fast."""
        with _tool_errors():
            asked = await prepared("-", documents=_documents(texts))
            work = partial(asked.rag.precompress, asked.chunks)
            report = await anyio.to_thread.run_sync(work)
        return {"computed": report.computed, "stored_before": report.hits}

    return server


def _documents(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


@contextmanager
def _tool_errors() -> Iterator[None]:
    """Refusals as the client's model can read them; anything else without its message."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (answered, and logged without its text)
        raise ToolError(str(refusal_of(error))) from None
