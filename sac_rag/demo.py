"""The demo: five questions answered from Wikipedia leads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sac_rag import default_models as models
from sac_rag.benchmarks.contestants import LlamaCpp, from_text_behind_prefix, why_no_llama_cpp
from sac_rag.chunk import Chunk
from sac_rag.collection import Collection, in_reading_order
from sac_rag.prompts.generate import Decoding
from sac_rag.retrieval.index import Hit

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
_PASSAGE_CHARACTERS = 1800  # about 340 tokens, which is what splitters cut
_HITS_PER_PASSAGE = 4  # leads searched for, since several may be of one passage


@dataclass(frozen=True)
class CitedChunk:
    """A chunk that an answer was generated from, as it is cited.

    Attributes:
        number: From 1, the best.
        title: Title of the article, or titles.
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
        answer_s: Seconds to the end of the answer.
        answer_tokens: Tokens of the answer.
        ttft_full_text_s: Seconds to the first token of HF `generate`, which reads the chunks as
            text.
        answer_full_text_s: Its seconds to as many tokens as our answer has.
        ttft_llama_cpp_s: Seconds to the first token of llama.cpp, which reads the chunks as text;
            None if it was not measured.
        answer_llama_cpp_s: Its seconds to as many tokens as our answer has.
    """

    question: str
    answer: str
    sources: tuple[CitedChunk, ...]
    hits: int
    source_tokens: int
    kv_entries: int
    kv_bytes: int
    ttft_s: float
    answer_s: float
    answer_tokens: int
    ttft_full_text_s: float
    answer_full_text_s: float
    ttft_llama_cpp_s: float | None = None
    answer_llama_cpp_s: float | None = None

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


def open_llama(gguf: Path) -> LlamaCpp:
    """llama.cpp with as many positions as the demo's longest prompt needs.

    Raises:
        ValueError: if it cannot run here.
    """
    if reason := why_no_llama_cpp(gguf):
        raise ValueError(f"llama.cpp cannot answer: {reason}")
    return LlamaCpp(gguf, positions=8192, threads=torch.get_num_threads())


def pack_leads() -> dict[str, Chunk]:
    """The passage that each of the demo's leads is in, by the lead's title.

    A passage is several leads of one topic, next to one another in the order of their titles.
    """
    passages: dict[str, Chunk] = {}
    for topic in _TOPICS:
        for leads in _packed(wikipedia_leads([topic])):
            titles = [lead.title or "" for lead in leads]
            text = "\n\n".join(lead.text for lead in leads)
            passage = Chunk(text=text, id=titles[0], title=", ".join(titles))
            passages |= dict.fromkeys(titles, passage)
    return passages


def _packed(leads: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    packed: list[Chunk] = []
    for lead in leads:
        if packed and sum(len(one.text) for one in [*packed, lead]) > _PASSAGE_CHARACTERS:
            yield packed
            packed = []
        packed.append(lead)
    if packed:
        yield packed


def ask_questions(
    collection: Collection,
    *,
    k: int = 8,
    passages: Mapping[str, Chunk] | None = None,
    llama: LlamaCpp | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[DemoResult]:
    """Precompresses the chunks retrieved for the questions, then answers from the store.

    Args:
        collection: A collection with the leads.
        k: Number of chunks per question.
        passages: See `pack_leads`: the passages around the leads that are found. Default: the
            leads themselves.
        llama: The same model in llama.cpp, to be timed too.
        on_progress: Called with the number of chunks precompressed since the last call.

    Yields:
        One result per question.
    """
    rag = collection.rag
    retrieved = {question: _search(collection, question, k, passages) for question in QUESTIONS}
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
        tokens = answer.usage.generated_tokens
        text = from_text_behind_prefix(rag, question, chunks, tokens)
        theirs = llama.cold(rag.prompt_ids(question, chunks), tokens) if llama else [None]
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
            answer_s=answer.timings.time_to_first_token_s + answer.timings.decode_s,
            answer_tokens=tokens,
            ttft_full_text_s=text[0],
            answer_full_text_s=text[-1],
            ttft_llama_cpp_s=theirs[0],
            answer_llama_cpp_s=theirs[-1],
        )


def _search(
    collection: Collection, question: str, k: int, passages: Mapping[str, Chunk] | None
) -> list[Hit]:
    """The best k chunks, or passages around them, each once and with its best lead's score."""
    if passages is None:
        return collection.search(question, k)
    best: dict[str, Hit] = {}
    for hit in collection.search(question, k * _HITS_PER_PASSAGE):
        passage = passages.get(hit.chunk.title or "", hit.chunk)
        best.setdefault(passage.text, replace(hit, chunk=passage))
    return list(best.values())[:k]
