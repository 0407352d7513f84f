"""bench objects: each read of a small entry is one request."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from sac_rag.benchmarks.objects import measure_object_reads
from sac_rag.cli.commands import app


def test_random_reads_of_small_entries_are_one_request_each(tmp_path: Path) -> None:
    url = str(tmp_path / "objects")
    figures = measure_object_reads(url, entries=500, reads=50, shard_bytes=2**17)
    assert (figures.entries, figures.requests_per_read) == (500, 1.0)
    assert 1 < figures.shards < 20
    assert figures.open_requests == figures.shards + 1
    assert figures.p50_ms <= figures.p99_ms


def test_the_command_reports_them() -> None:
    result = CliRunner().invoke(
        app, ["bench", "objects", "--entries", "20", "--reads", "5", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["entries"] == 20
