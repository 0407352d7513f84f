"""The plan is its formulas, and the simulation of tiers predicts what a real TieredStore does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sac_rag.benchmarks.scale import (
    MODELS,
    Assumptions,
    Workload,
    measure_scale,
    plan,
    plans,
    simulate,
    to_markdown,
)
from sac_rag.cli import app
from sac_rag.stores.disk import index

SMALL = Workload(entries=80, stored=60, memory=8, disk=25, warm_up=20, queries=150, k=2)
# Shares of 300 chunks in two draws of them: four standard deviations of the difference, at most.
TOLERANCE = 4 * (2 * 0.25 / 300) ** 0.5


def test_bytes_hours_and_requests_are_those_of_the_formulas() -> None:
    eight = MODELS[1]
    assert eight.token_nbytes == 128 * 2**10
    assumed = Assumptions()
    row = plan(eight, 10**8, 5)
    assert row.entry_nbytes == 102 * 128 * 2**10
    assert row.nbytes == 10**8 * row.entry_nbytes
    flop = 10**8 * 510 * 2 * eight.parameters
    assert row.gpu_hours == pytest.approx(flop / (0.4 * 989e12) / 3600)
    assert row.compress_cost == row.gpu_hours * assumed.gpu_hour
    assert row.link_requests_per_s == assumed.link / (8 * row.entry_nbytes)
    faster = plan(eight, 10**8, 5, replace(assumed, bandwidth=2 * assumed.bandwidth))
    assert 1 < faster.gpu_requests_per_s / row.gpu_requests_per_s < 2


def test_the_page_has_the_table_of_the_command() -> None:
    page = (Path(__file__).parents[2] / "docs/at_scale.md").read_text(encoding="utf-8")
    assert f"<!-- plan -->\n{to_markdown(plans())}<!-- /plan -->" in page
    for name, value in vars(Assumptions()).items():
        assert f"| `{name}` | {value:g} " in page, name


@pytest.mark.parametrize("renew_s", [0.0, 1e9], ids=["least recently used", "first in, first out"])
def test_the_simulation_predicts_where_a_real_run_finds_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renew_s: float
) -> None:
    """Of the same queries exactly; what is left for others is the draw."""
    monkeypatch.setattr(index, "RENEW_SECONDS", renew_s)
    report = measure_scale(tmp_path, SMALL, round_trip_s=0, compute_s=0, seed=7)
    assert min(report.measured.shares.values()) > 0
    no_time = dict.fromkeys(report.read_ms, 0.0)
    same, other = (simulate(SMALL, no_time, renew_s=renew_s, seed=seed) for seed in (7, 8))
    assert same.shares == report.measured.shares
    for name, share in report.measured.shares.items():
        assert other.shares[name] == pytest.approx(share, abs=TOLERANCE), name
    assert other.hit_rate == pytest.approx(report.measured.hit_rate, abs=TOLERANCE)


def test_waits_are_the_sum_of_the_reads_of_a_query() -> None:
    alone = replace(SMALL, k=1)
    waits = simulate(alone, {"memory": 0, "disk": 1, "remote": 2, "miss": 4}, first_token_s=10)
    mean = waits.shares["disk"] + 2 * waits.shares["remote"] + 4 * waits.shares["miss"]
    assert waits.mean_ms == pytest.approx(1000 * (10 + mean))


def test_more_memory_is_more_hits_in_memory() -> None:
    times = dict.fromkeys(("memory", "disk", "remote", "miss"), 0.0)
    shares = [simulate(replace(SMALL, memory=room), times).shares["memory"] for room in (5, 20, 80)]
    assert shares == sorted(shares)


def test_the_command_prints_prediction_and_measurement() -> None:
    done = CliRunner().invoke(
        app, ["bench", "scale", "--queries", "20", "--entries", "20", "--json"]
    )
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert len(printed["plans"]) == 18
    assert printed["tiers"]["predicted"].keys() == printed["tiers"]["measured"].keys()
