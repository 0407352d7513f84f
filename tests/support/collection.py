"""A collection of a tiny model, opened by processes of their own. Imports little: they wait for it.

A test starts them with `partial(opened_…, folder)`, which they import from here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.collection import FORMAT, CollectionSettings, open_compressor
from sac_rag.kv import AnchorKV
from sac_rag.precompress.callback import JobCallback
from sac_rag.precompress.job import increments
from sac_rag.precompress.workers import Workers


def make_collection(folder: Path) -> Path:
    """The folder of an empty collection, of a model that is saved in it."""
    from support.models import make_model, make_tokenizer

    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    settings = CollectionSettings(model=str(folder / "model"), compressor="full")
    text = json.dumps({"format": FORMAT, **asdict(settings)})
    (folder / "collection.json").write_text(text)
    return folder


def passages(count: int) -> list[Chunk]:
    """Chunks of very different lengths, a few to each document."""
    return [
        Chunk(
            f"Passage {i}. " + "Owls hear mice under the snow. " * (1 + i * 7 % 13), id=f"d{i // 3}"
        )
        for i in range(count)
    ]


def opened_chunk_by_chunk(folder: Path, after: int | None = None) -> CachedCompressor:
    """A compressor whose entries have the same bytes whatever is in the store already.

    Chunks that are computed in one pass change one another's last bits.

    Args:
        folder: Of the collection.
        after: The first process is killed when it has computed so many chunks.
    """
    compressor = open_compressor(folder) if after is None else opened_and_killed_once(folder, after)
    compressor.inner.batch_tokens = 1
    return compressor


def opened_and_killed_once(folder: Path, after: int) -> CachedCompressor:
    """A compressor whose first process is killed when it has computed so many chunks."""
    return _ending(folder, after, lambda: os.kill(os.getpid(), signal.SIGKILL), once=True)


def opened_and_killed_always(folder: Path, after: int) -> CachedCompressor:
    """One that kills every process so."""
    return _ending(folder, after, lambda: os.kill(os.getpid(), signal.SIGKILL), once=False)


def opened_on_a_full_disk(folder: Path, after: int) -> CachedCompressor:
    """One whose store is full when it has that many chunks."""

    def refuse() -> NoReturn:
        raise OSError("no space left on device")

    return _ending(folder, after, refuse, once=False)


def _ending(folder: Path, after: int, end: Any, once: bool) -> CachedCompressor:
    compressor = open_compressor(folder)
    keep, kept = compressor.keep, iter(range(after))

    def ending(text: str, kv: AnchorKV, documents: Sequence[str] = ()) -> None:
        if next(kept, None) is None and (not once or _is_first(folder)):
            end()
        keep(text, kv, documents)

    compressor.keep = ending  # type: ignore[method-assign]
    return compressor


def _is_first(folder: Path) -> bool:
    try:
        (folder / "ended").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def main(folder: str, count: str, workers: str) -> None:
    """Precompresses passages here, or in workers, a line for each chunk that is stored."""
    compressor, chunks = open_compressor(Path(folder)), passages(int(count))
    with ExitStack() as stack:
        compress = None
        if int(workers):
            opening = partial(open_compressor, Path(folder))
            pool = Workers(opening, compressor.fingerprint, int(workers))
            compress = stack.enter_context(pool).run
        for more in increments(
            compressor, chunks, skip_bad=True, whole_documents=True, compress=compress
        ):
            sys.stdout.write("stored\n" * more.computed)
            sys.stdout.flush()


def ray_main(folder: str, files: str, address: str) -> None:
    """Precompresses files on a Ray cluster, a line for each window that is stored."""
    from sac_rag.precompress.on_ray.documents import read_with_ray
    from sac_rag.precompress.on_ray.job import RayJob, cluster
    from sac_rag.reports import PrecompressReport

    class Printing(JobCallback):
        def on_compressed(self, report: PrecompressReport) -> None:
            sys.stdout.write(f"{report.computed}\n")
            sys.stdout.flush()

    opening = partial(opened_chunk_by_chunk, Path(folder))
    with cluster(address):
        RayJob(opening(), read_with_ray([files]), open_compressor=opening, callback=Printing()).run(
            2
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for support.models
    (ray_main if sys.argv[1] == "ray" else main)(*sys.argv[-3:])
