"""The demo: five questions answered from Wikipedia leads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from sac_rag import default_models as models
from sac_rag.benchmarks.first_token import full_text_seconds
from sac_rag.chunk import Chunk
from sac_rag.collection import Collection, in_reading_order
from sac_rag.prompts.generate import Decoding

LEADS = "wikipedia-leads"

QUESTIONS = (
    "Which two elements did Marie Curie discover?",
    "When did the Titanic sink?",
    "Which bacterium caused the Black Death?",
    "Who commanded Apollo 11?",
    "When did the construction of the Berlin Wall begin?",
)

# 2,243 of the 10,033 leads; embedding all of them takes five times as long at the first run.
# The best-known articles are those without a topic.
_TOPICS = ("Uncategorized", "History", "Technology")


@dataclass(frozen=True)
class CitedChunk:
    """A chunk that an answer was generated from, as it is cited.

    Attributes:
        number: From 1, the best.
        title: Title of the article.
        score: Cosine similarity of question and chunk.
        status: "hit", or why it was not in the store.
    """

    number: int
    title: str
    score: float
    status: str


@dataclass(frozen=True)
class DemoResult:
    """One question of the demo, answered from cached anchors.

    Attributes:
        question: What was asked.
        answer: The generated answer.
        sources: The chunks in the prompt, best first.
        hits: How many of them were in the store before this run.
        source_tokens: Tokens of the chunks.
        kv_entries: Anchors in their place.
        kv_bytes: Bytes of the anchors.
        ttft_s: Seconds to the first token from cached anchors.
        ttft_full_text_s: Seconds to the first token of HF `generate`, which reads the chunks as
            text.
    """

    question: str
    answer: str
    sources: tuple[CitedChunk, ...]
    hits: int
    source_tokens: int
    kv_entries: int
    kv_bytes: int
    ttft_s: float
    ttft_full_text_s: float

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values."""
        return asdict(self)


def wikipedia_leads(topics: Sequence[str] | None = None) -> list[Chunk]:
    """Lead sections of English Wikipedia articles, CC BY-SA 4.0, downloaded once.

    Args:
        topics: Only articles with these topics. Default: all 10,033 articles.

    Raises:
        ModelUnavailableError: if they cannot be downloaded.
        TypeError: if `topics` is one str.
    """
    if isinstance(topics, str):
        raise TypeError(f"topics must be several topics, was: {topics!r}; put it in a list")
    path = models.pull(LEADS) / "summaries_en-us.json"
    articles = json.loads(path.read_text(encoding="utf-8"))
    return [
        Chunk(text=article["extract"], id=title, title=title)
        for title, article in sorted(articles.items())
        if topics is None or article["topic"] in topics
    ]


def index_leads(collection: Collection, on_progress: Callable[[int], None] | None = None) -> int:
    """Makes the demo's leads searchable; returns the number of new ones."""
    return collection.add(collection.split(wikipedia_leads(_TOPICS)), on_progress)


def ask_questions(
    collection: Collection,
    *,
    k: int = 4,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[DemoResult]:
    """Precompresses the chunks retrieved for the questions, then answers from the store.

    Args:
        collection: A collection with the leads.
        k: Number of chunks per question.
        on_progress: Called with the number of chunks precompressed since the last call.

    Yields:
        One result per question.
    """
    rag = collection.rag
    retrieved = {question: collection.search(question, k) for question in QUESTIONS}
    stored = {
        hit.chunk.text
        for hits in retrieved.values()
        for hit in hits
        if hit.chunk.text in rag.compressor
    }
    rag.precompress(
        (hit.chunk for hits in retrieved.values() for hit in hits), on_progress=on_progress
    )
    # The first pass of a process also sets up the kernels, which belongs to neither measurement.
    rag.answer("Are you there?", [], Decoding(max_new_tokens=1))
    for question, hits in retrieved.items():
        chunks = in_reading_order(hits)
        answer = rag.answer(question, chunks)
        yield DemoResult(
            question=question,
            answer=answer.text,
            sources=tuple(
                CitedChunk(number, hit.chunk.title or "", hit.score, report.status)
                for number, (hit, report) in enumerate(
                    zip(hits, reversed(answer.chunks), strict=True), 1
                )
            ),
            hits=sum(chunk.text in stored for chunk in chunks),
            source_tokens=answer.usage.source_tokens,
            kv_entries=answer.usage.anchors_from_store + answer.usage.anchors_computed,
            kv_bytes=answer.usage.kv_bytes,
            ttft_s=answer.timings.time_to_first_token_s,
            ttft_full_text_s=full_text_seconds(rag, question, chunks),
        )
