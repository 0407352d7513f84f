"""SacRAG, from a question and its chunks to an answer. Knows nothing of retrieval or frameworks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch

from sac_rag.answering import AnswerStream, Run, evictions, prepare, token_ids
from sac_rag.archive import Archive, Exported, export
from sac_rag.cached import CachedCompressor, OnMiss, require_on_miss
from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.compressors.config import StoredDtype
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.loading import load_compressor, load_stored
from sac_rag.origin import Origin
from sac_rag.precompress.job import precompress
from sac_rag.prefix_cache import Prefixes
from sac_rag.prompts.chat import Message, Piece, before_first_turn, plain, render
from sac_rag.prompts.format import PromptFormat
from sac_rag.prompts.generate import Decoding
from sac_rag.reports import Answer, BadRecord, PrecompressReport
from sac_rag.self_check import self_check
from sac_rag.stores.memory import MemoryStore
from sac_rag.telemetry import Meter, Metrics, Trace


class SacRAG:
    """Answers questions from chunks whose KV was computed once and cached.

    Attributes:
        compressor: Turns chunks into anchors, asking its store first.
        prompt_format: How question and chunks become a prompt. Its stop texts end answers to its
            own prompts, not turns of a chat or other completions, where the Decoding has none.
        on_miss: What to do with a chunk that is not in the store: "compress", read it as "text",
            or "raise" ChunkMissError.
        decoding: Used where a call gives none.
        prefixes: KV of what prompts begin with, read once and kept in memory.
    """

    def __init__(
        self,
        compressor: CachedCompressor,
        *,
        prompt_format: PromptFormat | None = None,
        on_miss: OnMiss = "compress",
        decoding: Decoding | None = None,
    ) -> None:
        require_on_miss(on_miss)
        if on_miss == "compress" and not compressor.compressor.computes:
            raise ValueError(
                "on_miss must be 'text' or 'raise' where the compressor is not there to compress, "
                "was: 'compress'"
            )
        self.compressor = compressor
        self.prompt_format = prompt_format or PromptFormat()
        self.on_miss: OnMiss = on_miss
        self.decoding = decoding or Decoding()
        self.prefixes = Prefixes(self.generator)
        self._meter = Meter(evictions(compressor))
        self.self_check()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        store: MutableMapping[str, AnchorKV] | None = None,
        compressor: str | os.PathLike[str] | None = None,
        ratio: int | None = None,
        prompt_format: PromptFormat | None = None,
        namespace: str = "",
        stored_dtype: StoredDtype | None = None,
        guard: bool = True,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> SacRAG:
        """Loads a model and a compressor for it.

        Args:
            model: A default model's name, a local folder or a hub id.
            store: Where anchors are kept. Default: in memory, at most 1 GiB.
            compressor: "shipped" (trained for this default model, comes with the package), "full"
                (every token is kept; needs no training), or the folder of a trained compressor.
                Default: "shipped" if there is one for this model, else "full".
            ratio: Source tokens per anchor, instead of the compressor's own; any is possible.
            prompt_format: How question and chunks become a prompt. Default: the format that the
                compressor was trained for, if it was for one.
            namespace: The secret of every key: one tenant's chunks are no hits for another.
            stored_dtype: What keys and values are kept in, instead of the compressor's own.
            guard: Whether a stored chunk may be computed anew where that is faster than loading.
            device: Default: CUDA if there is one, else CPU.
            dtype: What the model computes in. Default: the fastest the device has.
            **options: on_miss, decoding: see the class.

        Raises:
            ValueError: for an unknown model or compressor.
            ModelUnavailableError: if a default model cannot be fetched.
            UnsupportedModelError: if the model's keys cannot be moved.
        """
        plain, prompt_format = load_compressor(
            model,
            compressor,
            ratio=ratio,
            stored_dtype=stored_dtype,
            prompt_format=prompt_format,
            device=device,
            dtype=dtype,
        )
        kept = MemoryStore() if store is None else store
        cached = CachedCompressor(plain, kept, namespace=namespace, guard=guard)
        return cls(cached, prompt_format=prompt_format, **options)

    @classmethod
    def from_archive(
        cls,
        archive: str | os.PathLike[str],
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        store: MutableMapping[str, AnchorKV] | None = None,
        prompt_format: PromptFormat | None = None,
        namespace: str = "",
        ratio: int | None = None,
        device: str | torch.device | None = None,
        on_miss: OnMiss = "text",
        **options: Any,
    ) -> SacRAG:
        """Answers from precompressed chunks without their compressor: no LoRA is in memory.

        Args:
            archive: What `export` wrote.
            model: The one that the chunks were compressed for. It is loaded in the same dtype.
            store: Where the archive was imported to. Default: the archive itself.
            prompt_format: Default: the format that the chunks were made for, if it is known.
            on_miss: "text" or "raise": what is not in the store cannot be compressed.
            namespace: The one that they were compressed in.
            ratio: Source tokens per anchor, instead of that of the compressor that was exported;
                another one is possible for learned anchors only.
            device: Default: CUDA if there is one, else CPU.
            **options: decoding: see the class.

        Raises:
            ValueError: if the file is no archive, the model is another one, naming what differs, or
                there is no such ratio.
            ModelUnavailableError: if a default model cannot be fetched.
        """
        opened = Archive(archive)
        stored = load_stored(model, opened.origin, device)
        if ratio not in (None, stored.config.ratio):
            stored = stored.at_ratio(ratio)
        kept = opened if store is None else store
        cached = CachedCompressor(stored, kept, namespace=namespace, guard=False)
        return cls(
            cached,
            prompt_format=prompt_format or opened.origin.prompt_format,
            on_miss=on_miss,
            **options,
        )

    @property
    def generator(self) -> Generator:
        """The frozen LM and its tokenizer."""
        return self.compressor.compressor.generator

    def self_check(self) -> float:
        """Proves on the loaded model that moved chunks read like plain text.

        Done at construction, once for a model, and remembered. Returns the largest relative error;
        raises UnsupportedModelError where it is more than rounding.
        """
        budget = self.compressor.compressor.config.budget
        return self_check(self.generator, ragged=budget != "uniform")

    def precompress(
        self,
        chunks: Iterable[ChunkLike],
        *,
        on_progress: Callable[[int], None] | None = None,
        on_bad: Callable[[BadRecord], None] | None = None,
        whole_documents: bool = False,
    ) -> PrecompressReport:
        """Compresses and stores chunks ahead of any question.

        What is in the store already is not computed again, so an interrupted run is resumed by
        running it again.

        Args:
            chunks: Texts, (document id, text) pairs or Chunks; streamed, never all in memory.
            on_progress: Called with the number of chunks done since the last call.
            on_bad: Called with each chunk that is longer than the model's context, which is then
                left out. Default: raise.
            whole_documents: Whether the chunks of a document here are all there is of it: what the
                store has of its former version is deleted when all chunks are stored.

        Raises:
            PromptTooLongError: for a chunk longer than the model's context; others are stored.
            OSError: if the store cannot be written.
        """
        return precompress(
            self.compressor,
            chunks,
            on_progress=on_progress,
            on_bad=on_bad,
            whole_documents=whole_documents,
        )

    def forget(self, document_id: str) -> int:
        """Deletes what was stored for a document; texts that other documents have too stay.

        Returns:
            How many entries were deleted.

        Raises:
            TypeError: if the store does not remember documents.
            OSError: if the store cannot be changed.
        """
        return self.compressor.forget(document_id)

    def export(self, archive: str | os.PathLike[str], *, decrypt: bool = False) -> Exported:
        """Writes what this compressor has in its DiskStore into one file, for `from_archive`.

        Args:
            archive: A file that is not there yet.
            decrypt: Must be said for an encrypted store: an archive is not encrypted.

        Raises as `export.export` does.
        """
        origin = Origin.of(self.compressor.compressor, self.prompt_format)
        return export(self.compressor.store, archive, origin, decrypt=decrypt)

    def metrics(self) -> Metrics:
        """What this pipeline's answers came to since it was made, in numbers."""
        self._meter.evicted(evictions(self.compressor))
        return self._meter.snapshot()

    def answer(
        self,
        question: str,
        chunks: Sequence[ChunkLike],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> Answer:
        """Answers a question from chunks.

        Args:
            question: What to answer.
            chunks: Texts, (document id, text) pairs or Chunks.
            decoding: How to answer. Default: the pipeline's.
            ratio: Source tokens per KV entry of chunks that have no ratio of their own. Default:
                the compressor's. One store of learned anchors serves every ratio from the one it
                was filled at; others have a single ratio.

        Raises:
            ValueError: if the question is empty, or the compressor has no such ratio.
            PromptTooLongError: if question, chunks and answer pass the model's last position.
            ChunkMissError: with on_miss="raise", if a chunk is not in the store.
        """
        return self.batch([(question, chunks)], decoding, ratio=ratio)[0]

    def stream(
        self,
        question: str,
        chunks: Sequence[ChunkLike],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> AnswerStream:
        """Answers a question piece by piece; leaving the loop ends the work.

        The joined pieces are what `answer` would give. Raises as `answer` does, at once.
        """
        return AnswerStream(self._start([(question, chunks)], decoding, ratio))

    def batch(
        self,
        questions: Sequence[tuple[str, Sequence[ChunkLike]]],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> list[Answer]:
        """Answers several questions in one padded batch, each from chunks of its own.

        For decoding and ratio see `answer`.
        """
        if not questions:
            return []
        return _finished(self._start(questions, decoding, ratio))

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> list[Answer]:
        """Writes the assistant's next turn of each conversation, chunks anywhere in them.

        For decoding and ratio see `answer`.
        """
        if not conversations:
            return []
        return _finished(self._start_chat(conversations, decoding, ratio))

    def stream_chat(
        self,
        conversation: Sequence[Message],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> AnswerStream:
        """Writes the assistant's next turn piece by piece."""
        return AnswerStream(self._start_chat([conversation], decoding, ratio))

    def complete(
        self,
        prompts: Sequence[Sequence[str | Chunk]],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> list[Answer]:
        """Goes on with each plain prompt, chunks anywhere in it but at its end.

        Nothing is added but the tokenizer's BOS: no chat template, no words of `prompt_format`,
        whose stop texts count where the prompt is one of its own (`prompt_format.matches`). For
        decoding and ratio see `answer`.

        Raises:
            ValueError: if a prompt does not end in text.
        """
        if not prompts:
            return []
        return _finished(self._start_plain(prompts, decoding, ratio))

    def stream_complete(
        self,
        prompt: Sequence[str | Chunk],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> AnswerStream:
        """Goes on with a plain prompt piece by piece."""
        return AnswerStream(self._start_plain([prompt], decoding, ratio))

    def prompt_ids(self, question: str, chunks: Sequence[ChunkLike]) -> list[int]:
        """Token ids of the same prompt with every chunk as text: what a plain LM would read."""
        return token_ids(self._ask(question, chunks), self.compressor)

    def beginning_ids(self) -> list[int]:
        """Token ids that prompts of this format begin with, whatever is asked: the shared prefix.

        A prompt may leave them at its last few, where text of its own is tokenized together with
        them.
        """
        return token_ids(self.prompt_format.beginning(self.generator.tokenizer), self.compressor)

    def _ask(self, question: str, chunks: Sequence[ChunkLike]) -> list[Piece]:
        if isinstance(chunks, str):
            raise TypeError("chunks must be a sequence of chunks, was: one str; put it in a list")
        given = [Chunk.of(chunk) for chunk in chunks]
        return self.prompt_format.pieces(self.generator.tokenizer, question, given)

    def _start(
        self,
        questions: Sequence[tuple[str, Sequence[ChunkLike]]],
        decoding: Decoding | None,
        ratio: int | None,
    ) -> Run:
        return self._run(
            lambda: [self._ask(question, chunks) for question, chunks in questions],
            self.beginning_ids,
            [self.prompt_format.stop] * len(questions),
            decoding,
            ratio,
        )

    def _start_chat(
        self,
        conversations: Sequence[Sequence[Message]],
        decoding: Decoding | None,
        ratio: int | None,
    ) -> Run:
        tokenizer, first = self.generator.tokenizer, conversations[0]
        return self._run(
            lambda: [render(tokenizer, messages) for messages in conversations],
            lambda: token_ids(before_first_turn(tokenizer, first), self.compressor),
            [()] * len(conversations),
            decoding,
            ratio,
        )

    def _start_plain(
        self,
        prompts: Sequence[Sequence[str | Chunk]],
        decoding: Decoding | None,
        ratio: int | None,
    ) -> Run:
        for prompt in prompts:
            if isinstance(prompt, str):
                raise TypeError("a prompt must be a sequence of texts and chunks, was: one str")
        return self._run(
            lambda: [plain(self.generator.tokenizer, prompt) for prompt in prompts],
            self.beginning_ids,
            [
                self.prompt_format.stop if self.prompt_format.matches(prompt) else ()
                for prompt in prompts
            ],
            decoding,
            ratio,
        )

    def _run(
        self,
        rows: Callable[[], list[list[Piece]]],
        beginning: Callable[[], list[int]],
        stops: Sequence[Sequence[str]],
        decoding: Decoding | None,
        ratio: int | None,
    ) -> Run:
        trace = Trace("answer")  # the run ends it, or what is raised before there is one
        try:
            return prepare(
                rows(),
                beginning(),
                decoding or self.decoding,
                stops=stops,
                ratio=ratio,
                compressor=self.compressor,
                on_miss=self.on_miss,
                prefixes=self.prefixes,
                meter=self._meter,
                trace=trace,
            )
        except Exception as error:
            self._meter.add(failed=1)
            trace.end({}, {}, type(error).__name__)
            raise


def _finished(run: Run) -> list[Answer]:
    for _ in run.steps():
        pass
    return run.answers()
