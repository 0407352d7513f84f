"""Results of the pipeline: answers with their counts and times, and reports of precompression."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from sac_rag.chunk import Chunk

if TYPE_CHECKING:
    from sac_rag.prompts.generate import FinishReason


@dataclass(frozen=True)
class ChunkReport:
    """How one chunk of a question was read.

    Attributes:
        chunk: The caller's chunk.
        status: "hit", or why it was not read from the store (see `errors.REASONS`); or "empty" for
            a chunk without text, which was left out.
        read_as: "anchors", "text" (with on_miss="text"), or "nothing" for an empty chunk.
        num_tokens: Source tokens.
        num_anchors: KV entries that stand for them, as the rounded mean per layer and KV head; the
            number of tokens if read as text.
        nbytes: Bytes of the keys and values that were used; 0 if read as text.
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
    """Counts of one answer; KV entries are counted as their rounded mean per layer and KV head.

    Attributes:
        positions_attended: KV entries the first answer token attends to: anchors and plain text.
        plain_tokens: Tokens of plain text in the prompt, including chunks read as text.
        plain_tokens_reused: Those of the shared prefix that an earlier call has read.
        anchors_from_store: Anchors that were cached.
        anchors_computed: Anchors that were computed for this answer.
        source_tokens: Tokens of the text that the anchors stand for.
        kv_bytes: Bytes of the anchors' keys and values, as stored, that were used.
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
        relocate_s: Tokenizing text, moving anchors to their places and assembling the prompt.
        prefill_s: Reading the plain text, up to the first token of the answer.
        decode_s: The rest of the answer, without the time of a stream's consumer.
    """

    load_s: float
    compress_s: float
    relocate_s: float
    prefill_s: float
    decode_s: float

    @property
    def time_to_first_token_s(self) -> float:
        """Seconds from the question to the first token of the answer."""
        return self.load_s + self.compress_s + self.relocate_s + self.prefill_s


@dataclass(frozen=True)
class Answer:
    """An answer and its account.

    Attributes:
        text: The answer.
        chunks: One report per chunk of the question, in the same order.
        usage: Counts.
        timings: Seconds.
        finish_reason: "eos", "stop" (a stop text) or "length" (max_new_tokens); None for a stream
            that has not ended.
    """

    text: str
    chunks: tuple[ChunkReport, ...]
    usage: Usage
    timings: Timings
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class BadRecord:
    """A document or chunk that could not be read or compressed and was skipped.

    Attributes:
        place: "path:line", or the document and its part.
        problem: What is wrong with it.
    """

    place: str
    problem: str


@dataclass(frozen=True)
class PrecompressReport:
    """Counts of a precompression, or of a part of one; reports of parts can be added.

    Attributes:
        computed: Chunks compressed in this run.
        hits: Chunks whose text was in the store at their ratio or a lower one, or came earlier in
            the same run.
        empty: Chunks without text, which were skipped.
        bad: Chunks that could not be compressed.
        source_tokens: Tokens of the computed chunks.
        tokens_read: Tokens that the encoder read for them, sinks and pads included.
        anchors: Anchors of the computed chunks.
        nbytes: Bytes of their keys and values.
        deleted: Entries of former versions of the documents that were deleted.
        workers_lost: Worker processes that died; their unfinished chunks were computed again.
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
        """Chunks that were processed or skipped."""
        return self.computed + self.hits + self.empty + len(self.bad)

    @property
    def padding(self) -> float:
        """Share of pads and sinks in the tokens that the encoder read; 0 if it read none."""
        return max(0.0, 1 - self.source_tokens / self.tokens_read) if self.tokens_read else 0.0

    def __add__(self, other: PrecompressReport) -> PrecompressReport:
        return PrecompressReport(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )
