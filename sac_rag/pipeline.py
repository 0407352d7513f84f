"""SacRAG, from a question and its chunks to an answer. Knows nothing of retrieval or frameworks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from itertools import islice
from typing import Any

import torch

from sac_rag.assemble import Part, assemble, require_room
from sac_rag.cached import CachedCompressor, OnMiss, require_on_miss
from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.compressors import checkpoint
from sac_rag.compressors.full import Full
from sac_rag.errors import PromptTooLong
from sac_rag.generate import Decoding, Generation
from sac_rag.generator import Generator
from sac_rag.kv import AnchorKV
from sac_rag.reports import Answer, ChunkReport, PrecompressReport
from sac_rag.self_check import self_check
from sac_rag.stores.memory import MemoryStore
from sac_rag.stream import AnswerStream, Run
from sac_rag.template import Markup, Message, PromptFormat, opening, render

# Chunks compressed and stored together: an interrupted run repeats at most these.
_WINDOW = 32


class SacRAG:
    """Answers questions from chunks whose KV was computed once and cached.

    Attributes:
        compressor: Turns chunks into anchors, asking its store first.
        format: How question and chunks become a chat.
        on_miss: What to do with a chunk that is not in the store: "compress", read it as "text",
            or "raise" ChunkMiss.
        decoding: Used where a call gives none.
    """

    def __init__(
        self,
        compressor: CachedCompressor,
        *,
        format: PromptFormat | None = None,
        on_miss: OnMiss = "compress",
        decoding: Decoding | None = None,
    ) -> None:
        require_on_miss(on_miss)
        self.compressor = compressor
        self.format = format or PromptFormat()
        self.on_miss: OnMiss = on_miss
        self.decoding = decoding or Decoding()
        self.self_check()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        store: MutableMapping[str, AnchorKV] | None = None,
        compressor: str | os.PathLike[str] = "full",
        ratio: int | None = None,
        namespace: str = "",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> SacRAG:
        """Loads a model and a compressor for it.

        Args:
            model: A default model's name, a local folder or a hub id.
            store: Where anchors are kept. Default: in memory, at most 1 GiB.
            compressor: "full" (every token is kept; needs no training), or the folder of a
                trained compressor.
            ratio: Source tokens per anchor, instead of the compressor's own.
            namespace: Part of every key: one tenant's chunks are no hits for another.
            device: Default: CUDA if there is one, else CPU.
            dtype: What the model computes in. Default: the fastest the device has.
            **options: format, on_miss, decoding: see the class.

        Raises:
            ValueError: for an unknown model or compressor.
            ModelUnavailable: if a default model cannot be fetched.
            UnsupportedModel: if the model's keys cannot be moved.
        """
        generator = Generator.from_pretrained(model, device=device, dtype=dtype)
        if compressor == Full.method:
            if ratio not in (None, 1):
                raise ValueError(
                    f"'full' keeps every token (ratio 1), was asked for ratio {ratio}; "
                    "give the folder of a trained compressor"
                )
            config = Full.default_config(
                sink=opening(generator.tokenizer), stored_dtype=generator.dtype_name
            )
            plain = checkpoint.make(generator, config)
        else:
            changes = {} if ratio is None else {"ratio": ratio}
            plain = checkpoint.load(compressor, generator, **changes)
        kept = MemoryStore() if store is None else store
        return cls(CachedCompressor(plain, kept, namespace=namespace), **options)

    @property
    def generator(self) -> Generator:
        """The frozen LM and its tokenizer."""
        return self.compressor.compressor.generator

    def self_check(self) -> float:
        """Proves on the loaded model that moved chunks read like plain text.

        Done at construction, once for a model, and remembered. Returns the largest relative error;
        raises UnsupportedModel where it is more than rounding.
        """
        return self_check(self.generator)

    def precompress(
        self,
        chunks: Iterable[ChunkLike],
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> PrecompressReport:
        """Compresses and stores chunks ahead of any question.

        What is in the store already is not computed again, so an interrupted run is resumed by
        running it again.

        Args:
            chunks: Texts, (document id, text) pairs or Chunks; streamed, never all in memory.
            on_progress: Called with the number of chunks done since the last call.

        Raises:
            PromptTooLong: for a chunk longer than the model's context; those before it are stored.
            OSError: if the store cannot be written.
        """
        started = time.perf_counter()
        computed = hits = empty = tokens = anchors = nbytes = 0
        stream = map(Chunk.of, chunks)
        while window := list(islice(stream, _WINDOW)):
            todo = []
            for chunk in window:
                if chunk.is_empty:
                    empty += 1
                elif chunk.text in self.compressor and (
                    chunk.id is None or self.compressor.claim(chunk.text, chunk.id)
                ):
                    hits += 1
                else:
                    todo.append(chunk)
            texts, owners = [chunk.text for chunk in todo], [chunk.id for chunk in todo]
            failures = self.compressor.store_failures
            try:
                fetched = self.compressor.fetch(texts, documents=owners)
            except PromptTooLong:
                # Nothing of this window is stored yet: store what stands before the one too long.
                for text, owner in zip(texts, owners, strict=True):
                    self.compressor.fetch([text], documents=[owner])
                raise
            if self.compressor.store_failures > failures:
                raise OSError(
                    "the store could not keep the compressed chunks (see the log); "
                    "free some space or check the folder's permissions, then run it again"
                )
            distinct = dict(zip(texts, fetched.kvs, strict=True))
            hits += len(texts) - len(distinct)
            for kv in distinct.values():
                if kv is not None:
                    computed += 1
                    tokens += kv.num_tokens
                    anchors += kv.num_anchors
                    nbytes += kv.nbytes
            if on_progress is not None:
                on_progress(len(window))
        return PrecompressReport(
            computed, hits, empty, tokens, anchors, nbytes, time.perf_counter() - started
        )

    def answer(
        self, question: str, chunks: Sequence[ChunkLike], decoding: Decoding | None = None
    ) -> Answer:
        """Answers a question from chunks.

        Raises:
            ValueError: if the question is empty.
            PromptTooLong: if question, chunks and answer pass the model's last position.
            ChunkMiss: with on_miss="raise", if a chunk is not in the store.
        """
        return self.batch([(question, chunks)], decoding)[0]

    def stream(
        self, question: str, chunks: Sequence[ChunkLike], decoding: Decoding | None = None
    ) -> AnswerStream:
        """Answers a question piece by piece; leaving the loop ends the work.

        The joined pieces are what `answer` would give. Raises as `answer` does, at once.
        """
        return self.stream_chat(self._ask(question, chunks), decoding)

    def batch(
        self,
        questions: Sequence[tuple[str, Sequence[ChunkLike]]],
        decoding: Decoding | None = None,
    ) -> list[Answer]:
        """Answers several questions in one padded batch, each from chunks of its own."""
        return self.chat([self._ask(question, chunks) for question, chunks in questions], decoding)

    def chat(
        self, conversations: Sequence[Sequence[Message]], decoding: Decoding | None = None
    ) -> list[Answer]:
        """Writes the assistant's next turn of each conversation, chunks anywhere in them."""
        if not conversations:
            return []
        run = self._start(conversations, decoding or self.decoding)
        for _ in run.steps():
            pass
        return run.answers()

    def stream_chat(
        self, conversation: Sequence[Message], decoding: Decoding | None = None
    ) -> AnswerStream:
        """Writes the assistant's next turn piece by piece."""
        return AnswerStream(self._start([conversation], decoding or self.decoding))

    def prompt_ids(self, question: str, chunks: Sequence[ChunkLike]) -> list[int]:
        """Token ids of the same prompt with every chunk as text: what a plain LM would read."""
        pieces = render(self.generator.tokenizer, self._ask(question, chunks))
        return [
            token
            for piece in pieces
            for token in self._tokenize(piece.text if isinstance(piece, Chunk) else piece)
        ]

    def _tokenize(self, piece: Markup | str) -> list[int]:
        if isinstance(piece, Markup):
            return self.generator.tokenize(piece.text, special=True)
        return self.generator.tokenize(piece)

    def _ask(self, question: str, chunks: Sequence[ChunkLike]) -> list[Message]:
        if isinstance(chunks, str):
            raise TypeError("chunks must be a sequence of chunks, was: one str; put it in a list")
        return self.format.messages(question, [Chunk.of(chunk) for chunk in chunks])

    def _start(self, conversations: Sequence[Sequence[Message]], decoding: Decoding) -> Run:
        started = time.perf_counter()
        generator = self.generator
        rows = [render(generator.tokenizer, messages) for messages in conversations]
        # Text becomes token ids, chunks stay as they are until their KV is there.
        plain = [
            [piece if isinstance(piece, Chunk) else self._tokenize(piece) for piece in row]
            for row in rows
        ]
        chunks = [[p for p in row if isinstance(p, Chunk) and not p.is_empty] for row in plain]

        def accept(lengths: list[int]) -> None:
            of_chunk = iter(lengths)
            for number, row in enumerate(plain):
                text = sum(len(p) for p in row if not isinstance(p, Chunk))
                inside = sum(islice(of_chunk, len(chunks[number])))
                require_room(number, text + inside, decoding.max_new_tokens, generator)

        flat = [chunk for row in chunks for chunk in row]
        prepare_s = time.perf_counter() - started
        fetched = self.compressor.fetch(
            [chunk.text for chunk in flat],
            on_miss=self.on_miss,
            documents=[chunk.id for chunk in flat],
            accept=accept,
        )
        started = time.perf_counter()
        results = zip(fetched.kvs, fetched.misses, strict=True)
        parts: list[list[Part]] = []
        reports: list[list[ChunkReport]] = []
        for row in plain:
            parts.append([])
            reports.append([])
            for piece in row:
                if not isinstance(piece, Chunk):
                    parts[-1].append(piece)
                elif piece.is_empty:
                    reports[-1].append(ChunkReport(piece, "empty", "nothing", 0, 0, 0))
                else:
                    kv, miss = next(results)
                    part = kv if kv is not None else generator.tokenize(piece.text)
                    parts[-1].append(part)
                    reports[-1].append(_report(piece, part, miss))
        prompt = assemble(
            parts,
            generator,
            cue=self.compressor.compressor.cue,
            reserve=decoding.max_new_tokens,
        )
        return Run(
            generation=Generation(generator, prompt, decoding),
            prompt=prompt,
            reports=reports,
            load_s=fetched.load_s,
            compress_s=fetched.compress_s,
            relocate_s=prepare_s + time.perf_counter() - started,
        )


def _report(chunk: Chunk, part: Part, miss: str | None) -> ChunkReport:
    status = miss or "hit"
    if isinstance(part, AnchorKV):
        return ChunkReport(chunk, status, "anchors", part.num_tokens, part.num_anchors, part.nbytes)
    return ChunkReport(chunk, status, "text", len(part), len(part), 0)
