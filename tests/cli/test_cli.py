"""The command line as its users call it: separate processes, real models, files on disk."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.models import PROSE, make_compressor, make_model, make_tokenizer
from typer.testing import CliRunner

from sac_rag.cli import app, progress
from sac_rag.collection import Collection
from sac_rag.compressors import checkpoint
from sac_rag.prompts.format import SPANS, PromptFormat
from sac_rag.reports import PrecompressReport
from sac_rag.stores import DiskStore
from sac_rag.training.ablation import CHOICES

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
    assert done.returncode == 3, done.stderr  # one record is bad, and the exit code says so
    assert "more.jsonl:2" in done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.real_model
def test_precompress_reads_folders_and_jsonl_and_reports_the_bad_record(library: Any) -> None:
    _, summary = library
    assert summary["chunks"] == summary["computed"] == summary["indexed"] == 2
    assert summary["source_tokens"] > 20
    # The shipped compressor keeps one entry in five, rounded for each chunk.
    rounding = 2.5 * summary["chunks"]
    assert summary["anchors"] * 5 == pytest.approx(summary["source_tokens"], abs=rounding)
    assert summary["estimate"]["source_tokens"] == summary["source_tokens"]
    assert summary["documents"] == 2
    ((place, problem),) = (record.values() for record in summary["bad"])
    assert place.endswith("more.jsonl:2") and "JSON" in problem


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
    stats = sac_rag("store", "stats", store, "--json")
    assert json.loads(stats.stdout)["hits"] >= 4  # two chunks of each question


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


def precompressed(tiny: Path, *more: str, code: int = 0) -> dict[str, Any]:
    """What `sac-rag precompress` of a tiny model prints, in this process."""
    arguments = ("precompress", *more, "--model", str(tiny / "model"), "--compressor", "full")
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == code, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


@pytest.mark.real_model  # the embedder
def test_a_changed_document_is_compressed_anew_and_found_no_more_as_it_was(
    tiny_files: Path, tmp_path: Path
) -> None:
    town, store = tmp_path / "docs" / "town.md", tmp_path / "store"
    town.parent.mkdir()
    town.write_text(TOWN)
    (town.parent / "owls.txt").write_text("Owls hear mice.")
    assert precompressed(tiny_files, str(town.parent), "--store", str(store))["computed"] == 2
    town.write_text("The town is gone.")
    summary = precompressed(tiny_files, str(town.parent), "--store", str(store))
    assert (summary["computed"], summary["hits"], summary["deleted"]) == (1, 1, 1)
    found = Collection(store).search("Which town?", k=9)
    assert {hit.chunk.text for hit in found} == {"The town is gone.", "Owls hear mice."}


@pytest.mark.real_model
def test_exports_are_cached_as_they_are_and_a_chunk_too_long_is_reported(
    tiny_files: Path, tmp_path: Path
) -> None:
    records = [{"page_content": text, "metadata": {"source": "a"}} for text in PROSE]
    records.append({"page_content": "lighthouse " * 4200, "metadata": {"source": "long"}})
    export, store = tmp_path / "export.json", tmp_path / "store"
    export.write_text(json.dumps(records))
    more = (str(export), "--store", str(store), "--as-is", "--no-index")
    planned = precompressed(tiny_files, *more, "--dry-run")
    assert not store.exists()
    assert planned["estimate"]["chunks"] == 9
    assert (planned["estimate"]["bad"], planned["bad"]) == (1, [])
    summary = precompressed(tiny_files, *more, code=3)
    assert (summary["chunks"], summary["computed"], summary["indexed"]) == (9, 8, None)
    assert summary["source_tokens"] == planned["estimate"]["source_tokens"]
    assert summary["bytes"] == pytest.approx(planned["estimate"]["nbytes"], rel=0.1)
    assert [record["place"] for record in summary["bad"]] == ["long"]
    again = precompressed(tiny_files, *more, "--dry-run")
    assert (again["estimate"]["hits"], again["estimate"]["source_tokens"]) == (8, 0)
    with DiskStore(store) as opened:  # of the folder that was given
        assert len(opened) == 8


@pytest.mark.real_model
def test_int8_is_stored_as_asked_for_and_by_everything_that_opens_the_collection(
    tiny_files: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(PROSE))
    sizes = {}
    for name in ("float32", "int8"):
        store = tmp_path / name
        more = (str(text), "--store", str(store), "--stored-dtype", name)
        sizes[name] = precompressed(tiny_files, *more)["bytes"]
        assert precompressed(tiny_files, *more)["computed"] == 0
        assert Collection(store).rag.compressor.config.stored_dtype == name
    assert sizes["int8"] < 0.4 * sizes["float32"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_for_who_looks_on_and_lines_for_who_reads_later(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=terminal, width=100, highlight=False)
    monkeypatch.setattr(progress, "notes", console)
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with progress.compress_progress(400, show=True) as advance:
        for _ in range(2):
            advance(PrecompressReport(computed=1, source_tokens=100, nbytes=2**20))
    said = printed.getvalue()
    assert (
        re.search(r"compressing: 2 chunks, [\d,]+ tokens/s, 2.0 MiB, \d s left\n", said) or terminal
    )
    assert ("━" in said and "2 chunks" in said) == terminal
    with progress.compress_progress(None, show=False) as advance:
        advance(PrecompressReport(computed=1))
    assert printed.getvalue() == said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("ask", "Why?", "--store", "nowhere"), "nowhere is no collection yet"),
        (("models", "pull", "gpt-7"), "gpt-7"),
        (("models", "verify", "gpt-7"), "gpt-7"),
        (("evaluate", "--data", "nowhere.json"), "a file that exists, was: 'nowhere.json'"),
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


# --- evaluate, on a tiny model

OWN_FORMAT = PromptFormat(
    chat=False, chunk="{chunk}", user="{chunks} {question} ", prefix="Say: ", stop=("\n",)
)


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory: pytest.TempPathFactory, make_generator: Any) -> Path:
    """A model, two compressors for it and questions of two articles, on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, method, format in (("sac", "sac", None), ("formatted", "learned", OWN_FORMAT)):
        compressor = make_compressor(make_generator("llama"), method)
        checkpoint.save(compressor, folder / name, prompt_format=format)
    (folder / "data.json").write_text(
        json.dumps(
            {
                "data": [
                    {
                        "title": title,
                        "paragraphs": [
                            {
                                "context": text,
                                "qas": [
                                    {
                                        "id": f"{title}{n}.{word}",
                                        "question": f"What about {word}?",
                                        "answers": [{"text": word}],
                                    }
                                    for word in text.rstrip(".").split()
                                ],
                            }
                            for n, text in enumerate(texts)
                        ],
                    }
                    for title, texts in (("one", PROSE[:4]), ("two", PROSE[4:]))
                ]
            }
        )
    )
    return folder


@pytest.fixture
def tiny(tiny_files: Path, home: Path) -> Path:
    """The same, with a cache folder of the test's own."""
    return tiny_files


def evaluate_arguments(tiny: Path, *more: str) -> tuple[str, ...]:
    return (
        *("evaluate", "--data", str(tiny / "data.json"), "--model", str(tiny / "model")),
        *("--dtype", "float32", "--max-new-tokens", "4", "--json", *more),
    )


def evaluated(tiny: Path, *more: str, code: int = 0) -> dict[str, Any]:
    """What `sac-rag evaluate` prints, in this process: loading torch takes seconds."""
    done = CliRunner().invoke(app, evaluate_arguments(tiny, *more), catch_exceptions=False)
    assert done.exit_code == code, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


@pytest.mark.slow
def test_evaluate_prints_one_object_and_nothing_else(tiny: Path) -> None:
    more = ("--compressor", str(tiny / "sac"), "--ratio", "5", "--k", "3", "--limit", "4")
    done = sac_rag(*evaluate_arguments(tiny, *more))
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert {name: printed[name] for name in ("system", "ratio", "k", "n", "seed", "skipped")} == {
        "system": "compressed", "ratio": 5, "k": 3, "n": 4, "seed": 0, "skipped": [],
    }  # fmt: skip
    for score in ("em", "f1", "contains"):
        assert 0 <= printed[score] <= 1
    low, high = printed["f1_interval"]
    assert low <= printed["f1"] <= high


@pytest.mark.parametrize(
    ("arguments", "ratio"),
    [
        (("--system", "compressed", "--ratio", "1", "--compressor", "sac"), 1),
        (("--system", "compressed", "--compressor", "sac"), 3),
        (("--system", "compressed"), 1),
        (("--system", "truncated", "--compressor", "sac"), 3),
        (("--system", "truncated", "--ratio", "5"), 5),
        # So that one line of a script does for all systems.
        (("--system", "full-text", "--ratio", "5"), 1),
        (("--system", "closed-book", "--ratio", "5"), None),
    ],
)
def test_evaluate_takes_every_system(
    tiny: Path, arguments: tuple[str, ...], ratio: int | None
) -> None:
    given = [str(tiny / a) if a == "sac" else a for a in arguments]
    out = tiny / "-".join(arguments)
    printed = evaluated(tiny, "--limit", "2", "--k", "2", "--out", str(out), *given)
    assert (printed["system"], printed["ratio"], printed["n"]) == (arguments[1], ratio, 2)
    settings, *answers = map(json.loads, out.read_text().splitlines())
    assert PromptFormat(**settings["prompt"]) == SPANS
    assert len(answers) == 2
    assert settings["labels"] == printed["provenance"]
    assert settings["labels"]["model"] == "model", "its name, not the place of its folder"
    assert list(settings["labels"]["data"]) == ["data.json"]


def test_evaluate_writes_answers_with_packed_weights(tiny: Path) -> None:
    out = tiny / "packed.jsonl"
    printed = evaluated(tiny, "--limit", "2", "--out", str(out), "--weights", "int8")
    assert printed["weights"] == "int8"
    assert json.loads(out.read_text().splitlines()[0])["weights"] == "int8"
    done = CliRunner().invoke(app, evaluate_arguments(tiny, "--limit", "2", "--out", str(out)))
    assert done.exit_code == 1
    assert "'weights': ('int8', None)" in str(done.exception)


def test_evaluate_shows_every_system_the_prompt_of_the_compressor(tiny: Path) -> None:
    common = ("--limit", "1", "--compressor", str(tiny / "formatted"))
    prompts = {
        evaluated(tiny, *common, "--system", system)["prompt"]
        for system in ("compressed", "truncated", "full-text", "closed-book")
    }
    assert len(prompts) == 1
    (tiny / "own.json").write_text(OWN_FORMAT.to_json())
    without_weights = (
        "--system",
        "closed-book",
        "--limit",
        "1",
        "--prompt",
        str(tiny / "own.json"),
    )
    assert {evaluated(tiny, *without_weights)["prompt"]} == prompts
    assert evaluated(tiny, *without_weights[:4])["prompt"] not in prompts


def test_evaluate_reports_bad_records_and_scores_the_rest(tiny: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text('{"context": "Owls.", "qas": 5}\n')
    arguments = ("--system", "closed-book", "--limit", "3", "--data", str(more))
    printed = evaluated(tiny, *arguments, code=1)
    assert printed["n"] == 3
    assert printed["skipped"] == [f'{more.as_posix()}:1: "qas" must be a list, was: 5']


@pytest.mark.real_model
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send to a process")
def test_ctrl_c_is_a_sentence_and_not_a_traceback(tiny_files: Path, tmp_path: Path) -> None:
    arguments = ("precompress", "-", "--no-index", "--store", str(tmp_path / "library"))
    arguments = (*arguments, "--model", str(tiny_files / "model"), "--compressor", "full")
    with subprocess.Popen(
        [sys.executable, "-m", "sac_rag.cli", *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        told = iter(running.stderr.readline, "")
        assert any("Standard input" in line for line in told)  # from now on it waits for text
        running.send_signal(signal.SIGINT)
        complaint = running.stderr.read()
    assert running.returncode == 130
    assert "interrupted; what was finished is kept" in complaint
    assert "Traceback" not in complaint


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send to a process")
def test_evaluate_goes_on_after_ctrl_c(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    # Long answers, so that it is not done before the signal is sent.
    more = ("--system", "full-text", "--batch-size", "1", "--max-new-tokens", "32")
    more = (*more, "--out", str(out))
    command = [sys.executable, "-m", "sac_rag.cli", *evaluate_arguments(tiny, *more)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 120
        while not out.exists() or out.read_bytes().count(b"\n") < 3:
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        printed, complaint = running.communicate(timeout=60)
    assert (running.returncode, printed) == (130, "")
    assert "run it again to resume" in complaint.replace("\n", " ")
    assert "what was finished" not in complaint  # its own words are enough
    assert "Traceback" not in complaint
    kept = out.read_bytes()
    total = sum(len(text.split()) for text in PROSE)
    assert 2 <= kept.count(b"\n") - 1 < total
    resumed = evaluated(tiny, *more)
    assert out.read_bytes().startswith(kept)
    again = evaluated(tiny, *more[:2], *more[4:6])
    times = {"seconds": 0, "first_token_s": 0}
    assert [{**r, **times, "n": total} for r in (resumed, again)] == [{**again, **times}] * 2


def test_bench_quality_prints_a_table_and_keeps_the_figures(tiny: Path, tmp_path: Path) -> None:
    command = [
        *("bench", "quality", "--data", str(tiny / "data.json"), "--model", str(tiny / "model")),
        *("--compressor", str(tiny / "formatted"), "--out", str(tmp_path / "quality")),
        *("--dtype", "float32", "--limit", "3", "--k", "1", "--ratio", "1", "--ratio", "4"),
    ]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0, shown.stderr
    assert [line.split(" | ")[0] for line in shown.stdout.splitlines()[2:] if line] == [
        "| text",
        "| text cut to 1 in 5",
        "| nothing (closed-book)",
        "| anchors, every token",
        "| anchors, 4x",
    ]
    printed = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    kept = json.loads((tmp_path / "quality" / "figures.json").read_text())
    assert printed["rows"] == kept
    assert {row["prompt"] for row in kept} == {printed["rows"][0]["prompt"]}


def test_evaluate_by_rank_needs_passages_that_are_ranked(tiny: Path) -> None:
    arguments = ["evaluate", "--data", str(tiny / "data.json"), "--model", str(tiny / "model")]
    shown = CliRunner().invoke(app, [*arguments, "--by-rank"])
    assert "--by-rank needs --retrieve" in str(shown.exception)


def test_bench_perplexity_continues_text_with_every_system(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("\n\n".join(" ".join(PROSE[i:] + PROSE[:i]) for i in range(3)))
    command = [
        *("bench", "perplexity", "--text", str(text), "--model", str(tiny / "model")),
        *("--compressor", str(tiny / "formatted"), "--out", str(tmp_path / "perplexity")),
        *("--dtype", "float32", "--limit", "2", "--ratio", "4", "--text-tokens", "32"),
    ]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0, shown.stderr
    assert [line.split(" | ")[0] for line in shown.stdout.splitlines()[2:] if line] == [
        "| anchors, 4x",
        "| text",
        "| the last tokens, 1 in 4",
        "| nothing (closed-book)",
    ]
    rows = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["rows"]
    assert {row["provenance"]["seed"] for row in rows} == {0}
    assert {row["n"] for row in rows} == {2}


def test_bench_peers_answers_beside_sac_and_lists_what_cannot_run(
    tiny: Path, tmp_path: Path
) -> None:
    listed = CliRunner().invoke(app, ["bench", "peers", "--list", "--json"])
    rows = {row["name"]: row for row in json.loads(listed.stdout)["peers"]}
    assert "CUDA" in rows["lmcache"]["reason"]
    assert not rows["bm25-sentences"]["reason"]
    assert "bm25-sentences" in CliRunner().invoke(app, ["bench", "peers", "--list"]).stdout
    command = [
        *("bench", "peers", "--data", str(tiny / "data.json"), "--model", str(tiny / "model")),
        *("--compressor", str(tiny / "formatted"), "--out", str(tmp_path / "answers")),
        *("--dtype", "float32", "--limit", "3", "--ratio", "4", "--max-new-tokens", "3"),
        *("--peer", "bm25-sentences", "--peer", "random-anchors", "--peer", "lmcache"),
    ]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0, shown.stderr
    assert "skipped lmcache: needs CUDA" in shown.stderr
    assert [line.split(" | ")[0] for line in shown.stdout.splitlines()[2:] if line] == [
        "| bm25-sentences, 4x",
        "| random-anchors, 4x",
    ]
    printed = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert [row["name"] for row in printed["skipped"]] == ["lmcache"]
    page = CliRunner().invoke(app, ["report", str(tmp_path / "answers")], catch_exceptions=False)
    assert "BM25 sentences, 4x" in Path(page.stdout.strip()).read_text(encoding="utf-8")
    refused = CliRunner().invoke(app, ["bench", "peers"])
    assert "--data" in str(refused.exception)


def test_bench_anchors_compares_what_others_would_have_kept(tiny: Path) -> None:
    command = [
        *("bench", "anchors", "--data", str(tiny / "data.json"), "--model", str(tiny / "model")),
        *("--compressor", str(tiny / "formatted"), "--limit", "2", "--ratio", "4"),
    ]
    printed = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    names = {"scorer", "read again", "uniform", "these questions"}
    assert {row["anchors"] for row in printed["rows"]} == names
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0, shown.stderr
    assert all(name in shown.stdout for name in names)
    with pytest.raises(ValueError, match="'full' keeps every token: there is no choice"):
        CliRunner().invoke(app, [*command, "--compressor", "full"], catch_exceptions=False)


@pytest.mark.slow
def test_bench_steps_times_a_step_beside_the_model(tiny: Path, tmp_path: Path) -> None:
    shared = {"model": str(tiny / "model"), "held_out_share": 0.25, "batch_tokens": 100}
    (tmp_path / "run.json").write_text(json.dumps(shared))
    command = [
        *("bench", "steps", "--data", str(tiny / "data.json"), "--batches", "2"),
        *("--config", str(tmp_path / "run.json"), "--repeats", "1"),
    ]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    names = ["model, forward", "model, forward and backward", "step"]
    assert [row["what"] for row in rows] == names
    assert len({row["tokens"] for row in rows}) == 1
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert [name for name in names if name in shown.stdout] == names


@pytest.mark.slow
def test_bench_choices_trains_each_of_them_and_prints_what_is_done(
    tiny: Path, tmp_path: Path
) -> None:
    shared = {
        "model": str(tiny / "model"),
        "dtype": "float32",
        "held_out_share": 0.25,
        "batch_tokens": 300,
        "scorer_texts": 2,
        "eval_examples": 1,
        "eval_answers": 0,
    }
    (tmp_path / "shared.json").write_text(json.dumps(shared))
    (tmp_path / "prose.txt").write_text(" ".join(PROSE))
    command = [
        *("bench", "choices", "--data", str(tiny / "data.json"), "--seeds", "1"),
        *("--config", str(tmp_path / "shared.json"), "--text", str(tmp_path / "prose.txt")),
        *("--minutes", "0.00001", "--out", str(tmp_path / "runs")),
    ]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["choice"] for row in rows] == list(CHOICES)
    assert {(row["steps"], row["ratio"], row["seed"]) for row in rows} == {(1, 5, 0)}
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0, shown.stderr
    best = min(rows, key=lambda row: row["loss"])
    assert shown.stdout.splitlines()[2].split(" | ")[:2] == [f"| {best['choice']}", "1"]
    assert shown.stdout.count("\n| ") == 1 + len(CHOICES)


def test_evaluate_says_what_is_wrong_in_a_sentence(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("just some prose\n")
    (tmp_path / "empty.jsonl").write_text("")
    for more, complaint in (
        (("--data", str(tmp_path / "none.json")), "none.json"),
        (("--data", str(tmp_path / "prose.txt")), "prose.txt must be SQuAD JSON"),
        (("--data", str(tmp_path / "empty.jsonl")), "empty.jsonl must hold question data"),
        (("--compressor", str(tmp_path / "nowhere")), "a compressor must be 'full', 'shipped' or"),
        (("--ratio", "5"), "'full' keeps every token"),
    ):
        # What `main` prints of it: see test_mistakes_are_a_sentence_and_not_a_traceback.
        with pytest.raises((ValueError, OSError), match=complaint):
            CliRunner().invoke(app, evaluate_arguments(tiny, *more), catch_exceptions=False)
    for more in (("--system", "half"), ("--k", "0"), ("--limit", "0"), ("--seed", "-1")):
        done = CliRunner().invoke(app, evaluate_arguments(tiny, *more))
        assert (done.exit_code, done.stdout) == (2, "")
        assert more[0] in done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, sac_rag.cli; from typer.testing import CliRunner; "
        "print(CliRunner().invoke(sac_rag.cli.app, ['--help']).exit_code, "
        "sorted({'torch', 'transformers', 'faiss', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "[]"]
