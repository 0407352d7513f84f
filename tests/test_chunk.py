"""A chunk is checked where it is made, before anything is computed for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sac_rag.chunk import Chunk


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", None),
        ("text", b"bytes"),
        ("text", 7),
        ("id", 7),
        ("id", Path("a.txt")),
        ("id", float("nan")),
        ("title", 2001),
        ("title", ["a"]),
    ],
)
def test_a_field_that_is_no_str_is_refused_by_name(name: str, value: Any) -> None:
    fields = {"text": "a", name: value}
    with pytest.raises(TypeError, match=f"a chunk's {name} must be a str, was:"):
        Chunk(**fields)


@pytest.mark.parametrize("ratio", [0, -1, 2.0, "2", True])
def test_a_ratio_that_is_no_count_is_refused(ratio: Any) -> None:
    with pytest.raises(ValueError, match="ratio must be"):
        Chunk("a", ratio=ratio)


def test_what_else_is_no_chunk_is_refused_with_the_forms(tmp_path: Path) -> None:
    for value in (7, None, ("id", 7), ("a", "b", "c"), tmp_path, {"text": "a"}):
        with pytest.raises(TypeError, match=r"a str, an \(id, text\) pair or a Chunk, was:"):
            Chunk.of(value)  # type: ignore[arg-type]
