"""The examples run, and who lacks LangChain is told what to install."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import langchain_sac
import pytest
from langchain_core.documents import Document
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_scenes import (  # noqa: F401
    DOCUMENTS,
    Words,
    home_of_module,
    make_embedder,
    make_rag,
)

from sac_rag import DiskStore, SacRAG
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import SPANS


@pytest.mark.parametrize("name", langchain_sac.__all__)
def test_the_example_of_every_public_name_runs(llama: Generator, name: str, tmp_path: Path) -> None:
    class Tiny(SacRAG):
        """Loads a tiny model whatever is asked for."""

        @classmethod
        def from_pretrained(cls, *names: Any, store: Any = None, **options: Any) -> SacRAG:
            return make_rag(llama, prompt_format=SPANS, store=store)

    class TinyEmbeddings(langchain_sac.SACEmbeddings):
        """Loads a tiny model too."""

        @classmethod
        def from_pretrained(cls, *names: Any) -> langchain_sac.SACEmbeddings:
            return cls(make_embedder())

    vectors = InMemoryVectorStore(Words())
    vectors.add_documents(DOCUMENTS)
    public = {name: getattr(langchain_sac, name) for name in langchain_sac.__all__}
    names = {
        **public,
        "SacRAG": Tiny,
        "SACEmbeddings": TinyEmbeddings,
        "DiskStore": DiskStore,
        "folder": tmp_path,
        "Document": Document,
        "RunnablePassthrough": RunnablePassthrough,
        "vector_store": vectors,
        "retriever": vectors.as_retriever(search_kwargs={"k": 2}),
    }
    (test,) = doctest.DocTestFinder(recurse=False).find(public[name], name, globs=names)
    assert test.examples
    told: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append)
    assert told == []


def test_public_names_are_in_order() -> None:
    assert langchain_sac.__all__ == sorted(langchain_sac.__all__)


def test_without_langchain_the_import_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['langchain_core'] = None\n"
        "try:\n    import langchain_sac\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (
        "langchain_sac needs the 'langchain' extra: pip install 'sac-rag[langchain]'\n"
    )
    assert done.stderr == ""
