from __future__ import annotations

from pathlib import Path

import pytest

from sac_rag.benchmarks.load import measure_load
from sac_rag.stores import DiskStore


@pytest.mark.slow
def test_a_store_under_load_gives_no_wrong_value_and_loses_nothing(tmp_path: Path) -> None:
    """Whichever process is killed, stopped or changes the key, wherever the folder is."""
    report = measure_load(tmp_path / "load", operations=200, processes=3)
    assert (report.wrong, report.lost, report.hung, report.problems) == (0, 0, 0, ())
    assert report.is_in_order
    assert report.operations >= 600
    assert report.hits > 50
    assert report.writes > 50
    assert report.kills + report.stops + report.moves > 5


def test_the_load_needs_an_empty_folder(tmp_path: Path) -> None:
    DiskStore(tmp_path / "store").close()
    with pytest.raises(ValueError, match="must be empty"):
        measure_load(tmp_path)
