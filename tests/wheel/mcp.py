"""With the extra "mcp" the command serves its tools to a client, over its pipes."""

import asyncio
import subprocess
import sys
from pathlib import Path

from mcp import Client, StdioServerParameters

# The command's script is in the environment of the bare package.
COMMAND = [sys.executable, "-I", "-m", "sac_rag.cli"]
TEXT = "The kiosk at the pier sells blue paint."


async def use() -> None:
    python, *args = [*COMMAND, "mcp", "library"]
    async with Client(StdioServerParameters(command=python, args=args)) as client:
        tools = (await client.list_tools()).tools
        assert {tool.name for tool in tools} == {"ask", "search", "precompress"}
        question = {"question": "What does the kiosk sell?", "texts": [TEXT]}
        asked = (await client.call_tool("ask", question)).structured_content
        assert [cited["status"] for cited in asked["citations"]] == ["hit"], asked
        assert "paint" in asked["answer"], asked


Path("kiosk.txt").write_text(TEXT)
precompress = [*COMMAND, "precompress", "kiosk.txt", "--store", "library", "--no-index", "--as-is"]
subprocess.run(precompress, check=True)
asyncio.run(use())
