"""Collection: a folder of searchable chunks and their anchors.

collection.json   names of model, compressor and embedder
index/            the chunks' texts and embeddings (retrieval.ChunkIndex)
anchors/          the chunks' KV (stores.DiskStore)
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sac_rag import forks
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import StoredDtype
from sac_rag.loading import default_compressor, load_compressor
from sac_rag.pipeline import SacRAG
from sac_rag.precompress.estimate import Estimate, estimate
from sac_rag.precompress.job import compress_documents
from sac_rag.prompts.format import PromptFormat
from sac_rag.reports import PrecompressReport
from sac_rag.retrieval.embedder import Embedder
from sac_rag.retrieval.index import ChunkIndex, Hit, require_json
from sac_rag.retrieval.splitter import split
from sac_rag.stores.base import strings
from sac_rag.stores.disk import DiskStore
from sac_rag.whole_file import DRAFT_SUFFIX, one_writer, whole_file

FORMAT = 1

_SETTINGS = "collection.json"
_INDEX = "index"
_ANCHORS = "anchors"
_LOCK = ".lock"  # of the one process that makes the collection

_EMBEDDED_AT_A_TIME = 4096  # chunks
_SAVED_EVERY_S = 60.0  # each time the whole index is written


@dataclass(frozen=True)
class CollectionSettings:
    """Settings of a collection, fixed when it is made and saved in it.

    Attributes:
        model: The generator: a default model's name, a local folder or a hub id.
        compressor: "shipped", "fitted", "full", or the folder of a compressor. None for that of
            the collection; a new one takes, and records, the default for its model.
        ratio: Source tokens per anchor; None for the compressor's.
        stored_dtype: Dtype of stored keys and values; None for the compressor's.
        embedder: Model for search: a default embedder's name, a local folder or a hub id.
        chunk_tokens: Longest chunk, in tokens of the generator.
    """

    model: str = "smollm2-135m"
    compressor: str | None = None
    ratio: int | None = None
    stored_dtype: StoredDtype | None = None
    embedder: str = "minilm"
    chunk_tokens: int = 256


class Collection:
    """Chunks that can be searched and asked about, in a folder.

    Several processes may add to one collection: each waits while another saves, and builds on what
    is there. What others have added is found from the next `add` on, or when it is opened again.

    Args:
        folder: Created owner-only (0700) if it does not exist.
        settings: Of a new collection. Default: those saved in the folder, or the defaults.

    Raises:
        ValueError: if the folder holds something else, another format, or a collection made with
            other settings. Its index is read, and may raise so, when it is first used.
        OSError: if the folder cannot be created or read.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: CollectionSettings | None = None
    ) -> None:
        self.folder = Path(folder)
        self._adding = forks.lock(self, "_adding")
        self.settings = _find_settings(self.folder, settings)
        # First, so that a model that cannot be loaded leaves no collection behind.
        compressor, prompt_format = _load(self.settings)
        _save_settings(self.folder, self.settings)
        cached = CachedCompressor(compressor, DiskStore(self.folder / _ANCHORS))
        self.rag = SacRAG(cached, prompt_format=prompt_format)

    @cached_property
    def index(self) -> ChunkIndex:
        """The searchable chunks. Who only stores anchors never loads them, nor the embedder."""
        embedder = Embedder.from_pretrained(self.settings.embedder)
        if (self.folder / _INDEX).exists():
            return ChunkIndex.load(self.folder / _INDEX, embedder)
        return ChunkIndex(embedder)

    def close(self) -> None:
        """Closes the store, which then saves its recent hits and misses."""
        self.rag.compressor.store.close()

    @classmethod
    def exists(cls, folder: str | os.PathLike[str]) -> bool:
        """Whether a folder holds a collection."""
        return (Path(folder) / _SETTINGS).is_file()

    def split(self, documents: Iterable[Chunk]) -> list[Chunk]:
        """Cuts documents into chunks of this collection's length."""
        cut = self.splitting()
        return [chunk for document in _several(documents) for chunk in cut(document)]

    def splitting(self) -> Callable[[Chunk], list[Chunk]]:
        """Cuts one document as `split` does; picklable, and without the model."""
        tokenizer, longest = self.rag.generator.tokenizer, self.settings.chunk_tokens
        return partial(split, tokenizer=tokenizer, max_tokens=longest)

    def add(
        self,
        chunks: Iterable[Chunk],
        on_progress: Callable[[int], None] | None = None,
        *,
        whole_documents: bool = False,
    ) -> int:
        """Makes new chunks searchable and saves the index.

        A killed run can be repeated and resumes where the index was saved last. What other
        processes have added meanwhile is kept.

        Args:
            chunks: Chunks with text.
            on_progress: Called with the number of chunks embedded since the last call.
            whole_documents: Whether `chunks` has all chunks of each document in it: others that the
                index has of these documents are removed.

        Returns:
            Number of chunks that were new.

        Raises:
            TypeError: if metadata is not what JSON can hold; nothing is embedded then.
            ValueError: if a chunk is empty, or the saved index is damaged.
            OSError: if the index cannot be written.
        """
        new = {(chunk.id, chunk.text): chunk for chunk in _several(chunks)}
        documents = {name for name, _ in new if name is not None} if whole_documents else set()

        def is_outdated(chunk: Chunk) -> bool:
            return chunk.id in documents and (chunk.id, chunk.text) not in new

        with self._adding:
            self.index.refresh(self.folder / _INDEX)
            known = _places(self.index)
            unknown = [chunk for place, chunk in new.items() if place not in known]
            require_json(unknown)
            added, saved = 0, time.monotonic()
            embedded = ChunkIndex(self.index.embedder)
            for start in range(0, len(unknown), _EMBEDDED_AT_A_TIME):
                embedded.add(unknown[start : start + _EMBEDDED_AT_A_TIME], on_progress)
                if time.monotonic() - saved > _SAVED_EVERY_S:
                    added += self._merge(embedded, lambda chunk: False)
                    embedded, saved = ChunkIndex(self.index.embedder), time.monotonic()
            if len(embedded) or any(map(is_outdated, self.index.chunks)):
                added += self._merge(embedded, is_outdated)
            return added

    def _merge(self, embedded: ChunkIndex, is_outdated: Callable[[Chunk], bool]) -> int:
        """Saves embedded chunks with what is there by now; returns how many are new to it."""
        with self.index.changing(self.folder / _INDEX):
            self.index.discard(is_outdated)
            known = _places(self.index)
            embedded.discard(lambda chunk: (chunk.id, chunk.text) in known)
            self.index.extend(embedded)
        return len(embedded)

    def estimate(
        self, documents: Iterable[Chunk], split: Callable[[Chunk], Sequence[Chunk]]
    ) -> Estimate:
        """Expected time and space of precompressing documents; see `precompress.estimate`."""
        return estimate(self.rag.compressor, documents, split)

    def precompress(
        self, chunks: Iterable[Chunk], *, workers: int = 1
    ) -> Iterator[PrecompressReport]:
        """Stores the anchors of all chunks of documents; bad chunks are counted and skipped.

        Entries of former versions of the documents are deleted.

        Args:
            chunks: Streamed, never all in memory.
            workers: Processes that compress in parallel, each with its own model.

        Yields:
            The counts since the last report.

        Raises:
            ValueError: for less than one worker.
            OSError: if the store cannot be written.
            RuntimeError: if workers die repeatedly.
        """
        return compress_documents(
            self.rag.compressor,
            _several(chunks),
            workers=workers,
            open_compressor=partial(open_compressor, self.folder),
        )

    def search(self, question: str, k: int = 4) -> list[Hit]:
        """The k different texts most similar to the question, best first.

        Raises:
            ValueError: if the question is empty, k is below 1, or the index has no chunks.
        """
        if not len(self.index):
            raise ValueError(
                f"{self.folder} has no chunks yet; add some: sac-rag precompress PATH "
                f"--store {self.folder}"
            )
        return self.index.search(question, k)


def in_reading_order(hits: Sequence[Hit]) -> list[Chunk]:
    """The chunks of hits with the most similar last, next to the question.

    Small models answer from the text nearest to the question: in the demo, SmolLM2-135M names the
    bacterium of the Black Death in this order, and a wrong one in the reverse order.
    """
    return [hit.chunk for hit in reversed(hits)]


def open_compressor(folder: Path) -> CachedCompressor:
    """A collection's compressor and store, without index, embedder and pipeline."""
    compressor, _ = _load(read_settings(folder))
    return CachedCompressor(compressor, DiskStore(folder / _ANCHORS))


def _load(settings: CollectionSettings) -> tuple[Compressor, PromptFormat | None]:
    return load_compressor(
        settings.model,
        settings.compressor,
        ratio=settings.ratio,
        stored_dtype=settings.stored_dtype,
        prompt_format=None,
        device=None,
        dtype=None,
    )


def forget_texts(folder: str | os.PathLike[str], documents: Iterable[str]) -> dict[str, int]:
    """Removes the chunks of documents from the index; their KV stays in the store.

    No trace of them is left in the index's files. No generator is loaded.

    Returns:
        Number of chunks removed of each document that had any.

    Raises:
        ValueError: if the collection or its index is damaged.
        OSError: if the index cannot be written.
    """
    place = Path(folder) / _INDEX
    forgotten = set(strings(documents, "documents"))
    if not place.exists():
        return {}
    counts: Counter[str] = Counter()

    def is_forgotten(chunk: Chunk) -> bool:
        if chunk.id is None or chunk.id not in forgotten:
            return False
        counts[chunk.id] += 1
        return True

    index = ChunkIndex.load(place, Embedder.from_pretrained(read_settings(folder).embedder))
    with index.changing(place):
        index.discard(is_forgotten)
    return dict(counts)


def _several(chunks: Iterable[Chunk]) -> Iterable[Chunk]:
    if isinstance(chunks, str | Chunk):
        raise TypeError(f"chunks must be several Chunks, was: {chunks!r:.80}; put it in a list")
    return chunks


def _places(index: ChunkIndex) -> set[tuple[str | None, str]]:
    return {(chunk.id, chunk.text) for chunk in index.chunks}


def _find_settings(folder: Path, wanted: CollectionSettings | None) -> CollectionSettings:
    """The saved settings, or those of a new collection; raises ValueError where neither can be."""
    if (folder / _SETTINGS).is_file():
        return _saved_settings(folder, wanted)
    if folder.exists() and not (folder.is_dir() and _is_free(folder)):
        raise ValueError(
            f"{folder} holds something else (no {_SETTINGS}); give a new or an empty folder"
        )
    settings = wanted or CollectionSettings()
    if settings.compressor is None:
        # Recorded, so that the collection keeps it when a later version ships another one.
        settings = replace(settings, compressor=default_compressor(settings.model))
    return settings


def _save_settings(folder: Path, settings: CollectionSettings) -> None:
    """Makes a collection of these settings; raises ValueError if there is one of others by now."""
    path = folder / _SETTINGS
    if path.is_file():
        _saved_settings(folder, settings)
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with one_writer(folder / _LOCK):
        if path.is_file():
            _saved_settings(folder, settings)
            return
        with whole_file(path) as draft:
            draft.write_text(json.dumps({"format": FORMAT, **asdict(settings)}, indent=2) + "\n")


def _saved_settings(folder: Path, wanted: CollectionSettings | None) -> CollectionSettings:
    """The saved settings; raises ValueError if others are wanted."""
    saved = read_settings(folder)
    mismatches = {
        name: (getattr(saved, name), value)
        for name, value in ({} if wanted is None else asdict(wanted)).items()
        if value != getattr(saved, name) and (name, value) != ("compressor", None)
    }
    if mismatches:
        raise ValueError(
            f"{folder} was made with other settings, (saved, asked for): {mismatches}; "
            "give another folder, or leave them out to use the saved ones"
        )
    return saved


def _is_free(folder: Path) -> bool:
    """Whether a folder holds nothing but a lock, and drafts that a killed process left."""
    return all(path.suffix == DRAFT_SUFFIX or path.name == _LOCK for path in folder.iterdir())


def read_settings(folder: str | os.PathLike[str]) -> CollectionSettings:
    """The settings that the collection in a folder was made with.

    Raises:
        ValueError: if they are damaged, or of another format.
        OSError: if the folder has none.
    """
    path = Path(folder) / _SETTINGS
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        version = values.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not that of a collection: {error!r}") from error
    if version != FORMAT:
        raise ValueError(
            f"{path.parent} is a collection of format {version!r}, this version of sac_rag reads "
            f"format {FORMAT}; upgrade sac_rag or make the collection again"
        )
    values.setdefault("stored_dtype", None)  # missing in collections made by earlier versions
    unknown = values.keys() ^ {field.name for field in fields(CollectionSettings)}
    if unknown:
        raise ValueError(f"{path} has unknown or missing settings: {', '.join(sorted(unknown))}")
    return CollectionSettings(**values)
