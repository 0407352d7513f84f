"""What the pipeline reports: answers and counts. Knows nothing of how they come about."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sac_rag.chunk import Chunk
from sac_rag.prompts.generate import FinishReason


@dataclass(frozen=True)
class ChunkReport:
    """What became of one chunk of a question.

    Attributes:
        chunk: As it was handed over.
        status: "hit", or why it was not read from the store (see `misses.REASONS`); or "empty" for
            a chunk without text, which was left out.
        read_as: "anchors", "text" (with on_miss="text"), or "nothing" for an empty chunk.
        num_tokens: Source tokens.
        num_anchors: KV entries per layer and KV head that stand for them, their mean, rounded; the
            tokens themselves if read as text.
        nbytes: Bytes of the keys and values that were used of it; 0 if read as text.
        ratio: Source tokens per KV entry; 1 if read as text, 0 if empty.
    """

    chunk: Chunk
    status: str
    read_as: str
    num_tokens: int
    num_anchors: int
    nbytes: int
    ratio: float


@dataclass(frozen=True)
class Usage:
    """Counts of one answer; KV entries are counted per layer and KV head, their mean, rounded.

    Attributes:
        positions_attended: KV entries the first answer token attends to: anchors and plain text.
        plain_tokens: Tokens of plain text in the prompt, chunks read as text among them.
        plain_tokens_reused: Those of them that an earlier call has read: the shared prefix.
        anchors_from_store: Anchors that were cached.
        anchors_computed: Anchors that were computed for this answer.
        source_tokens: Tokens of the text that the anchors stand for.
        kv_bytes: Bytes of the anchors' keys and values as stored, as far as they were used.
        generated_tokens: Tokens of the answer, its end token included.
    """

    positions_attended: int
    plain_tokens: int
    plain_tokens_reused: int
    anchors_from_store: int
    anchors_computed: int
    source_tokens: int
    kv_bytes: int
    generated_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds of one answer; in a batch, of the whole batch.

    Attributes:
        load_s: Reading anchors from the store.
        compress_s: Computing and storing the anchors that were missing.
        relocate_s: Moving anchors to their places and putting the prompt together.
        prefill_s: Reading the plain text, up to the first token of the answer.
        decode_s: The rest of the answer, without the time a stream's consumer took.
    """

    load_s: float
    compress_s: float
    relocate_s: float
    prefill_s: float
    decode_s: float

    @property
    def time_to_first_token_s(self) -> float:
        """What passes before an answer begins."""
        return self.load_s + self.compress_s + self.relocate_s + self.prefill_s


@dataclass(frozen=True)
class Answer:
    """An answer and its account.

    Attributes:
        text: The answer.
        chunks: One report for each chunk handed over, in the same order.
        usage: Counts.
        timings: Seconds.
        finish_reason: "eos", "stop" (a stop text) or "length" (max_new_tokens); None for a stream
            that was left before its end.
    """

    text: str
    chunks: tuple[ChunkReport, ...]
    usage: Usage
    timings: Timings
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class BadRecord:
    """What could not be read or compressed, and was left out.

    Attributes:
        place: Where it is: "path:line", or the document and the part of it.
        problem: What is wrong with it.
    """

    place: str
    problem: str


@dataclass(frozen=True)
class PrecompressReport:
    """What a precompression did; those of its parts add up.

    Attributes:
        computed: Chunks compressed now.
        hits: Chunks whose text was in the store before, at their ratio or a lower one, or came up
            earlier in the same run.
        empty: Chunks without text, left out.
        bad: Chunks that could not be compressed.
        source_tokens: Tokens of the computed chunks.
        tokens_read: Tokens that the encoder read for them, sinks and pads included.
        anchors: Anchors of the computed chunks.
        nbytes: Bytes of their keys and values.
        deleted: Entries of documents' former versions that were deleted.
        workers_lost: Worker processes that died; what they had begun was done again.
        seconds: Wall time.
    """

    computed: int = 0
    hits: int = 0
    empty: int = 0
    bad: tuple[BadRecord, ...] = ()
    source_tokens: int = 0
    tokens_read: int = 0
    anchors: int = 0
    nbytes: int = 0
    deleted: int = 0
    workers_lost: int = 0
    seconds: float = 0.0

    @property
    def chunks(self) -> int:
        """Chunks that were dealt with, in whatever way."""
        return self.computed + self.hits + self.empty + len(self.bad)

    @property
    def padding(self) -> float:
        """Share of what the encoder read that was not source: pads and sinks; 0 for nothing."""
        return max(0.0, 1 - self.source_tokens / self.tokens_read) if self.tokens_read else 0.0

    def __add__(self, other: PrecompressReport) -> PrecompressReport:
        return PrecompressReport(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )
