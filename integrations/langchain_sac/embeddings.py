"""SACEmbeddings: sac_rag's embedder as embeddings of LangChain."""

from __future__ import annotations

from langchain_core.embeddings import Embeddings

from sac_rag import Embedder


class SACEmbeddings(Embeddings):
    """Vectors of texts from sac_rag's Embedder; any other embeddings do as well.

    Example:
        >>> embeddings = SACEmbeddings.from_pretrained("minilm")
        >>> len(embeddings.embed_query("Who kept the light?")) == embeddings.embedder.dimension
        True

    Attributes:
        embedder: Computes the vectors; they have length 1.
    """

    def __init__(self, embedder: Embedder) -> None:
        if not isinstance(embedder, Embedder):
            raise TypeError(
                f"expected an Embedder, got a {type(embedder).__name__}; to load one by name, use "
                "SACEmbeddings.from_pretrained"
            )
        self.embedder = embedder

    @classmethod
    def from_pretrained(cls, model: str = "minilm", device: str | None = None) -> SACEmbeddings:
        """Loads an embedder by name, from a local folder or by hub id.

        Raises as `Embedder.from_pretrained` does.
        """
        return cls(Embedder.from_pretrained(model, device))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text.

        Raises:
            TypeError: for one str in place of several.
        """
        vectors: list[list[float]] = self.embedder.embed(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        return self.embed_documents([text])[0]
