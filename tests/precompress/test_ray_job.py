"""On a Ray cluster a job comes to the bytes of the local one, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from support.collection import make_collection, opened_chunk_by_chunk, passages
from support.ray_cluster import IGNORED, halves, ray_cluster

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.collection import open_compressor
from sac_rag.precompress.job import PrecompressJob, precompress
from sac_rag.reports import BadRecord
from sac_rag.retrieval.readers.files import read_documents
from sac_rag.stores import DiskStore

pytestmark = [pytest.mark.slow, *IGNORED]

# Three windows; SAC_RAG_FAULTS=29 makes it 20,300 chunks.
COUNT = 700 * int(os.environ.get("SAC_RAG_FAULTS", "1"))
TIMEOUT = 300

# By key, the bytes of an entry's file, and its documents.
Content: TypeAlias = dict[str, tuple[bytes, tuple[str, ...]]]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_cluster() as address:
        yield address


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_collection(tmp_path_factory.mktemp("made") / "collection")


@pytest.fixture
def local(made: Path, tmp_path: Path) -> Path:
    """A collection for the local job; `distributed` is one of the same model."""
    return Path(shutil.copytree(made, tmp_path / "local"))


@pytest.fixture(scope="module")
def expected(made: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Content:
    """What the local job stores of the corpus."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("expected") / "collection"))
    PrecompressJob(opened_chunk_by_chunk(folder), partial(read_documents, [corpus])).run()
    return content(folder)


@pytest.fixture
def distributed(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "distributed"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, whose ends are no ends of windows, and one bad record."""
    folder = tmp_path_factory.mktemp("corpus")
    chunks = [
        Chunk(f"Passage {i}. " + "Owls hear mice. " * (1 + i % 4), id=f"d{i // 3}")
        for i in range(COUNT)
    ]
    parts = [chunks[:150], chunks[150:500], chunks[500:]]
    for number, part in enumerate(parts):
        lines = [json.dumps({"id": chunk.id, "text": chunk.text}) for chunk in part]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    with (folder / "1.jsonl").open("a") as file:
        file.write("\n{bad")
    return folder


def content(folder: Path) -> Content:
    with DiskStore(folder / "anchors") as store:
        assert store.check() == []
        return {
            key: (path.read_bytes(), store.documents(key))
            for path in store.folder.rglob("*.kv")
            for key in [path.stem.partition("-")[0]]
        }


def ray_job(
    folder: Path,
    documents: Any,
    opening: Callable[[Path], CachedCompressor] = open_compressor,
    **options: Any,
) -> Any:
    from sac_rag.precompress.on_ray.job import RayJob

    return RayJob(
        open_compressor(folder), documents, open_compressor=partial(opening, folder), **options
    )


def read(corpus: Path) -> Any:
    from sac_rag.precompress.on_ray.documents import read_with_ray

    return read_with_ray([corpus])


def test_it_stores_and_reports_what_the_local_job_does_to_the_byte(
    address: str, local: Path, distributed: Path, corpus: Path
) -> None:
    for folder in (local, distributed):
        precompress(open_compressor(folder), [("d0", "A former version.")])
    reader = partial(read_documents, [corpus])
    expected = PrecompressJob(opened_chunk_by_chunk(local), reader, split=halves).run()
    report = ray_job(distributed, read(corpus), opened_chunk_by_chunk, split=halves).run(2)
    assert content(distributed) == content(local)
    assert (report.documents, report.bad) == (COUNT, expected.bad)
    # A text of two windows may be computed in both at the same time.
    counts = (report.counts.computed + report.counts.hits, report.counts.empty)
    assert counts == (expected.counts.computed + expected.counts.hits, expected.counts.empty)
    assert (report.counts.deleted, expected.counts.deleted) == (1, 1)
    assert report.bad[0].place.endswith("1.jsonl:351")


def test_an_actor_that_is_killed_is_replaced_and_nothing_is_missing_or_twice(
    address: str, expected: Content, distributed: Path, corpus: Path
) -> None:
    killed = partial(opened_chunk_by_chunk, after=100)
    report = ray_job(distributed, read(corpus), killed).run(2)
    assert (distributed / "ended").exists()
    assert report.counts.workers_lost == 1
    assert report.counts.chunks == COUNT + 1  # the bad record
    assert content(distributed) == expected


def test_a_driver_that_is_killed_is_resumed_with_the_rest_only(
    address: str, expected: Content, distributed: Path, corpus: Path
) -> None:
    script = Path(__file__).parents[1] / "support" / "collection.py"
    command = [sys.executable, str(script), "ray", str(distributed), str(corpus), address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "256\n"
        driver.kill()
    report = ray_job(distributed, read(corpus), opened_chunk_by_chunk).run(2)
    assert report.counts.hits >= 256
    assert report.counts.hits + report.counts.computed == COUNT
    assert content(distributed) == expected


def test_a_dataset_of_anybodys_rows_is_compressed_and_a_full_disk_ends_it(
    address: str, distributed: Path
) -> None:
    import ray.data
    from support.collection import opened_on_a_full_disk

    rows = [{"text": chunk.text, "id": chunk.id, "other": 1} for chunk in passages(9)]
    dataset = ray.data.from_items([*rows, {"text": None, "id": "bad", "other": 2}])
    full = partial(opened_on_a_full_disk, after=4)
    with pytest.raises(OSError, match="no space left on device"):
        ray_job(distributed, dataset, full).run(1)
    report = ray_job(distributed, dataset).run(1)
    assert (report.counts.computed, report.counts.hits) == (5, 4)
    assert report.bad == (
        BadRecord("a row with the id 'bad'", "a chunk's text must be a str, was: None"),
    )


def test_the_command_line_runs_it_on_a_cluster_by_address(
    address: str, distributed: Path, corpus: Path
) -> None:
    command = [
        *(sys.executable, "-m", "sac_rag.cli", "precompress", str(corpus / "0.jsonl"), "--json"),
        *("--store", str(distributed), "--no-index", "--as-is", "--workers", "1"),
    ]
    on_ray = [*command, "--engine", "ray", "--address", address]
    done = subprocess.run(on_ray, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["computed"] == 150
    again = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert json.loads(again.stdout)["hits"] == 150, again.stderr


def test_standard_input_is_refused(address: str) -> None:
    from sac_rag.precompress.on_ray.documents import read_with_ray

    with pytest.raises(ValueError, match="cannot be read by a cluster"):
        read_with_ray(["-"])


def test_telemetry_is_off() -> None:
    script = "import os, sac_rag.precompress.on_ray; print(os.environ['RAY_USAGE_STATS_ENABLED'])"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_USAGE_STATS_ENABLED"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "0\n"
