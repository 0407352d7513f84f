"""The LangChain code in the documentation runs on the default model, and does what it says."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run(text: str, page: str) -> dict[str, Any]:
    """Runs the blocks of a page one after the other; returns their names."""
    names: dict[str, Any] = {"__name__": "guide"}
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    exec(compile(code, page, "exec", dont_inherit=True), names)
    return names


@pytest.mark.real_model
def test_the_guide_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("langchain")
    monkeypatch.chdir(tmp_path)
    names = run((DOCS / "langchain.md").read_text("utf-8"), "langchain.md")
    text, usage, statuses, statuses_of_the_agent = capsys.readouterr().out.splitlines()
    assert "seven" in text
    assert "'cache_creation': 0" in usage
    assert statuses == statuses_of_the_agent == "['hit', 'hit']"
    question = names["HumanMessage"]("How many ships did the keeper count?")
    thread = {"configurable": {"thread_id": "1"}}
    state = asyncio.run(names["graph"].ainvoke({"messages": [question]}, thread))
    assert [c["status"] for c in state["messages"][-1].response_metadata["sac"]] == ["hit", "hit"]
    assert "sac:chunk" not in str(state["documents"])
    assert names["rag"].forget("tower") == 1


@pytest.mark.real_model
def test_the_page_on_deleting_does_what_it_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "deleting.md").read_text("utf-8")
    (section,) = re.findall(r"\n## LangChain\n(.*?)(?=\n## |\Z)", page, re.DOTALL)
    run(section, "deleting.md")
    assert capsys.readouterr().out.splitlines() == ["2", "1"]
