"""ChunkIndex, FAISS over embeddings of chunks: the default retriever."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.whole_file import one_writer

_FORMAT = 1
_ABOUT = "index.json"
_LOCK = ".lock"  # of the one process that writes
_OURS = re.compile(
    r"index\.(json|part)|(vectors|chunks)\.part|vectors-\w+\.faiss|chunks-\w+\.jsonl"
)
_REBUILD = "it is damaged, build it again"
_NEIGHBOURS = 32  # links of a vector in the HNSW graph, FAISS's usual choice
_BREADTH = 128  # candidates in the graph; 16, the default, misses 1 nearest vector in 100
_BLOCK = 1 << 20  # bytes hashed at a time


class EmbedderLike(Protocol):
    """The part of an Embedder that ChunkIndex needs."""

    @property
    def identity(self) -> str:
        """Equal for two embedders only if they give the same vectors."""

    @property
    def dimension(self) -> int:
        """Length of the vectors."""

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """A vector of length 1 per text. Shape: (texts, dimension)."""


@dataclass(frozen=True)
class Hit:
    """A text that a search returns, with the chunks that have it.

    Attributes:
        chunk: The nearest of these chunks, as it was added.
        score: Cosine between its embedding and the question's, from -1 to 1.
        duplicates: The others, in the order they were added.
    """

    chunk: Chunk
    score: float
    duplicates: tuple[Chunk, ...] = ()

    @property
    def documents(self) -> tuple[str, ...]:
        """Ids of all documents that have this text, that of `chunk` first."""
        ids = [chunk.id for chunk in (self.chunk, *self.duplicates) if chunk.id is not None]
        return tuple(dict.fromkeys(ids))


class ChunkIndex:
    """Finds the chunks nearest to a question.

    A chunk is embedded with its title, if it has one, in front of its text. Small indexes are
    searched exactly, large ones through an HNSW graph, which may rarely miss a hit.

    Attributes:
        embedder: Turns chunks and questions into vectors.
        hnsw_from: Number of chunks from which on the graph is used.
    """

    def __init__(self, embedder: EmbedderLike, *, hnsw_from: int = 100_000) -> None:
        self.embedder = embedder
        self.hnsw_from = hnsw_from
        self._chunks: list[Chunk] = []
        self._of_text: dict[str, list[Chunk]] = {}
        self._vectors: Any = faiss.IndexFlatIP(embedder.dimension)
        # index.json of the version that was loaded or saved last, and whether this is another.
        self._about: dict[str, Any] | None = None
        self._is_changed = False

    @classmethod
    def build(
        cls,
        chunks: Iterable[ChunkLike],
        embedder: EmbedderLike,
        on_progress: Callable[[int], None] | None = None,
    ) -> ChunkIndex:
        """Makes an index of chunks; see `add`."""
        index = cls(embedder)
        index.add(chunks, on_progress)
        return index

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def chunks(self) -> Sequence[Chunk]:
        """All chunks, in the order they were added; a copy."""
        return tuple(self._chunks)

    def add(
        self, chunks: Iterable[ChunkLike], on_progress: Callable[[int], None] | None = None
    ) -> None:
        """Embeds and adds chunks, all of them or, if it raises, none. Duplicates are kept.

        Args:
            chunks: Texts, (document id, text) pairs or Chunks.
            on_progress: Called with the number of chunks embedded since the last call.

        Raises:
            ValueError: if a chunk is empty.
            TypeError: if one is no chunk or has metadata that JSON cannot hold, or `chunks` is one
                str.
        """
        if isinstance(chunks, str):
            raise TypeError("chunks must be several chunks, was: one str; put it in a list")
        new = [Chunk.of(chunk) for chunk in chunks]
        for number, chunk in enumerate(new):
            if chunk.is_empty:
                raise ValueError(
                    f"a chunk must have some text, chunk {number} (from 0) of {len(new)} has none; "
                    "leave it out"
                )
        require_json(new)
        if not new:
            return
        texts = [f"{chunk.title}\n{chunk.text}" if chunk.title else chunk.text for chunk in new]
        self._insert(new, self._embed(texts, on_progress))

    def extend(self, other: ChunkIndex) -> None:
        """Adds the chunks of another index of the same embedder, with their vectors."""
        if len(other):
            self._insert(other._chunks, other._vectors.reconstruct_n(0, len(other)))

    def discard(self, unwanted: Callable[[Chunk], bool]) -> int:
        """Removes chunks; returns how many."""
        rows = [row for row, chunk in enumerate(self._chunks) if not unwanted(chunk)]
        removed = len(self) - len(rows)
        if removed:
            vectors = self._vectors.reconstruct_n(0, len(self))[rows]
            # Vectors cannot be removed from the graph.
            self._vectors = faiss.IndexFlatIP(self.embedder.dimension)
            chunks, self._chunks, self._of_text = self._chunks, [], {}
            self._insert([chunks[row] for row in rows], vectors)
        return removed

    def search(self, question: str, k: int = 4) -> list[Hit]:
        """The k different texts nearest to a question, best first; all if there are fewer.

        Raises:
            ValueError: for an empty question or k below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, was: {k}")
        if not question.strip():
            raise ValueError(f"a question must have some text, was: {question!r}")
        k = min(k, len(self._of_text))
        if k == 0:
            return []
        query, asked = self._embed([question]), k
        while True:
            hits = self._hits(*self._nearest(query, asked))
            if len(hits) >= k:
                return hits[:k]
            asked = min(2 * asked, len(self))  # some have the same text

    def _hits(self, scores: list[float], rows: list[int]) -> list[Hit]:
        """A hit per text, in the order of scores."""
        hits: dict[str, Hit] = {}
        for score, row in zip(scores, rows, strict=True):
            chunk = self._chunks[row]
            if chunk.text not in hits:
                others = tuple(other for other in self._of_text[chunk.text] if other is not chunk)
                hits[chunk.text] = Hit(chunk, score, others)
        return list(hits.values())

    def refresh(self, folder: str | os.PathLike[str]) -> None:
        """Becomes the index in a folder, if another process has saved one since this was loaded.

        Raises as `load` does, except if there is no index.
        """
        folder = Path(folder)
        if not (folder / _ABOUT).exists() or _read_about(folder) == self._about:
            return
        saved = ChunkIndex.load(folder, self.embedder)
        self._chunks, self._of_text, self._vectors = saved._chunks, saved._of_text, saved._vectors
        self._about, self._is_changed = saved._about, False

    @contextmanager
    def changing(self, folder: str | os.PathLike[str]) -> Iterator[None]:
        """Begins with what is saved in a folder, keeps other writers out, and saves the changes.

        Raises as `load` and `save` do.
        """
        folder = _folder_of_its_own(folder)
        with one_writer(folder / _LOCK):
            self.refresh(folder)
            yield
            if self._is_changed:
                self._write(folder)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index into an owner-only (0700) folder.

        Vectors and chunks go into files named by their digest, beside those of an older index, and
        replacing index.json, which names them, is the step that counts: a crash before it leaves
        the old index, one after it the new. Writers wait for each other; each replaces the index of
        the one before, where `changing` builds on it.

        Args:
            folder: New, empty, or an index that is replaced.

        Raises:
            ValueError: if the folder holds anything else.
            TypeError: if a chunk's metadata has become what JSON cannot hold.
        """
        folder = _folder_of_its_own(folder)
        with one_writer(folder / _LOCK):
            self._write(folder)

    def _write(self, folder: Path) -> None:
        parts = {name: folder / f"{name}.part" for name in ("vectors", "chunks", "index")}
        try:
            faiss.write_index(self._vectors, str(parts["vectors"]))
            with parts["chunks"].open("w", encoding="utf-8") as file:
                file.writelines(_line(number, chunk) for number, chunk in enumerate(self._chunks))
            about = {
                "format": _FORMAT,
                "embedder": self.embedder.identity,
                "dimension": self.embedder.dimension,
                "count": len(self),
                "vectors": _digest(parts["vectors"]),
                "chunks": _digest(parts["chunks"]),
            }
            parts["index"].write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            targets = {**_data_files(folder, about), "index": folder / _ABOUT}
            for part in parts.values():
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
            for name, target in targets.items():  # index.json is the last
                parts[name].replace(target)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and path not in targets.values():
                path.unlink()
        self._about, self._is_changed = about, False

    @classmethod
    def load(cls, folder: str | os.PathLike[str], embedder: EmbedderLike) -> ChunkIndex:
        """Reads an index that `save` wrote.

        Args:
            folder: Where it was saved.
            embedder: The one it was built with, or an equal one.

        Raises:
            FileNotFoundError: if there is no index in the folder.
            ValueError: if it is damaged, of another format, or of another embedder.
        """
        folder = Path(folder)
        while True:
            about = _read_about(folder)
            try:
                return cls._load(folder, about, embedder)
            except (ValueError, FileNotFoundError):
                if _read_about(folder) == about:
                    raise
                # It was replaced while it was read.

    @classmethod
    def _load(cls, folder: Path, about: dict[str, Any], embedder: EmbedderLike) -> ChunkIndex:
        def require(what: str, expected: object, actual: object, remedy: str = _REBUILD) -> None:
            if actual != expected:
                raise ValueError(f"{folder}: {what} must be {expected}, was: {actual}; {remedy}")

        require("the format", _FORMAT, about["format"], "upgrade sac-rag, or build the index again")
        remedy = "load it with the embedder it was built with, or build it again"
        require("the embedder", about.get("embedder"), embedder.identity, remedy)
        require("the dimension", embedder.dimension, about.get("dimension"))
        files = _data_files(folder, about)
        for name, path in files.items():
            digest = _digest(path) if path.is_file() else "missing"
            require(f"the digest of {path.name}", about.get(name), digest)
        index = cls(embedder)
        try:
            index._vectors = faiss.read_index(str(files["vectors"]))
        except RuntimeError as error:
            raise ValueError(f"{folder}: FAISS cannot read its vectors: {error}") from error
        with files["chunks"].open(encoding="utf-8") as lines:
            index._note([Chunk(**json.loads(line)) for line in lines])
        require("the number of vectors", about.get("count"), index._vectors.ntotal)
        require("the number of chunks", about.get("count"), len(index))
        require("the vectors' length", embedder.dimension, index._vectors.d)
        index._about = about
        return index

    def _embed(
        self, texts: list[str], on_progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        vectors = self.embedder.embed(texts, on_progress=on_progress)
        expected = (len(texts), self._vectors.d)
        if vectors.shape != expected or vectors.dtype != np.float32:
            raise ValueError(
                f"the embedder must give float32 vectors of shape {expected}, "
                f"gave: {vectors.dtype} of shape {vectors.shape}"
            )
        return np.ascontiguousarray(vectors)

    def _insert(self, chunks: Sequence[Chunk], vectors: NDArray[np.float32]) -> None:
        self._add_vectors(vectors)
        self._note(chunks)
        self._is_changed = True

    def _note(self, chunks: Sequence[Chunk]) -> None:
        self._chunks += chunks
        for chunk in chunks:
            self._of_text.setdefault(chunk.text, []).append(chunk)

    def _add_vectors(self, vectors: NDArray[np.float32]) -> None:
        count = len(self) + len(vectors)
        if count < self.hnsw_from or isinstance(self._vectors, faiss.IndexHNSWFlat):
            self._vectors.add(vectors)
            return
        graph = faiss.IndexHNSWFlat(
            self.embedder.dimension, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT
        )
        graph.hnsw.efSearch = _BREADTH
        if len(self):
            graph.add(self._vectors.reconstruct_n(0, len(self)))
        graph.add(vectors)
        self._vectors = graph

    def _nearest(self, query: NDArray[np.float32], k: int) -> tuple[list[float], list[int]]:
        scores, rows = self._vectors.search(query, k)
        if (rows < 0).any():
            # The graph does not reach k vectors from here: equal ones link to each other only.
            scores, rows = self._vectors.storage.search(query, k)
        return scores[0].tolist(), rows[0].tolist()


def require_json(chunks: Sequence[Chunk]) -> None:
    """Raises TypeError if the metadata of a chunk is not what JSON can hold."""
    for number, chunk in enumerate(chunks):
        _line(number, chunk)


def _folder_of_its_own(folder: str | os.PathLike[str]) -> Path:
    """The folder of an index, made owner-only (0700); raises ValueError if it holds other files."""
    folder = Path(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    strangers = [
        path.name
        for path in folder.iterdir()
        if not _OURS.fullmatch(path.name) and not path.name.startswith(".")
    ]
    if strangers:
        raise ValueError(
            f"an index must have a folder of its own, {folder} holds: "
            f"{', '.join(sorted(strangers)[:3])}; name a new one"
        )
    folder.chmod(0o700)
    return folder


def _line(number: int, chunk: Chunk) -> str:
    fields = {
        "text": chunk.text,
        "id": chunk.id,
        "title": chunk.title,
        "metadata": dict(chunk.metadata),
        **({} if chunk.ratio is None else {"ratio": chunk.ratio}),
    }
    try:
        return json.dumps(fields) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"metadata must be what JSON can hold, that of chunk {number} (from 0) is not: {error}"
            "; write dates and the like as text"
        ) from error


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"a saved index must hold {_ABOUT}, {folder} does not; build one and save it there"
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder / _ABOUT} must be JSON, but: {error}; {_REBUILD}") from error
    if not isinstance(about, dict) or "format" not in about:
        raise ValueError(f"{folder / _ABOUT} must name its format, was: {about!r:.80}; {_REBUILD}")
    return about


def _data_files(folder: Path, about: dict[str, Any]) -> dict[str, Path]:
    return {
        "vectors": folder / f"vectors-{about.get('vectors')}.faiss",
        "chunks": folder / f"chunks-{about.get('chunks')}.jsonl",
    }


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
