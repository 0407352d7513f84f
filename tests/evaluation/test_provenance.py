"""Figures say which code measured them, when, and on which bits."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from sac_rag.evaluation import provenance as module
from sac_rag.evaluation.provenance import provenance


def test_data_is_named_with_its_digest_and_without_its_folder(tmp_path: Path) -> None:
    data = tmp_path / "dev.json"
    data.write_bytes(b"{}")
    source = provenance("smollm2-135m", [data])
    assert source["data"] == {"dev.json": hashlib.sha256(b"{}").hexdigest()}
    assert source["model"] == "smollm2-135m"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", source["date"])
    assert provenance(tmp_path, [])["model"] == tmp_path.name


def test_the_commit_is_that_of_the_packages_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sac_rag"
    package.mkdir()
    (package / "code.py").write_text("a = 1\n")
    monkeypatch.setattr(module, "_PACKAGE", package)
    assert provenance("m", [])["commit"] is None, "no checkout"

    def git(*arguments: str) -> str:
        settings = ("-c", "user.name=n", "-c", "user.email=e@example.com")
        command = ["git", *settings, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    git("add", "sac_rag/code.py")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert provenance("m", [])["commit"] == commit
    (package / "code.py").write_text("a = 2\n")
    assert provenance("m", [])["commit"] == f"{commit}-dirty"
