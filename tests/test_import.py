"""Importing the package costs nothing, and every public name is there when it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sac_rag


def modules_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a new interpreter that has run one statement."""
    script = f"{statement}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert process.stderr == ""
    return set(process.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import sac_rag",
        "import sac_rag; sac_rag.__version__; dir(sac_rag)",
        "from sac_rag import Chunk, ChunkMissError, ModelUnavailableError, PromptTooLongError",
        "import sac_rag.stores",
        "import sac_rag.compressors",
    ],
)
def test_importing_loads_no_heavy_library(statement: str) -> None:
    loaded = modules_after(statement)
    assert "sac_rag" in loaded
    heavy = {"torch", "transformers", "peft", "faiss", "diskcache", "numpy", "opentelemetry"}
    assert not loaded & heavy


@pytest.mark.parametrize("name", sorted(set(sac_rag.__all__) - {"SPANS"}))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(sac_rag, name).__name__ == name


def test_the_public_prompt_format_is_there() -> None:
    assert isinstance(sac_rag.SPANS, sac_rag.PromptFormat)


def test_public_names_are_listed_and_in_order() -> None:
    assert set(sac_rag.__all__) <= set(dir(sac_rag))
    assert "__version__" in dir(sac_rag)
    assert sac_rag.__all__ == sorted(sac_rag.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sac_rag' has no attribute 'Compressors'"):
        sac_rag.Compressors  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from sac_rag import nothing  # noqa: F401


def test_submodules_can_be_reached_as_usual() -> None:
    from sac_rag.compressors import checkpoint

    assert {"sac", "full", "icae", "x500"} == set(checkpoint.METHODS)
