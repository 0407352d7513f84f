"""Peak resident memory of a process that answers one question, from anchors and from the text."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sac_rag.benchmarks import contestants
from sac_rag.benchmarks.first_token import FORMAT, QUESTION, cut
from sac_rag.pipeline import SacRAG
from sac_rag.stores.disk import DiskStore

# "archive" has neither LoRA nor compressor loaded.
WAYS = ("store", "archive", "text")


@dataclass(frozen=True)
class MemoryRow:
    """Memory of one process.

    Attributes:
        way: Where the chunks come from, of `WAYS`; "text" is read by HF's `generate`.
        k: Chunks in the prompt.
        loaded_bytes: Resident when everything is loaded and nothing answered, at the peak.
        peak_bytes: Resident when the answer is there, at the peak.
    """

    way: str
    k: int
    loaded_bytes: int
    peak_bytes: int


def measure_memory(
    model: str,
    texts: Iterable[str],
    *,
    ks: Sequence[int] = (1, 8),
    ways: Sequence[str] = WAYS,
    compressor: str | None = None,
    chunk_tokens: int = 510,
    dtype: str | None = None,
) -> Iterator[MemoryRow]:
    """Answers a question with one token, in a process per way and number of chunks.

    Args:
        model: As `SacRAG.from_pretrained` takes it; so are compressor and dtype.
        texts: Prose to cut the chunks from.
        ks: Numbers of chunks.
        ways: Of `WAYS`.
        compressor: Default: that of the model.
        chunk_tokens: Tokens of every chunk.
        dtype: Dtype that the model computes in.

    Raises:
        ValueError: if there is too little prose.
        RuntimeError: if a process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"model": model, "compressor": compressor, "dtype": dtype}
        with DiskStore(Path(folder) / "store") as store:
            rag = SacRAG.from_pretrained(**options, store=store, prompt_format=FORMAT)
            chunks = cut(rag.generator, texts, max(ks), chunk_tokens)
            rag.precompress(chunks)
            rag.export(Path(folder) / "archive")
        for k in ks:
            for way in ways:
                work = {"way": way, "folder": folder, "chunks": chunks[:k], "options": options}
                yield MemoryRow(way, k, *_in_process(work))


def _in_process(work: Mapping[str, object]) -> list[int]:
    child = subprocess.run(  # noqa: S603 (this module, in the same Python)
        [sys.executable, "-m", __name__], input=json.dumps(work), capture_output=True, text=True
    )
    if child.returncode:
        raise RuntimeError(f"a process that answers failed: {child.stderr.strip()[-500:]}")
    figures: list[int] = json.loads(child.stdout.splitlines()[-1])
    return figures


def _answer(way: str, folder: str, chunks: list[str], options: dict[str, Any]) -> list[int]:
    """Loads and answers; peak bytes after either."""
    place = Path(folder)
    if way == "archive":
        model = options["model"]
        rag = SacRAG.from_archive(place / "archive", model, prompt_format=FORMAT)
    else:
        store = DiskStore(place / "store") if way == "store" else None
        chosen = options if way == "store" else {**options, "compressor": "full"}
        rag = SacRAG.from_pretrained(**chosen, store=store, prompt_format=FORMAT)
    loaded = _peak_bytes()
    if way == "text":
        contestants.from_text(rag.generator, rag.prompt_ids(QUESTION, chunks), 1)
    else:
        contestants.from_anchors(rag, [(QUESTION, chunks)], 1)
    return [loaded, _peak_bytes()]


def _peak_bytes() -> int:
    """Most resident bytes of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage would count the process that started this one too
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(**json.load(sys.stdin))) + os.linesep)
