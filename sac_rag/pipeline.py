"""SacRAG, from a question and its chunks to an answer. Knows nothing of retrieval or frameworks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from sac_rag.assemble import Part, assemble, require_room
from sac_rag.cached import CachedCompressor, OnMiss, require_on_miss
from sac_rag.chunk import Chunk, ChunkLike
from sac_rag.compressors import checkpoint
from sac_rag.compressors.full import Full
from sac_rag.generate import Decoding, Generation
from sac_rag.generator import Generator
from sac_rag.kv import AnchorKV
from sac_rag.precompress import precompress
from sac_rag.prefix import Prefixes
from sac_rag.reports import Answer, ChunkReport, PrecompressReport
from sac_rag.self_check import self_check
from sac_rag.stores.memory import MemoryStore
from sac_rag.stream import AnswerStream, Run
from sac_rag.template import Markup, Message, Piece, PromptFormat, before_first_turn, render


class SacRAG:
    """Answers questions from chunks whose KV was computed once and cached.

    Attributes:
        compressor: Turns chunks into anchors, asking its store first.
        format: How question and chunks become a prompt; its stop texts end answers to questions,
            not turns of a chat.
        on_miss: What to do with a chunk that is not in the store: "compress", read it as "text",
            or "raise" ChunkMiss.
        decoding: Used where a call gives none.
        prefixes: KV of what prompts begin with, read once and kept in memory.
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
        self.prefixes = Prefixes(self.generator)
        self.self_check()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        store: MutableMapping[str, AnchorKV] | None = None,
        compressor: str | os.PathLike[str] | None = None,
        ratio: int | None = None,
        format: PromptFormat | None = None,
        namespace: str = "",
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
            format: How question and chunks become a prompt. Default: the format that the
                compressor was trained for, if it was for one.
            namespace: Part of every key: one tenant's chunks are no hits for another.
            device: Default: CUDA if there is one, else CPU.
            dtype: What the model computes in. Default: the fastest the device has.
            **options: on_miss, decoding: see the class.

        Raises:
            ValueError: for an unknown model or compressor.
            ModelUnavailable: if a default model cannot be fetched.
            UnsupportedModel: if the model's keys cannot be moved.
        """
        folder = checkpoint.find(
            checkpoint.default(model) if compressor is None else compressor, model
        )
        generator = Generator.from_pretrained(model, device=device, dtype=dtype)
        if folder is None:
            if ratio not in (None, 1):
                raise ValueError(
                    f"'full' keeps every token (ratio 1), was asked for ratio {ratio}; "
                    "give the folder of a trained compressor"
                )
            format = format or PromptFormat()
            config = Full.default_config(
                sink=format.opening(generator.tokenizer), stored_dtype=generator.dtype_name
            )
            plain = checkpoint.make(generator, config)
        else:
            changes = {} if ratio is None else {"ratio": ratio}
            plain = checkpoint.load(folder, generator, **changes)
            format = format or checkpoint.load_format(folder)
        kept = MemoryStore() if store is None else store
        return cls(CachedCompressor(plain, kept, namespace=namespace), format=format, **options)

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
        return precompress(self.compressor, chunks, on_progress)

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
        return AnswerStream(self._start([(question, chunks)], decoding))

    def batch(
        self,
        questions: Sequence[tuple[str, Sequence[ChunkLike]]],
        decoding: Decoding | None = None,
    ) -> list[Answer]:
        """Answers several questions in one padded batch, each from chunks of its own."""
        if not questions:
            return []
        return _finished(self._start(questions, decoding))

    def chat(
        self, conversations: Sequence[Sequence[Message]], decoding: Decoding | None = None
    ) -> list[Answer]:
        """Writes the assistant's next turn of each conversation, chunks anywhere in them."""
        if not conversations:
            return []
        return _finished(self._start_chat(conversations, decoding))

    def stream_chat(
        self, conversation: Sequence[Message], decoding: Decoding | None = None
    ) -> AnswerStream:
        """Writes the assistant's next turn piece by piece."""
        return AnswerStream(self._start_chat([conversation], decoding))

    def prompt_ids(self, question: str, chunks: Sequence[ChunkLike]) -> list[int]:
        """Token ids of the same prompt with every chunk as text: what a plain LM would read."""
        ids: list[int] = []
        for piece in self._ask(question, chunks):
            ids += self._chunk_ids(piece) if isinstance(piece, Chunk) else self._tokenize(piece)
        return ids

    def beginning_ids(self) -> list[int]:
        """Token ids that prompts of this format begin with, whatever is asked: the shared prefix.

        A prompt may leave them at its last few, where text of its own is tokenized together with
        them.
        """
        return self._ids(self.format.beginning(self.generator.tokenizer))

    def _chunk_ids(self, chunk: Chunk) -> list[int]:
        """A chunk as text: the very tokens that are compressed."""
        return [] if chunk.is_empty else self.compressor.compressor.tokenize(chunk.text)

    def _ids(self, pieces: Iterable[Markup | str]) -> list[int]:
        return [token for piece in pieces for token in self._tokenize(piece)]

    def _tokenize(self, piece: Markup | str) -> list[int]:
        if isinstance(piece, Markup):
            return self.generator.tokenize(piece.text, special=True)
        return self.generator.tokenize(piece)

    def _ask(self, question: str, chunks: Sequence[ChunkLike]) -> list[Piece]:
        if isinstance(chunks, str):
            raise TypeError("chunks must be a sequence of chunks, was: one str; put it in a list")
        given = [Chunk.of(chunk) for chunk in chunks]
        return self.format.pieces(self.generator.tokenizer, question, given)

    def _start(
        self, questions: Sequence[tuple[str, Sequence[ChunkLike]]], decoding: Decoding | None
    ) -> Run:
        started = time.perf_counter()
        decoding = decoding or self.decoding
        stop = tuple(dict.fromkeys((*decoding.stop, *self.format.stop)))
        rows = [self._ask(question, chunks) for question, chunks in questions]
        beginning = self.beginning_ids()
        return self._run(rows, beginning, replace(decoding, stop=stop), started)

    def _start_chat(
        self, conversations: Sequence[Sequence[Message]], decoding: Decoding | None
    ) -> Run:
        started = time.perf_counter()
        tokenizer = self.generator.tokenizer
        rows = [render(tokenizer, messages) for messages in conversations]
        beginning = self._ids(before_first_turn(tokenizer, conversations[0]))
        return self._run(rows, beginning, decoding or self.decoding, started)

    def _run(
        self,
        rows: Sequence[Sequence[Piece]],
        beginning: list[int],
        decoding: Decoding,
        started: float,
    ) -> Run:
        """Prepares one prompt for each row of pieces.

        Args:
            rows: Prompts in reading order.
            beginning: Token ids that they are likely to begin with.
            decoding: How to answer.
            started: When the work on this call began, on the clock of `time.perf_counter`.
        """
        generator = self.generator
        first_position = self.compressor.compressor.config.first_position
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
                positions = first_position + text + inside
                require_room(number, positions, decoding.max_new_tokens, generator)

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
                    part = kv if kv is not None else self._chunk_ids(piece)
                    parts[-1].append(part)
                    reports[-1].append(_report(piece, part, miss))
        for number, row_parts in enumerate(parts):
            # Before the prefix is read: what does not fit must not cost a forward pass.
            positions = sum(p.num_tokens if isinstance(p, AnchorKV) else len(p) for p in row_parts)
            require_room(number, first_position + positions, decoding.max_new_tokens, generator)
        prepare_s += time.perf_counter() - started
        started = time.perf_counter()
        split = self.prefixes.split(beginning, parts)
        prefix_s = time.perf_counter() - started
        started = time.perf_counter()
        prompt = assemble(
            split.rows,
            generator,
            prefix=split.prefix,
            cue=self.compressor.compressor.cue,
            reserve=decoding.max_new_tokens,
            first_position=first_position,
        )
        return Run(
            generation=Generation(generator, prompt, decoding),
            prompt=prompt,
            reports=reports,
            prefix_tokens=split.prefix.num_tokens if split.prefix is not None else 0,
            prefix_reused=split.reused,
            load_s=fetched.load_s,
            compress_s=fetched.compress_s,
            relocate_s=prepare_s + time.perf_counter() - started,
            prefix_s=prefix_s,
        )


def _finished(run: Run) -> list[Answer]:
    for _ in run.steps():
        pass
    return run.answers()


def _report(chunk: Chunk, part: Part, miss: str | None) -> ChunkReport:
    status = miss or "hit"
    if isinstance(part, AnchorKV):
        return ChunkReport(chunk, status, "anchors", part.num_tokens, part.num_anchors, part.nbytes)
    return ChunkReport(chunk, status, "text", len(part), len(part), 0)
