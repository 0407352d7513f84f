"""bench memory: the peak of a process that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.models import PROSE, make_model, make_tokenizer

from sac_rag.benchmarks.memory import measure_memory


def test_an_archive_is_answered_from_in_a_process_of_its_own(tmp_path: Path, home: Any) -> None:
    model = tmp_path / "model"
    make_model("llama").save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    options = {"compressor": "full", "chunk_tokens": 50, "dtype": "float32"}
    rows = list(measure_memory(str(model), PROSE * 20, ks=(2,), ways=("archive",), **options))
    assert [(row.way, row.k) for row in rows] == [("archive", 2)]
    assert all(row.peak_bytes >= row.loaded_bytes > 50e6 for row in rows)
