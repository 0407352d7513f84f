"""The README's code runs, its tree is the tree, its help is the help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\s*```\w*\n(.*?)```\s*<!-- /{name} -->", README, re.DOTALL)
    assert found, f"the README has no block named {name}"
    return found[1]


def test_the_tree_in_the_readme_has_every_folder_of_code() -> None:
    listed: set[str] = set()
    folders: list[str] = []
    for line in block("tree").splitlines():
        entry = re.match(r"( *)([\w./]+/)(  +\S.*)?$", line)
        assert entry, f"unreadable line in the tree: {line!r}"
        folders[len(entry[1]) // 2 :] = [entry[2]]
        listed.add("".join(folders))
    on_disk = {
        f"{path.parent.relative_to(ROOT).as_posix()}/"
        for folder in ("sac_rag", "integrations")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert on_disk - listed == set()
    assert [path for path in listed if not (ROOT / path).is_dir()] == []


def test_every_top_level_folder_of_code_is_in_the_tree() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.ipynb"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout: an unpacked sdist has no list of its files")
    for folder in {path.split("/")[0] for path in tracked}:
        assert f"\n{folder}/" in "\n" + block("tree")


def test_the_help_in_the_readme_is_the_help() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "sac_rag.cli", "--help"],
        env={**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert block("help").split() == printed.replace("python -m sac_rag.cli", "sac-rag").split()


def test_the_tables_of_quality_are_those_of_the_shipped_figures() -> None:
    from sac_rag.compressors.checkpoint import WEIGHTS
    from sac_rag.evaluation.comparison import FIGURES, to_markdown
    from sac_rag.evaluation.quality import QualityResult

    rows = json.loads((WEIGHTS / "smollm2-135m" / FIGURES).read_text(encoding="utf-8"))
    table = to_markdown([QualityResult(**row) for row in rows])
    card = (WEIGHTS / "smollm2-135m" / "README.md").read_text(encoding="utf-8")
    guide = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    for page in (guide, card):
        assert f"<!-- quality -->\n{table}<!-- /quality -->" in page


def test_the_readme_shows_the_f1_of_the_shipped_figures() -> None:
    from sac_rag.compressors.checkpoint import WEIGHTS
    from sac_rag.evaluation.comparison import FIGURES

    figures = json.loads((WEIGHTS / "smollm2-135m" / FIGURES).read_text(encoding="utf-8"))
    f1 = {
        (row["system"], row["budget"] == "uniform" and row["ratio"] > 1, row["ratio"], row["k"]): (
            f"{row['f1']:.3f}"
        )
        for row in figures
    }
    shown = re.findall(r"^\| (.*?) \| (0\.\d+) \| (0\.\d+) \|$", README, re.M)
    assert len(shown) == 4
    for what, *values in shown:
        system = "full-text" if what == "text" else "compressed"
        found = re.search(r"(\d+)x", what)
        ratio = int(found[1]) if found else 1
        for k, value in zip((1, 4), values, strict=True):
            assert value == f1[system, False, ratio, k], (what, k)


def test_the_table_of_the_fitted_compressor_is_that_of_its_figures() -> None:
    from sac_rag.compressors.checkpoint import FITTED, WEIGHTS

    figures = json.loads((WEIGHTS / FITTED / "smollm2-135m/figures.json").read_text())["figures"]
    page = (ROOT / "docs/fitting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (plain|chat) \| (\w+) \|.*\| ([\d.]+) \| ([\d.]*) ?\|$", page, re.M)
    expected = {(f["prompt"], f["ratio"], f["budget"]): f["accuracy"] for f in figures}
    shown = {}
    for prompt, kept, shared, equal in rows:
        ratio = 1 if kept == "all" else int(kept.rstrip("x"))
        shown[prompt, ratio, "shared"] = float(shared)
        if equal:
            shown[prompt, ratio, "uniform"] = float(equal)
    assert shown.keys() == expected.keys()
    assert all(shown[key] == round(expected[key], 3) for key in shown)


def test_the_table_of_peers_is_that_of_its_figures() -> None:
    from sac_rag.evaluation.comparison import to_markdown
    from sac_rag.evaluation.quality import QualityResult

    table = to_markdown([QualityResult(**row) for row in rows_of("docs/peers.json")])
    page = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    assert f"<!-- peers -->\n{table}<!-- /peers -->" in page


def test_the_tables_of_choices_in_the_guide_are_those_of_their_figures() -> None:
    from sac_rag.training.ablation import CHOICES, Outcome, to_markdown

    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    compared = set()
    for run in json.loads((ROOT / "docs/choices.json").read_text()):
        outcomes = [Outcome(**row) for row in run]
        compared |= {outcome.choice for outcome in outcomes}
        assert f"<!-- choices -->\n{to_markdown(outcomes)}<!-- /choices -->" in page
    assert compared == CHOICES.keys()


def rows_of(path: str) -> list[dict[str, Any]]:
    """Rows of a committed file of figures."""
    kept = json.loads((ROOT / path).read_text(encoding="utf-8"))
    if isinstance(kept, dict):
        return [{**kept, **row} for row in kept["figures"]]
    return [row for part in kept for row in (part if isinstance(part, list) else [part])]


def test_all_committed_figures_say_where_they_come_from() -> None:
    paths = [*ROOT.glob("sac_rag/weights/**/figures.json"), *ROOT.glob("docs/*.json")]
    assert len(paths) >= 4
    commits = set()
    for path in paths:
        for row in rows_of(path.relative_to(ROOT).as_posix()):
            source = row["provenance"]
            assert re.fullmatch("[0-9a-f]{40}", source["commit"]), path
            assert date.fromisoformat(source["date"])
            assert source["model"] and source["data"]
            is_sampled = "ttft_s" not in row  # times are of the whole text, without a draw
            assert not is_sampled or "seed" in row or "seed" in source, path
            commits.add(source["commit"])
    known = ["git", "cat-file", "--batch-check=%(objecttype)"]
    asked = "".join(f"{commit}\n" for commit in sorted(commits))
    done = subprocess.run(known, cwd=ROOT, input=asked, capture_output=True, text=True, check=False)
    is_whole = (ROOT / ".git").exists() and not (ROOT / ".git/shallow").exists()
    assert not is_whole or done.stdout.split() == ["commit"] * len(commits)


def test_the_table_of_budgets_of_a_question_is_that_of_its_figures() -> None:
    page = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- adaptive -->\n(.*)\n<!-- /adaptive -->", page, re.DOTALL)
    assert table
    lines = []
    for row in rows_of("docs/adaptive.json"):
        low, high = row["less_than_equal_interval"]
        gain = f"{row['less_than_equal']:+.2f} ({low:+.2f} to {high:+.2f}) "
        lines.append(
            f"| {row['split']} | {row['ratio']}x | {row['loss']:.2f} | {row['accuracy']:.3f} | "
            f"{'' if row['split'] == 'equal split' else gain}|"
        )
    assert table[1].splitlines()[2:] == lines


def test_the_times_in_the_documentation_are_those_of_their_figures() -> None:
    rows = rows_of("docs/speed.json")
    page = (ROOT / "docs/costs.md").read_text(encoding="utf-8")
    for row in rows[:-2]:
        kept = "full" if row["ratio"] == 1 else f"{row['ratio']}x"
        first, text = row["ttft_s"], row["full_text_s"]
        assert (
            f"| {row['k']} | {kept} | {row['kv_entries']:,} | {row['kv_mib']:.1f} MiB | "
            f"{first:.2f} s | {text:.2f} s | " in page
        )
    shared, equal = rows[-2:]
    assert f"{shared['ttft_s']} s against\n{equal['ttft_s']} s from disk" in page
    first, text = shared["ttft_s"], shared["full_text_s"]
    start = " ".join(README.split())
    assert f"after {first} s at 5x from disk, against {text} s for reading the text" in start
    whole = 2 * 32 * 8 * 128 * 2 * 510  # keys and values, layers, heads, head_dim, bytes, tokens
    of_8b = f"takes {whole / 2**20:.1f} MiB whole and {whole / 5 / 2**20:.1f} MiB at 5x"
    assert of_8b in start


@pytest.mark.real_model
@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/serving.md"])
def test_the_python_in_the_documentation_runs(tmp_path: Path, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for code in blocks:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "hit" in done.stdout or "ChunkReport" in done.stdout
