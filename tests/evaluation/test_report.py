"""A page of what was measured holds every number and answer, and nothing from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sac_rag.benchmarks.side_by_side import SpeedRow, write_files
from sac_rag.benchmarks.timing import Times
from sac_rag.evaluation.report import read_measured, write_report
from sac_rag.evaluation.scores import paired_interval

GOLDS = {0: "Yersinia pestis", 1: "in 1912", 2: "<b>nobody</b>"}
# Predictions and F1 of each system.
PREDICTIONS: dict[tuple[str, int | None], dict[int, tuple[str, float]]] = {
    ("full-text", 1): {0: ("a plague", 0.0), 1: ("1912", 0.67), 2: ("somebody", 0.0)},
    ("compressed", 1): {0: ("Yersinia pestis", 1.0), 1: ("1912", 0.67), 2: ("nobody", 1.0)},
    ("compressed", 5): {0: ("Yersinia", 0.67), 1: ("1912", 0.67), 2: ("", 0.0)},
}


def row(number: int, prediction: str, f1: float) -> dict[str, Any]:
    return {
        "number": number,
        "id": str(number),
        "question": f"Question {number}?",
        "golds": [GOLDS[number]],
        "prediction": prediction,
        "em": float(f1 == 1),
        "f1": f1,
        "contains": float(f1 == 1),
        "ended": True,
        "positions": 100 + number,
        "kv_bytes": (100 + number) * 2**19,
        "first_token_s": 0.5,
        "seconds": 1.0,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for (system, ratio), answers in PREDICTIONS.items():
        settings = {
            "format": 1,
            "system": system,
            "ratio": ratio,
            "budget": "shared" if system == "compressed" else None,
            "k": 1,
            "seed": 0,
            "n": 3,
            "dtype": "float32",
            "prompt": {"user": "{chunks}{question}"},
            "labels": {
                "commit": "0" * 40,
                "date": "2026-11-27",
                "model": "a-model",
                "data": {"dev.json": "f" * 64},
            },
        }
        # An interrupted run leaves questions in the order of their lengths.
        lines = [settings, *(row(n, *answer) for n, answer in reversed(answers.items()))]
        path = tmp_path / f"{system}-{ratio}x-k1.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


class Page(HTMLParser):
    """Rows of tables and items of lists, tags, and addresses that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.classes |= {v for n, v in attrs if n == "class"}
        self.fetched += [v for n, v in attrs if n in ("src", "href") and not v.startswith("#")]
        if tag in ("tr", "summary", "dt"):
            self.rows.append([])
        if tag in ("td", "th", "summary", "small", "dt", "dd") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def text_of(folder: Path) -> str:
    return write_report(folder, folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def page(folder: Path) -> Page:
    path = write_report(folder, folder / "report.html", title="Which & why")
    return Page(path.read_text(encoding="utf-8"))


def test_each_system_has_its_scores_and_what_it_loses(page: Page) -> None:
    by_name = {row[0].strip(): " ".join(" ".join(row).split()) for row in page.rows if len(row) > 4}
    assert "0.890" in by_name["anchors, every token"]
    assert "0.447" in by_name["anchors, 5x"]
    low, high = paired_interval([1.0, 0.67, 1.0], [0.67, 0.67, 0.0])
    assert f"+0.443 ({low:+.3f} to {high:+.3f})" in by_name["anchors, 5x"]
    assert "101" in by_name["text"], "mean number of KV entries"
    assert "50.5" in by_name["text"], "their MiB"
    assert "0.50 s" in by_name["text"]


def test_answers_stand_beside_the_gold_ones_as_text(page: Page) -> None:
    rows = [[cell.strip() for cell in row] for row in page.rows]
    first = rows.index(["Question 0?", "Yersinia pestis"])
    assert rows[first + 1 : first + 4] == [
        ["text", "✗ a plague"],
        ["anchors, every token", "✓ Yersinia pestis"],
        ["anchors, 5x", "✗ Yersinia"],
    ]
    last = rows.index(["Question 2?", "<b>nobody</b>"])
    assert rows[last + 3][:2] == ["anchors, 5x", "✗ (empty)"]


def test_the_page_fetches_nothing_and_runs_nothing(page: Page) -> None:
    assert page.fetched == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 3


def test_the_page_says_where_its_figures_come_from(page: Page) -> None:
    rows = {row[0].strip(): row[1].strip() for row in page.rows if len(row) == 2}
    assert rows["commit"] == "0" * 40
    assert rows["date"] == "2026-11-27"
    assert rows["data"] == f"dev.json {'f' * 64}"
    assert (rows["seed"], rows["n"], rows["dtype"]) == ("0", "3", "float32")


def test_what_cannot_be_compared_is_said(folder: Path) -> None:
    assert "warning" not in Page(text_of(folder)).classes
    path = folder / "compressed-5x-k1.jsonl"
    first, *lines = path.read_text().splitlines()
    other = json.dumps({**json.loads(first), "seed": 1})
    path.write_text("\n".join([other, *lines[:2]]) + "\n")
    text = text_of(folder)
    assert "not all were measured with the same seed: 0, 1" in text
    assert "anchors, 5x, k=1: 2 of 3 questions answered" in text


def test_equal_answers_give_an_equal_page(folder: Path) -> None:
    first = write_report(folder, folder / "a.html").read_bytes()
    assert write_report(folder, folder / "b.html").read_bytes() == first
    assert not re.search(rb"/tmp|/home", first)


def test_answers_without_times_are_reported_without_them(folder: Path) -> None:
    for path in folder.glob("*.jsonl"):
        first, *lines = path.read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for one in rows:
            del one["positions"], one["kv_bytes"], one["first_token_s"]
        path.write_text("\n".join([first, *map(json.dumps, rows)]) + "\n")
    text = write_report(folder, folder / "report.html").read_text(encoding="utf-8")
    assert Page(text).tags.count("svg") == 1


def test_times_of_all_ways_are_on_the_page_with_their_plot(folder: Path) -> None:
    common = {
        **{"k": 8, "dtype": "float32", "device": "cpu", "threads": 2, "source_tokens": 4080},
        **{"compress_s": 0.0, "store": None, "ratio": None, "budget": None, "kv_bytes": 0},
    }
    anchors = {"ratio": 5, "budget": "shared", "store": "disk", "kv_bytes": 3 * 2**20}
    times = Times((0.5, 0.25, 1.0)), Times((2.0, 3.0, 1.5))
    rows = [
        SpeedRow(**{**common, **way}, answer_tokens=tokens, first_token=times[0], answer=times[1])
        for way in ({"system": "sac", **anchors}, {"system": "HF, text"})
        for tokens in (1, 32)
    ]
    missing = {"first_token": None, "answer": None, "skipped": "not installed"}
    rows.append(SpeedRow(**common, system="llama.cpp, text", answer_tokens=32, **missing))
    write_files(rows, folder)
    page = Page(text_of(folder))
    rows_of_page = [[cell.strip() for cell in row] for row in page.rows]
    by_name = {row[0]: row[1:4] for row in rows_of_page if len(row) >= 4}
    seconds = ["0.50 s (0.25 to 1.00)", "2.00 s (1.50 to 3.00)"]
    assert by_name["sac, 5x, disk"] == ["3.0", *seconds]
    assert by_name["HF, text"] == ["", *seconds]
    assert by_name["llama.cpp, text"] == ["", "not installed", ""]
    assert ["8 chunks"] in rows_of_page
    (image,) = page.fetched
    assert image.startswith("data:image/png;base64,")


def test_a_speed_file_of_something_else_is_refused(folder: Path) -> None:
    for text in ("[]", "{}", '[{"k": 1}]', "x"):
        (folder / "speed.json").write_text(text)
        with pytest.raises(ValueError, match=r"speed.json must be what `sac-rag bench speed"):
            text_of(folder)


def test_a_folder_without_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold answers"):
        write_report(tmp_path, tmp_path / "report.html")
    (tmp_path / "other.jsonl").write_text('{"text": "no answers"}\n')
    with pytest.raises(ValueError, match=r"other.jsonl must hold the answers of an evaluation"):
        read_measured(tmp_path)
