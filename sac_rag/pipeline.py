"""SacRAG: answers questions and continues prompts with chunks that were compressed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from concurrent.futures import Future
from inspect import signature
from typing import Any

import torch

from sac_rag.answering import Answerer, AnswerStream, Request, Run, token_ids
from sac_rag.archive import Archive, Exported, export
from sac_rag.cached import CachedCompressor, OnMiss, require_on_miss
from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.compressors.config import StoredDtype
from sac_rag.gathering import Gatherer, OnText
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
from sac_rag.telemetry import Meter, Metrics


class SacRAG:
    """Answers questions from chunks whose KV was computed once and cached.

    Attributes:
        compressor: Compresses chunks that its store does not have.
        prompt_format: How question and chunks become a prompt. If the Decoding has no stop texts,
            those of the format end answers to its prompts, but not turns of a chat or other
            completions.
        on_miss: What to do with a chunk that is not in the store: "compress", read it as "text",
            or "raise" ChunkMissError.
        decoding: Default of all calls.
        prefixes: KV of the beginnings of prompts, read once and kept in memory.
        gatherer: Answers what is submitted, several prompts at a time.
        repeat_question: Whether a prompt with its question before the chunks repeats it behind
            them, for a trained compressor (see `prompts.chat.repeat_question`).
    """

    def __init__(
        self,
        compressor: CachedCompressor,
        *,
        prompt_format: PromptFormat | None = None,
        on_miss: OnMiss = "compress",
        decoding: Decoding | None = None,
        repeat_question: bool = True,
    ) -> None:
        require_on_miss(on_miss)
        if on_miss == "compress" and not compressor.computes:
            raise ValueError(
                "on_miss must be 'text' or 'raise' where no compressor is loaded, was: 'compress'"
            )
        self.compressor = compressor
        self.prompt_format = prompt_format or PromptFormat()
        self.on_miss: OnMiss = on_miss
        self.decoding = decoding or Decoding()
        self.repeat_question = repeat_question
        self.prefixes = Prefixes(self.generator)
        self._meter = Meter(compressor.store.evictions)
        self.gatherer = Gatherer(self.generator)
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
        attn_implementation: str | None = None,
        revision: str | None = None,
        compressor_revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> SacRAG:
        """Loads a model and a compressor for it.

        Args:
            model: A default model's name, a local folder or a hub id.
            store: Store of the anchors. Default: in memory, at most 1 GiB.
            compressor: "shipped" (trained for this default model, comes with the package), "full"
                (every token is kept; needs no training), or the folder or hub id of a trained
                compressor. Default: "shipped" if there is one for this model, else "full".
            ratio: Source tokens per anchor. Default: the compressor's.
            prompt_format: How question and chunks become a prompt. Default: the format that the
                compressor was trained for, if it has one.
            namespace: The secret of every key: one tenant's chunks are no hits for another.
            stored_dtype: Dtype of stored keys and values. Default: the compressor's.
            guard: Whether a stored chunk may be computed again if that is faster than loading.
            device: Default: CUDA if there is one, else CPU.
            dtype: Dtype that the model computes in. Default: the fastest one of the device.
            attn_implementation: "sdpa" or "eager". Default: as transformers chooses.
            revision: Branch, tag or commit of a model on the Hub. Default: "main".
            compressor_revision: The same of a compressor on the Hub.
            token: Access token of the Hub. Default: that of `hf auth login` or HF_TOKEN.
            cache_dir: Folder of downloads. Default: that of huggingface_hub.
            model_kwargs: Further arguments of `Generator.from_pretrained`, such as device_map.
            **options: on_miss, decoding, repeat_question: see the class.

        Raises:
            ValueError: for an unknown model or compressor.
            ModelUnavailableError: if a default model cannot be downloaded.
            UnsupportedModelError: if the model's keys cannot be moved.
        """
        signature(cls).bind_partial(**options)  # refuses unknown names before anything is loaded
        loaded, prompt_format = load_compressor(
            model,
            compressor,
            ratio=ratio,
            stored_dtype=stored_dtype,
            prompt_format=prompt_format,
            compressor_revision=compressor_revision,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            **(model_kwargs or {}),
        )
        store = MemoryStore() if store is None else store
        cached = CachedCompressor(loaded, store, namespace=namespace, guard=guard)
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
        model_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> SacRAG:
        """Answers from precompressed chunks without their compressor: no LoRA is in memory.

        Args:
            archive: A file written by `export`.
            model: The model that the chunks were compressed for. It is loaded in the same dtype.
            store: The store that the archive was imported into. Default: the archive itself.
            prompt_format: Default: the format that the chunks were made for, if it is known.
            on_miss: "text" or "raise": chunks that are not in the store cannot be compressed.
            namespace: The namespace that they were compressed in.
            ratio: Source tokens per anchor. Default: that of the exported compressor; another one
                is possible for learned anchors only.
            device: Default: CUDA if there is one, else CPU.
            model_kwargs: Further arguments of `Generator.from_pretrained`, such as revision.
            **options: decoding, repeat_question: see the class.

        Raises:
            ValueError: if the file is no archive, if the model is another one, naming what differs,
                or for a ratio that the chunks do not have.
            ModelUnavailableError: if a default model cannot be downloaded.
        """
        signature(cls).bind_partial(**options)  # refuses unknown names before anything is loaded
        opened = Archive(archive)
        stored = load_stored(model, opened.origin, device, **(model_kwargs or {}))
        if ratio not in (None, stored.config.ratio):
            stored = stored.at_ratio(ratio)
        store = opened if store is None else store
        cached = CachedCompressor(stored, store, namespace=namespace, guard=False)
        prompt_format = prompt_format or opened.origin.prompt_format
        return cls(cached, prompt_format=prompt_format, on_miss=on_miss, **options)

    @property
    def generator(self) -> Generator:
        """The frozen LM and its tokenizer."""
        return self.compressor.generator

    def __copy__(self) -> SacRAG:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> SacRAG:
        """The same pipeline: copies of what holds it share the model and the store."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Raises a TypeError that says what to pickle in its place."""
        raise TypeError(
            "a SacRAG holds a loaded model and cannot be pickled; send the names that it was "
            "loaded from, and load it there, as in SacRAG.from_pretrained(model, store=store)"
        )

    def self_check(self) -> float:
        """Tests on the loaded model that moved chunks give the logits of plain text.

        Called at construction; the result is recorded, so that it runs once per model. Returns the
        largest relative error.

        Raises:
            UnsupportedModelError: if the error is more than rounding.
        """
        return self_check(self.generator, ragged=self.compressor.config.budget != "uniform")

    def precompress(
        self,
        chunks: Iterable[ChunkLike],
        *,
        on_progress: Callable[[int], None] | None = None,
        on_bad: Callable[[BadRecord], None] | None = None,
        whole_documents: bool = False,
    ) -> PrecompressReport:
        """Compresses and stores chunks ahead of any question.

        Chunks that are in the store are not computed again: repeating it resumes it.

        Args:
            chunks: Texts, (document id, text) pairs or Chunks; streamed, never all in memory.
            on_progress: Called with the number of chunks processed since the last call.
            on_bad: Called with each chunk that is longer than the model's context and skipped.
                Default: raise.
            whole_documents: Whether `chunks` has all chunks of each document in it: entries of a
                former version of the document are deleted when all chunks are stored.

        Raises:
            PromptTooLongError: for a chunk longer than the model's context; those before it are
                stored.
            OSError: if the store cannot be written.
        """
        return precompress(
            self.compressor,
            chunks,
            on_progress=on_progress,
            on_bad=on_bad,
            whole_documents=whole_documents,
        )

    def prefetch(self, chunks: Sequence[ChunkLike]) -> None:
        """Starts reading stored chunks that will soon be asked about, and returns at once.

        Nothing is computed. What an answer says does not depend on it, only how long it waits:
        see `prefetch` of the store.
        """
        store, key = self.compressor.store, self.compressor.key
        store.prefetch([key(chunk.text) for chunk in _listed(chunks)])

    def forget(self, document_id: str) -> int:
        """Deletes the entries that only this document uses; returns their number.

        Raises:
            TypeError: if the store does not record documents.
            OSError: if the store cannot be changed.
        """
        return self.compressor.forget(document_id)

    def export(self, archive: str | os.PathLike[str], *, decrypt: bool = False) -> Exported:
        """Writes this compressor's entries of a DiskStore into one file; see `archive.export`.

        Args:
            archive: A file that does not exist.
            decrypt: Must be True for an encrypted store, because an archive is not encrypted.
        """
        origin = Origin.of(self.compressor.inner, self.prompt_format)
        return export(self.compressor.store, archive, origin, decrypt=decrypt)

    def metrics(self) -> Metrics:
        """Counts and times of all answers of this pipeline."""
        self._meter.evicted(self.compressor.store.evictions)
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
            question: The question.
            chunks: Texts, (document id, text) pairs or Chunks.
            decoding: How to answer. Default: the pipeline's.
            ratio: Source tokens per KV entry of chunks without a ratio. Default: the compressor's.
                A store of learned anchors serves every ratio from the one that it was filled at;
                other compressors have a single ratio.

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
        """Answers a question piece by piece; leaving the loop ends the generation.

        The joined pieces are the text of `answer`. Raises as `answer` does, before the first piece.
        """
        return AnswerStream(self._start([(question, chunks)], decoding, ratio))

    def batch(
        self,
        questions: Sequence[tuple[str, Sequence[ChunkLike]]],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> list[Answer]:
        """Answers several questions in one padded batch, each from its chunks; see `answer`."""
        return self._start(questions, decoding, ratio).finish() if questions else []

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> list[Answer]:
        """Generates the next turn of conversations with chunks anywhere in them; see `answer`."""
        return self._start_chat(conversations, decoding, ratio).finish() if conversations else []

    def stream_chat(
        self,
        conversation: Sequence[Message],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> AnswerStream:
        """Generates the assistant's next turn piece by piece."""
        return AnswerStream(self._start_chat([conversation], decoding, ratio))

    def complete(
        self,
        prompts: Sequence[Sequence[str | Chunk]],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> list[Answer]:
        """Continues plain prompts, with chunks anywhere except at the end.

        Only the tokenizer's BOS is added: no chat template, no text of `prompt_format`. The stop
        texts of `prompt_format` apply to prompts of this format (`prompt_format.matches`). For
        decoding and ratio see `answer`.

        Raises:
            ValueError: if a prompt does not end in text.
        """
        return self._start_plain(prompts, decoding, ratio).finish() if prompts else []

    def stream_complete(
        self,
        prompt: Sequence[str | Chunk],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> AnswerStream:
        """Continues a plain prompt piece by piece."""
        return AnswerStream(self._start_plain([prompt], decoding, ratio))

    def submit(
        self,
        question: str,
        chunks: Sequence[ChunkLike],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
        on_text: OnText | None = None,
    ) -> Future[Answer]:
        """As `answer`, generated together with what others submit meanwhile.

        `on_text` is called with each piece of the text in the thread that generates, and must not
        wait. The future can be cancelled until it has the answer or error, which ends its work.
        """
        asked, used = (question, chunks), decoding or self.decoding
        return self.gatherer.submit(self._start, asked, used, ratio, on_text)

    def submit_chat(
        self,
        conversation: Sequence[Message],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
        on_text: OnText | None = None,
    ) -> Future[Answer]:
        """As `chat` for one conversation; see `submit`."""
        used = decoding or self.decoding
        return self.gatherer.submit(self._start_chat, conversation, used, ratio, on_text)

    def submit_complete(
        self,
        prompt: Sequence[str | Chunk],
        decoding: Decoding | None = None,
        *,
        ratio: int | None = None,
    ) -> Future[Answer]:
        """As `complete` for one prompt; see `submit`."""
        return self.gatherer.submit(self._start_plain, prompt, decoding or self.decoding, ratio)

    def prompt_ids(self, question: str, chunks: Sequence[ChunkLike]) -> list[int]:
        """Token ids of the prompt with every chunk as text: what a plain LM would read."""
        return token_ids(self._ask(question, chunks), self.compressor)

    def beginning_ids(self) -> list[int]:
        """Token ids that all prompts of this format begin with: the shared prefix.

        A prompt may differ in the last few, where its text is tokenized together with the prefix.
        """
        return token_ids(self.prompt_format.beginning(self.generator.tokenizer), self.compressor)

    def _ask(self, question: str, chunks: Sequence[ChunkLike]) -> list[Piece]:
        return self.prompt_format.pieces(self.generator.tokenizer, question, _listed(chunks))

    def _start(
        self,
        questions: Sequence[tuple[str, Sequence[ChunkLike]]],
        decoding: Decoding | None,
        ratio: int | None,
    ) -> Run:
        def prepare() -> tuple[list[Request], list[int]]:
            stop = self.prompt_format.stop
            return [Request(self._ask(*asked), stop) for asked in questions], self.beginning_ids()

        return self._run(prepare, decoding, ratio)

    def _start_chat(
        self,
        conversations: Sequence[Sequence[Message]],
        decoding: Decoding | None,
        ratio: int | None,
    ) -> Run:
        def prepare() -> tuple[list[Request], list[int]]:
            tokenizer = self.generator.tokenizer
            requests = [Request(render(tokenizer, messages)) for messages in conversations]
            prefix = before_first_turn(tokenizer, conversations[0])
            return requests, token_ids(prefix, self.compressor)

        return self._run(prepare, decoding, ratio)

    def _start_plain(
        self, prompts: Sequence[Sequence[str | Chunk]], decoding: Decoding | None, ratio: int | None
    ) -> Run:
        if any(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("a prompt must be a sequence of texts and chunks, was: one str")

        def prepare() -> tuple[list[Request], list[int]]:
            format = self.prompt_format
            pieces = [plain(self.generator.tokenizer, prompt) for prompt in prompts]
            stops = [format.stop if format.matches(prompt) else () for prompt in prompts]
            return list(map(Request, pieces, stops)), self.beginning_ids()

        return self._run(prepare, decoding, ratio)

    def _run(
        self,
        prepare: Callable[[], tuple[list[Request], list[int]]],
        decoding: Decoding | None,
        ratio: int | None,
    ) -> Run:
        """Starts prompts, which are prepared with the ids that they are likely to begin with."""
        # Made for each call: the settings may have been changed since the last one.
        answerer = Answerer(
            self.compressor, self.on_miss, self.prefixes, self._meter, self.repeat_question
        )
        with answerer.call() as trace:
            requests, prefix_ids = prepare()
            return answerer.start(
                requests, prefix_ids, decoding or self.decoding, ratio=ratio, trace=trace
            )


def _listed(chunks: Sequence[ChunkLike]) -> list[Chunk]:
    if isinstance(chunks, str):
        raise TypeError("chunks must be a sequence of chunks, was: one str; put it in a list")
    return [Chunk.of(chunk) for chunk in chunks]
