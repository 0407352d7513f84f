"""The command line as its users call it: separate processes, real models, files on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOWN = """# Port Ellery

The harbour of Port Ellery was dredged in 1931 by the engineer Mabel Strand.

Its lighthouse is painted in red and white bands and stands 41 metres tall.
"""


def sac_rag(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sac_rag.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("library")
    (folder / "docs").mkdir()
    (folder / "docs" / "town.md").write_text(TOWN)
    records = [
        '{"id": "f1", "title": "Festival", "text": "The herring festival is in August."}',
        "{",
    ]
    (folder / "more.jsonl").write_text("\n".join(records))
    done = sac_rag(
        "precompress", str(folder / "docs"), str(folder / "more.jsonl"),
        "--store", str(folder / "store"), "--json",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # one record is bad, and the exit code says so
    assert "more.jsonl:2" in done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.real_model
def test_precompress_reads_folders_and_jsonl_and_reports_the_bad_record(library: Any) -> None:
    _, summary = library
    assert summary["chunks"] == summary["computed"] == summary["indexed"] == 2
    assert summary["anchors"] == summary["source_tokens"] > 20
    assert len(summary["skipped"]) == 1


@pytest.mark.real_model
def test_ask_answers_from_cached_chunks_with_sources(library: Any) -> None:
    folder, _ = library
    store = str(folder / "store")
    asked = sac_rag("ask", "How tall is the lighthouse?", "--store", store, "--k", "2", "--json")
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert "41" in answer["answer"]
    assert answer["sources"][0]["title"] == "Port Ellery"
    assert {source["status"] for source in answer["sources"]} == {"hit"}
    assert answer["usage"]["anchors_computed"] == 0
    printed = sac_rag("ask", "How tall is the lighthouse?", "--store", store, "--k", "2")
    assert answer["answer"] in printed.stdout
    assert "[1] Port Ellery" in printed.stdout


@pytest.mark.real_model
def test_precompress_again_computes_nothing_and_takes_more_from_stdin(library: Any) -> None:
    folder, _ = library
    store = str(folder / "store")
    again = sac_rag("precompress", str(folder / "docs"), "--store", store, "--json")
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert (summary["computed"], summary["hits"], summary["indexed"]) == (0, 1, 0)
    piped = sac_rag("precompress", "-", "--store", store, "--json", stdin="Gulls nest on the roof.")
    assert json.loads(piped.stdout)["computed"] == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("ask", "Why?", "--store", "nowhere"), "nowhere is no collection yet"),
        (("models", "pull", "gpt-7"), "gpt-7"),
        (("models", "verify", "gpt-7"), "gpt-7"),
    ],
)
def test_mistakes_are_a_sentence_and_not_a_traceback(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    done = sac_rag(*arguments)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real_model
def test_a_path_that_is_not_there_is_a_sentence_too(tmp_path: Path) -> None:
    done = sac_rag("precompress", str(tmp_path / "no.txt"), "--store", str(tmp_path / "store"))
    assert done.returncode == 1
    assert "no.txt" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real_model
def test_models_list_and_verify_know_what_is_on_disk() -> None:
    listed = json.loads(sac_rag("models", "list", "--json").stdout)["models"]
    assert {model["name"] for model in listed} == {"smollm2-135m", "minilm", "wikipedia-leads"}
    assert all(model["bytes"] > 1_000_000 for model in listed)
    verified = sac_rag("models", "verify")
    assert verified.returncode == 0
    assert verified.stdout.count("is as it was pulled") == 3


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, sac_rag.cli; from typer.testing import CliRunner; "
        "print(CliRunner().invoke(sac_rag.cli.app, ['--help']).exit_code, "
        "sorted({'torch', 'transformers', 'faiss', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "[]"]
