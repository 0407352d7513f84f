"""Service: requests to prompts of the pipeline, each in its namespace."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.collection import Collection, in_reading_order, read_settings
from sac_rag.errors import PromptTooLongError
from sac_rag.gathering import OnText
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.chat import Message, joined, render
from sac_rag.prompts.generate import Decoding
from sac_rag.reports import Answer
from sac_rag.retrieval.index import ChunkIndex
from sac_rag.server.limits import Limits
from sac_rag.server.refusals import RefusalError
from sac_rag.server.schemas import ChatRequest

DEFAULT_MODEL = "smollm2-135m"  # of an archive

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """One prompt, ready to be answered: a question about chunks, or a chat.

    Attributes:
        rag: The pipeline of its namespace.
        chunks: Chunks of the question; those of a chat are in its messages.
        messages: The chat; empty for a question.
        question: The question; "" for a chat.
        decoding: How to answer.
        ratio: Source tokens per KV entry. Default: the compressor's.
    """

    rag: SacRAG
    chunks: Sequence[Chunk]
    messages: Sequence[Message]
    question: str
    decoding: Decoding
    ratio: int | None

    def submit(self, on_text: OnText | None = None) -> Future[Answer]:
        """The answer, generated together with others; see `SacRAG.submit`."""
        options: Any = {"ratio": self.ratio, "on_text": on_text}
        if self.question:
            return self.rag.submit(self.question, self.chunks, self.decoding, **options)
        return self.rag.submit_chat(self.messages, self.decoding, **options)


class Service:
    """What is served: a model, its store, and the documents of a collection.

    Attributes:
        name: The model's name in requests.
        rag: The pipeline of the namespace that the documents were compressed in.
        pipelines: By namespace, all over one model and one store.

    Args:
        rag: See above.
        name: See above.
        namespaces: Namespaces that requests may come in.
        index: The collection's chunks; None for an archive, which has no texts.
        limits: Limits of requests.
    """

    def __init__(
        self,
        rag: SacRAG,
        name: str,
        *,
        namespaces: Iterable[str] = (),
        index: ChunkIndex | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.rag = rag
        self.name = name
        self.pipelines = {space: _in_namespace(rag, space) for space in {"", *namespaces}}
        self._index = index
        self._limits = limits or Limits()
        self._documents: dict[str, list[Chunk]] = defaultdict(list)
        for chunk in index.chunks if index is not None else ():
            if chunk.id is not None:
                self._documents[chunk.id].append(chunk)

    @classmethod
    def open(cls, place: Path, model: str | None = None, **options: Any) -> Service:
        """What is served of a collection's folder, or of an archive with a model.

        Args:
            place: The folder or the archive.
            model: The archive's model. Default: smollm2-135m, or the collection's.
            **options: namespaces, limits: see the class.

        Raises:
            ValueError: if there is neither, or for another model than the collection's.
        """
        if place.is_file():
            # The name only: a folder's place is nobody else's business.
            name = Path(model or DEFAULT_MODEL).name
            return cls(SacRAG.from_archive(place, model or DEFAULT_MODEL), name, **options)
        if not Collection.exists(place):
            raise ValueError(
                f"{place} is no collection yet; make one: sac-rag precompress PATH --store {place}"
            )
        saved = read_settings(place).model
        if model not in (None, saved):
            raise ValueError(f"the model of {place} is {saved}, was asked for: {model}")
        collection = Collection(place)
        return cls(collection.rag, Path(saved).name, index=collection.index, **options)

    def close(self) -> None:
        """Closes the store."""
        self.rag.compressor.store.close()

    def prepare(self, request: ChatRequest, namespace: str) -> Asked:
        """The prompt of a request.

        Raises:
            RefusalError: if the request cannot be answered, or is over a limit.
        """
        rag = self.pipelines[namespace]
        self._require_model(request.model)
        try:
            rag.compressor.ratio_for(request.ratio)
        except ValueError as error:
            raise RefusalError(400, str(error), param="ratio") from None
        question = request.messages[-1].text
        chunks = self._chunks(request, question, namespace)
        messages = [
            Message("system" if turn.role == "developer" else turn.role, (turn.text,))
            for turn in request.messages
        ]
        is_question = bool(chunks) and len(messages) == 1
        if is_question:
            messages = []
        else:
            if chunks:
                passages = rag.prompt_format.passages(chunks)
                messages[-1] = Message("user", joined((*passages, "\n\n", question)))
            _require_turns(rag, messages)
        rag.prefetch(chunks)  # while the request waits for its turn
        return Asked(
            rag=rag,
            chunks=chunks,
            messages=messages,
            question=question if is_question else "",
            decoding=self._decoding(request),
            ratio=request.ratio,
        )

    def _require_model(self, name: str) -> None:
        if name != self.name:
            raise RefusalError(
                404,
                f"the model must be {self.name}, the only one here; GET /v1/models lists it",
                code="model_not_found",
                param="model",
            )

    def _chunks(self, request: ChatRequest, question: str, namespace: str) -> list[Chunk]:
        limits = self._limits
        if request.retrieve is not None:
            index = self._searchable(namespace, "retrieve")
            if request.retrieve > limits.documents:
                raise _too_many("retrieve", request.retrieve, limits)
            if not len(index):
                raise RefusalError(400, "the collection has no chunks yet", param="retrieve")
            return in_reading_order(index.search(question, request.retrieve))
        chunks: list[Chunk] = []
        if len(request.documents or ()) > limits.documents:
            raise _too_many("documents", len(request.documents or ()), limits)
        for number, document in enumerate(request.documents or ()):
            if isinstance(document, str):
                self._searchable(namespace, "ids of documents")
                if document not in self._documents:
                    raise RefusalError(
                        400,
                        f"document {number} (from 0) is not in the collection; send its text as "
                        '{"id": …, "text": …}',
                        code="document_not_found",
                        param=f"documents.{number}",
                    )
                chunks += self._documents[document]
                continue
            if (size := len(document.text.encode())) > limits.document_bytes:
                raise RefusalError(
                    413,
                    f"a document must have at most {limits.document_bytes} bytes, document "
                    f"{number} (from 0) has {size}; send the passages that matter",
                    code="document_too_long",
                    param=f"documents.{number}",
                )
            chunks.append(Chunk(document.text, id=document.id, title=document.title))
        if len(chunks) > limits.documents:
            raise _too_many("documents", len(chunks), limits)
        return chunks

    def _searchable(self, namespace: str, what: str) -> ChunkIndex:
        """The index, where there is one that the namespace may read."""
        if self._index is None:
            raise RefusalError(
                400, f"{what} need a collection, and an archive is served; send documents' texts"
            )
        if namespace != self.rag.compressor.namespace:
            raise RefusalError(
                403,
                f"{what} need a token of the collection's namespace; send documents' texts",
                code="other_namespace",
            )
        return self._index

    def _decoding(self, request: ChatRequest) -> Decoding:
        longest = request.answer_tokens
        limit = self._limits.answer_tokens
        if longest is not None and longest > limit:
            raise RefusalError(
                400,
                f"an answer must have at most {limit} tokens, {longest} were asked for",
                param="max_tokens" if request.max_tokens else "max_completion_tokens",
            )
        stop = request.stop
        asked: dict[str, Any] = {
            "max_new_tokens": longest,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop": (stop,) if isinstance(stop, str) else stop and tuple(stop),
        }
        changes = {name: value for name, value in asked.items() if value is not None}
        return replace(self.rag.decoding, **changes)


def refusal_of(error: BaseException) -> RefusalError:
    """The refusal for an error; one that no request is the reason of is logged by its type.

    Its message is neither sent nor logged: it may have a text in it.
    """
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, PromptTooLongError):  # its message has numbers only
        return RefusalError(400, str(error), code="context_length_exceeded", param="messages")
    log.error("a request failed: %s", type(error).__name__)
    return RefusalError(
        500, "the server failed to answer this request; its log names the error", code="internal"
    )


def _in_namespace(rag: SacRAG, namespace: str) -> SacRAG:
    """The pipeline with another namespace: the same model and store, under other keys."""
    cached = rag.compressor
    if namespace == cached.namespace:
        return rag
    guard = cached.guard is not None
    other = CachedCompressor(cached.inner, cached.store, namespace=namespace, guard=guard)
    pipeline = SacRAG(
        other,
        prompt_format=rag.prompt_format,
        on_miss=rag.on_miss,
        decoding=rag.decoding,
        repeat_question=rag.repeat_question,
    )
    # Prompts of all namespaces are rows of one decoder; each was started by its own pipeline.
    pipeline.gatherer = rag.gatherer
    return pipeline


def _require_turns(rag: SacRAG, messages: Sequence[Message]) -> None:
    try:
        render(rag.generator.tokenizer, messages)
    except ValueError as error:  # names roles; the template gets no content
        raise RefusalError(400, str(error), param="messages") from None


def _too_many(param: str, number: int, limits: Limits) -> RefusalError:
    return RefusalError(
        413,
        f"a request may have at most {limits.documents} documents and chunks, was: {number}",
        code="too_many_documents",
        param=param,
    )
