"""sac-rag store: what an operator sees and does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.stores import bytes_in, flip, key_of, make_kv
from typer.testing import CliRunner, Result

from sac_rag.cli import app
from sac_rag.stores import DiskStore

FIRST, SECOND = "01" * 32, "02" * 32
KEY = "6b" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with DiskStore(tmp_path / "store") as store:
        store.note(FIRST, {"config.ratio": "5"})
        for number, fingerprint in enumerate([FIRST, FIRST, SECOND]):
            documents = ["report", f"part {number}"]
            store.put(key_of(number), make_kv(number), documents, fingerprint=fingerprint)
        store.get(key_of(0))
        store.get(key_of(9))
        store.why_absent(key_of(9))
    return tmp_path / "store"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["store", *map(str, arguments)], env={"COLUMNS": "200"})


def as_json(*arguments: str | Path, code: int = 0) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_stats_tell_sizes_hits_reasons_and_fingerprints(folder: Path) -> None:
    before = bytes_in(folder)
    found = as_json("stats", folder)
    assert (found["entries"], found["documents"], found["hits"], found["misses"]) == (3, 4, 1, 1)
    assert found["hit_rate"] == 0.5
    assert found["reasons"] == {"absent": 1}
    assert found["fingerprints"][0]["fields"] == {"config.ratio": "5"}
    assert found["ratio"] == found["fingerprints"][0]["ratio"] == 5
    printed = run("stats", folder).stdout
    for part in ("1 of 2 asked for (50.0%)", "missed, absent", FIRST, "config.ratio = 5", "5.0x"):
        assert part in printed
    assert bytes_in(folder) == before


def test_a_collection_is_taken_for_its_store(folder: Path) -> None:
    (folder.parent / "library").mkdir()
    folder.rename(folder.parent / "library" / "anchors")
    assert as_json("stats", folder.parent / "library")["entries"] == 3
    assert run("forget", folder.parent / "library", "report").exit_code == 0


def test_check_and_verify_say_what_is_wrong_and_check_repairs_it(folder: Path) -> None:
    assert as_json("check", folder) == {"problems": [], "left": []}
    assert as_json("verify", folder)["bad"] == []
    assert "3 entries" in run("verify", folder).stdout
    with DiskStore(folder) as store:
        flip(store, key_of(1))
    (folder / "entries" / "stray").write_bytes(b"?")
    (bad,) = as_json("verify", folder, code=1)["bad"]
    assert bad.startswith(key_of(1))
    assert len(as_json("check", folder, code=1)["left"]) == 2
    assert run("check", folder).exit_code == 1
    repaired = as_json("check", folder, "--fix")
    assert (len(repaired["problems"]), repaired["left"]) == (2, [])
    assert "All is as it was written." in run("check", folder).stdout


def test_gc_deletes_what_the_options_name(folder: Path) -> None:
    assert as_json("gc", folder)["superseded"] == 0
    refused = run("gc", folder, "--keep-fingerprint", "0")
    assert "beginning of one of the store's fingerprints, is of 2" in str(refused.exception)
    assert as_json("gc", folder, "--keep-fingerprint", "01")["superseded"] == 1
    assert "1 expired" not in run("gc", folder, "--max-age-s", "1000").stdout
    assert "2 expired" in run("gc", folder, "--max-age-s", "0.000001").stdout


def test_forget_leaves_no_byte(folder: Path) -> None:
    assert as_json("forget", folder, "part 0")["deleted"] == 0  # its text is the report's too
    assert run("forget", folder, "report", "part 1").stdout == "2 entries deleted\n"
    everything = b"".join(bytes_in(folder).values())
    assert b"report" not in everything
    assert b"part 0" not in everything
    assert b"part 2" in everything


def test_forgetting_a_document_that_nobody_knows_says_so_and_forgets_the_others(
    folder: Path,
) -> None:
    done = run("forget", folder, "d/k.txt", "report", "part 0", "part 1", "part 2")
    assert (done.exit_code, done.stdout) == (1, "3 entries deleted\n")
    assert done.stderr == "no document has the id 'd/k.txt'\n"
    assert as_json("forget", folder, "report", code=1) == {
        "deleted": 0, "chunks": 0, "unknown": ["report"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "given"), [("d/k.txt", "./d/k.txt"), ("./d/k.txt", "./d/k.txt")]
)
def test_a_file_is_forgotten_by_any_spelling_of_its_path(
    folder: Path, stored: str, given: str
) -> None:
    with DiskStore(folder) as store:
        store.put(key_of(7), make_kv(), [stored])
    assert as_json("forget", folder, given)["deleted"] == 1


def test_forget_knows_namespaces(folder: Path) -> None:
    from sac_rag.namespace import Namespace

    with DiskStore(folder) as store:
        store.put(key_of(7), make_kv(), [Namespace("tenant").document_id("contract")])
    assert as_json("forget", folder, "contract", code=1)["deleted"] == 0
    assert as_json("forget", folder, "contract", "--namespace", "tenant")["deleted"] == 1


def test_pin_by_key_and_by_document(folder: Path) -> None:
    assert as_json("pin", folder, key_of(0), key_of(9)) == {"asked": 2, "done": 1}
    assert as_json("pin", folder, "--document", "report")["done"] == 3
    assert as_json("stats", folder)["pinned"] == 3
    assert run("pin", folder, "--document", "part 2", "--off").stdout == "1 of 1 entries unpinned\n"
    assert as_json("stats", folder)["pinned"] == 2
    assert "nothing to pin" in str(run("pin", folder, "--document", "unknown").exception)


def test_rekey_encrypts_with_a_key_from_the_environment_or_a_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_KEY", KEY)
    path = folder.parent / "key"
    path.write_text(KEY[::-1].replace("b", "c"))
    path.chmod(0o600)
    assert as_json("rekey", folder, "--new-key-env", "STORE_KEY") == {"encrypted": 3}
    assert "is encrypted with key" in str(run("stats", folder).exception)
    assert as_json("stats", folder, "--key-env", "STORE_KEY")["cipher"]
    assert as_json("rekey", folder, "--key-env", "STORE_KEY", "--new-key-file", path)
    assert as_json("check", folder, "--key-file", path) == {"problems": [], "left": []}
    assert as_json("forget", folder, "report", "part 0", "--key-file", path)["deleted"] == 1
    assert as_json("rekey", folder, "--key-file", path, "--plain") == {"encrypted": 2}
    assert as_json("stats", folder)["cipher"] is None
    for wrong in ([], ["--plain", "--new-key-env", "STORE_KEY"]):
        assert "give either --new-key-env" in str(run("rekey", folder, *wrong).exception)


def test_rebuild_makes_a_lost_index_again_and_an_intact_one_stays(folder: Path) -> None:
    assert run("rebuild", folder).exit_code == 1
    assert as_json("stats", folder)["documents"] == 4
    for part in (folder / "entries").glob("cache.db*"):
        part.unlink()
    assert run("gc", folder).exit_code == 1
    found = as_json("rebuild", folder)
    assert (found["entries"], found["left_out"]) == (3, [])
    assert as_json("verify", folder)["entries"] == 3
    assert as_json("stats", folder)["documents"] == 0


@pytest.mark.parametrize("command", ["stats", "check", "verify", "gc", "forget", "pin", "rekey"])
def test_a_folder_that_is_no_store_is_refused_and_left_alone(tmp_path: Path, command: str) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    more = {"forget": ["a"], "pin": ["aa"], "rekey": ["--plain"]}.get(command, [])
    for folder in (tmp_path, tmp_path / "missing"):
        done = run(command, folder, *more)
        assert isinstance(done.exception, ValueError)
        assert f"{folder} is no store: there is no store.json" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_looking_things_up_is_timed(tmp_path: Path) -> None:
    from sac_rag.benchmarks.store import measure_lookups

    seen: list[int] = []
    speed = measure_lookups(tmp_path, entries=20, repeats=5, on_progress=seen.append)
    assert sum(seen) == 20
    assert speed.entries == 20
    assert min(speed.open_ms, speed.hit_ms, speed.read_ms, speed.miss_ms, speed.put_ms) > 0
    assert speed.lookup_ms == speed.hit_ms - speed.read_ms
