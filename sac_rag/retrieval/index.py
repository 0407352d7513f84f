"""ChunkIndex, FAISS over embeddings of chunks: the default retriever."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from sac_rag.chunk import Chunk, ChunkLike

_FORMAT = 1
_ABOUT = "index.json"
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
    """A chunk that a search returns.

    Attributes:
        chunk: The chunk as it was added.
        score: Cosine between its embedding and the question's, from -1 to 1.
    """

    chunk: Chunk
    score: float


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
        self._vectors: Any = faiss.IndexFlatIP(embedder.dimension)

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
            TypeError: if one is no chunk, or `chunks` is one str.
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
        if not new:
            return
        texts = [f"{chunk.title}\n{chunk.text}" if chunk.title else chunk.text for chunk in new]
        self._insert(self._embed(texts, on_progress))
        self._chunks += new

    def discard(self, unwanted: Callable[[Chunk], bool]) -> int:
        """Removes chunks; returns how many."""
        rows = [row for row, chunk in enumerate(self._chunks) if not unwanted(chunk)]
        removed = len(self) - len(rows)
        if removed:
            vectors = self._vectors.reconstruct_n(0, len(self))[rows]
            # Vectors cannot be removed from the graph.
            self._vectors = faiss.IndexFlatIP(self.embedder.dimension)
            chunks, self._chunks = self._chunks, []
            self._insert(vectors)
            self._chunks = [chunks[row] for row in rows]
        return removed

    def search(self, question: str, k: int = 4) -> list[Hit]:
        """The k chunks nearest to a question, best first; all if there are fewer.

        Raises:
            ValueError: for an empty question or k below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, was: {k}")
        if not question.strip():
            raise ValueError(f"a question must have some text, was: {question!r}")
        k = min(k, len(self))
        if k == 0:
            return []
        scores, rows = self._nearest(self._embed([question]), k)
        return [Hit(self._chunks[row], score) for row, score in zip(rows, scores, strict=True)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index into an owner-only (0700) folder.

        Vectors and chunks go into files named by their digest, beside those of an older index, and
        replacing index.json, which names them, is the step that counts: a crash before it leaves
        the old index, one after it the new. One process may save to a folder at a time.

        Args:
            folder: New, empty, or an index that is replaced.

        Raises:
            ValueError: if the folder holds anything else.
            TypeError: if a chunk's metadata is not what JSON can hold.
        """
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
        about = _read_about(folder)

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
            index._chunks = [Chunk(**json.loads(line)) for line in lines]
        require("the number of vectors", about.get("count"), index._vectors.ntotal)
        require("the number of chunks", about.get("count"), len(index))
        require("the vectors' length", embedder.dimension, index._vectors.d)
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

    def _insert(self, vectors: NDArray[np.float32]) -> None:
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
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"metadata must be what JSON can hold, that of chunk {number} (from 0) is not: {error}"
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
