"""Peers that keep the sentences of a text that are closest to the question."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

from sac_rag.chunk import Chunk
from sac_rag.evaluation.peers.base import TextPeer, with_text
from sac_rag.evaluation.questions import normalised
from sac_rag.pipeline import SacRAG
from sac_rag.retrieval.embedder import Embedder
from sac_rag.retrieval.splitter import sentences


class BM25Sentences(TextPeer):
    """Sentences with the most of the question's words, as many as fit, in the text's order."""

    name: ClassVar[str] = "bm25-sentences"
    title: ClassVar[str] = "BM25 sentences"
    does: ClassVar[str] = "keeps the sentences that share rare words with the question"
    package: ClassVar[str | None] = "bm25s"
    modules: ClassVar[dict[str, str]] = {"bm25s": "bm25s"}

    def shorten(
        self, question: str, chunks: Sequence[Chunk], budgets: Sequence[int]
    ) -> list[Chunk]:
        """The best sentences of all chunks that fit into the budgets' sum."""
        pieces = [(number, text) for number, c in enumerate(chunks) for text in sentences(c.text)]
        order = _by_bm25(question, [text for _, text in pieces])
        chosen: set[int] = set()
        for piece in order:
            shorter = _joined(chunks, [pieces[n] for n in sorted({*chosen, piece})])
            if sum(self.count(chunk.text) for chunk in shorter) <= sum(budgets):
                chosen.add(piece)
        # Where no sentence fits, the beginning of the best one is read.
        return _joined(chunks, [pieces[n] for n in sorted(chosen or {order[0]})])


class EmbeddedSentences(TextPeer):
    """A peer that compares embeddings of sentences with that of the question.

    Attributes:
        embedder: Loaded when it is first needed.
    """

    models: ClassVar[tuple[str, ...]] = ("minilm",)

    def __init__(self, rag: SacRAG, ratio: int, embedder: Embedder | None = None) -> None:
        super().__init__(rag, ratio)
        if embedder is not None:
            self.embedder = embedder
        self._vectors: dict[str, list[float]] = {}

    @cached_property
    def embedder(self) -> Embedder:
        """The project's own embedder."""
        return Embedder.from_pretrained()

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Vectors of texts; one that was embedded before is not embedded again."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._vectors]:
            self._vectors |= dict(zip(new, self.embedder.embed(new).tolist(), strict=True))
        return [self._vectors[text] for text in texts]

    def most(self, count: int, budget: int, keep: Callable[[int], list[Chunk]]) -> list[Chunk]:
        """The result for the largest number of sentences that is within a budget.

        Args:
            count: Number of sentences there are.
            budget: Tokens that the result may have.
            keep: The package's result for a number of sentences.

        Returns:
            That of one sentence if even that is above the budget.
        """
        for number in range(count, 1, -1):
            chunks = keep(number)
            if sum(self.count(chunk.text) for chunk in chunks) <= budget:
                return chunks
        return keep(1)


class LlamaIndexOptimizer(EmbeddedSentences):
    """LlamaIndex's SentenceEmbeddingOptimizer, which shortens each chunk by itself."""

    name: ClassVar[str] = "llama-index-optimizer"
    title: ClassVar[str] = "SentenceEmbeddingOptimizer (LlamaIndex)"
    does: ClassVar[str] = "keeps the sentences closest to the question, the closest first"
    package: ClassVar[str | None] = "llama-index-core"
    modules: ClassVar[dict[str, str]] = {"llama_index.core": "llama-index-core"}

    def shorten(
        self, question: str, chunks: Sequence[Chunk], budgets: Sequence[int]
    ) -> list[Chunk]:
        """The best sentences of each chunk, as many as fit into its budget."""
        shorter = []
        for chunk, budget in zip(chunks, budgets, strict=True):
            if not (count := len(sentences(chunk.text))):
                continue

            def keep(number: int, chunk: Chunk = chunk, count: int = count) -> list[Chunk]:
                return [with_text(chunk, self._optimized(question, chunk.text, number / count))]

            shorter += self.within(self.most(count, budget, keep), budget)
        return shorter

    def _optimized(self, question: str, text: str, share: float) -> str:
        from llama_index.core.postprocessor import SentenceEmbeddingOptimizer
        from llama_index.core.schema import NodeWithScore, TextNode

        optimizer = SentenceEmbeddingOptimizer(
            embed_model=self._embed_model,
            # It rounds the number of sentences down.
            percentile_cutoff=share + 1e-6,
            tokenizer_fn=sentences,
            context_before=0,
            context_after=0,
        )
        (node,) = optimizer.postprocess_nodes(
            [NodeWithScore(node=TextNode(text=text))], query_str=question
        )
        optimized: str = node.node.get_content()
        return optimized

    @cached_property
    def _embed_model(self) -> Any:
        from llama_index.core.embeddings import BaseEmbedding

        embed = self.embed

        class Vectors(BaseEmbedding):
            """The peer's embedder as LlamaIndex calls it."""

            def _get_text_embedding(self, text: str) -> list[float]:
                return embed([text])[0]

            def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
                return embed(texts)

            def _get_query_embedding(self, query: str) -> list[float]:
                return embed([query])[0]

            async def _aget_query_embedding(self, query: str) -> list[float]:
                return embed([query])[0]

        return Vectors(model_name="sac_rag")


class LangChainFilter(EmbeddedSentences):
    """LangChain's EmbeddingsFilter over the sentences of all chunks."""

    name: ClassVar[str] = "langchain-filter"
    title: ClassVar[str] = "EmbeddingsFilter (LangChain)"
    does: ClassVar[str] = "keeps the sentences of all chunks closest to the question"
    package: ClassVar[str | None] = "langchain-classic"
    modules: ClassVar[dict[str, str]] = {
        "langchain_classic": "langchain-classic",
        "langchain_community": "langchain-community",
    }

    def shorten(
        self, question: str, chunks: Sequence[Chunk], budgets: Sequence[int]
    ) -> list[Chunk]:
        """The best sentences of all chunks, as many as fit into the budgets' sum."""
        pieces = [(number, text) for number, c in enumerate(chunks) for text in sentences(c.text)]

        def keep(number: int) -> list[Chunk]:
            # Sentences back in the text's order: the filter returns the closest first.
            return _joined(
                chunks, [pieces[n] for n in sorted(self._closest(question, pieces, number))]
            )

        return self.most(len(pieces), sum(budgets), keep)

    def _closest(self, question: str, pieces: Sequence[tuple[int, str]], number: int) -> list[int]:
        from langchain_classic.retrievers.document_compressors import EmbeddingsFilter
        from langchain_core.documents import Document

        documents = [
            Document(page_content=text, metadata={"piece": n}) for n, (_, text) in enumerate(pieces)
        ]
        chosen = EmbeddingsFilter(embeddings=self._embeddings, k=number).compress_documents(
            documents, question
        )
        return [document.metadata["piece"] for document in chosen]

    @cached_property
    def _embeddings(self) -> Any:
        from langchain_core.embeddings import Embeddings

        embed = self.embed

        class Vectors(Embeddings):
            """The peer's embedder as LangChain calls it."""

            def embed_documents(self, texts: list[str]) -> list[list[float]]:
                return embed(texts)

            def embed_query(self, text: str) -> list[float]:
                return embed([text])[0]

        return Vectors()


def _by_bm25(question: str, texts: Sequence[str]) -> list[int]:
    """Indices of texts, the closest to the question first; equal ones in order."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s sets DEBUG, with a handler
    index = bm25s.BM25()
    index.index([normalised(text).split() or [""] for text in texts], show_progress=False)
    known = [word for word in normalised(question).split() if word in index.vocab_dict]
    scores = index.get_scores(known).tolist() if known else [0.0] * len(texts)
    return sorted(range(len(texts)), key=lambda n: -scores[n])


def _joined(chunks: Sequence[Chunk], pieces: Sequence[tuple[int, str]]) -> list[Chunk]:
    """Chunks of pieces, each with the number of its chunk; chunks without a piece are left out."""
    return [
        with_text(chunk, " ".join(text for n, text in pieces if n == number))
        for number, chunk in enumerate(chunks)
        if any(n == number for n, _ in pieces)
    ]
