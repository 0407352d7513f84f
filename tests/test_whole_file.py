"""A file appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from sac_rag.whole_file import whole_file


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("before")
    with whole_file(path) as draft:
        draft.write_text("after")
        assert path.read_text() == "before"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.name, "after")]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "settings.json"
    path.write_text("before")
    with pytest.raises(type(error)), whole_file(path) as draft:
        draft.write_text("af")
        raise error
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.name, "before")]


def test_a_draft_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    with whole_file(path) as draft:
        name = draft
        draft.write_text("whole")
    name.write_text("left by a killed process of the same number")
    with whole_file(path) as draft:
        assert not draft.exists()
        draft.write_text("again")
    assert path.read_text() == "again"
