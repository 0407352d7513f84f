"""The code in docs/langchain.md runs on the default model, and says what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "langchain.md"


@pytest.mark.real_model
def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
    exec(compile(code, "langchain.md", "exec"), {"__name__": "guide"})
    text, usage, statuses = capsys.readouterr().out.splitlines()
    assert "seven" in text
    assert "'cache_creation': 0" in usage
    assert statuses == "['hit', 'hit']"
