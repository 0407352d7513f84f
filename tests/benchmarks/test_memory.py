"""bench memory: the peak of a process that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.models import PROSE

from sac_rag.benchmarks.memory import measure_memory
from sac_rag.lm.generator import Generator


def test_an_archive_is_answered_from_in_a_process_of_its_own(
    llama: Generator, tmp_path: Path, home: Any
) -> None:
    llama.model.save_pretrained(tmp_path / "model")
    llama.tokenizer.save_pretrained(tmp_path / "model")
    rows = list(
        measure_memory(
            str(tmp_path / "model"), PROSE * 20, ks=(2,),
            ways=("archive",), compressor="full", chunk_tokens=50,
            dtype="float32",
        )
    )  # fmt: skip
    assert [(row.way, row.k) for row in rows] == [("archive", 2)]
    assert all(row.peak_bytes >= row.loaded_bytes > 50e6 for row in rows)
