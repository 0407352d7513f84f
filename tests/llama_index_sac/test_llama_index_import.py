"""The package says what it needs, and its examples run."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import llama_index_sac
import pytest
from tiny_index import home_of_module, make_rag, no_loop_is_left  # noqa: F401

from sac_rag import Decoding, DiskStore
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import SPANS

PAGE = Path(__file__).parents[2] / "docs" / "llama_index.md"
MODULES = (
    "citation",
    "llm",
    "markers",
    "node",
    "postprocessor",
    "precompress",
    "prompts",
    "sync",
)


@pytest.mark.parametrize("absent", ["llama_index", "llama_index.core"])
def test_without_llama_index_it_names_the_extra(absent: str) -> None:
    script = f"import sys; sys.modules[{absent!r}] = None; import llama_index_sac"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(
        "ImportError: llama_index_sac needs the 'llama-index' extra: "
        "pip install 'sac-rag[llama-index]'"
    )


def test_public_names_are_there_in_order_and_described() -> None:
    assert llama_index_sac.__all__ == sorted(llama_index_sac.__all__)
    for name in llama_index_sac.__all__:
        assert getattr(llama_index_sac, name).__doc__


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_run(llama: Generator, disk: DiskStore, module: str) -> None:
    # The package has functions of the same names as modules.
    found = import_module(f"llama_index_sac.{module}")
    rag = make_rag(
        llama, prompt_format=replace(SPANS, stop=("zz",)), decoding=Decoding(max_new_tokens=8)
    )
    names = {"rag": rag, "disk_rag": make_rag(llama, store=disk)}
    result = doctest.testmod(found, extraglobs=names)
    assert result.failed == 0
    examples = [test for test in doctest.DocTestFinder().find(found) if test.examples]
    public = {
        name
        for name in llama_index_sac.__all__
        if getattr(llama_index_sac, name).__module__ == found.__name__
        and name != "UnanswerableError"
    }
    assert public <= {test.name.split(".")[-1] for test in examples}


@pytest.mark.real_model
def test_the_python_in_the_documentation_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().startswith("seven [")
