"""ChatSAC: a LangChain chat model that attends to marked chunks."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel, agenerate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ContextThreadPoolExecutor, get_config_list
from pydantic import Field, model_validator
from typing_extensions import Self

from langchain_sac.messages import conversation, metadata_of, plain_prompt, usage_of
from langchain_sac.together import Place, Together
from sac_rag import Answer, Chunk, Decoding, Message, SacRAG

# Fields of Decoding by their names in LangChain.
_DECODING = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
}
# Arguments for models behind a network, without a meaning here.
_IGNORED = {"stream", "stream_usage", "timeout", "max_retries"}


class _Row(NamedTuple):
    """One prompt (turns of a chat, or a plain text), and how to answer it."""

    turns: Sequence[Message]
    text: Sequence[str | Chunk] | None
    decoding: Decoding
    ratio: int | None


class ChatSAC(BaseChatModel):
    """A local model that attends to the anchors of what SACCompressor has marked.

    Everything else is read as by any chat model, including a marker whose key does not match its
    text. Chunks can be in any message. A chunk that is not in the store is compressed, read as text
    or refused, depending on `on_miss` of the pipeline.

    Example:
        >>> rag = SacRAG.from_pretrained("smollm2-135m")
        >>> chain = (
        ...     {
        ...         "context": retriever | SACCompressor(rag) | format_docs(rag),
        ...         "question": RunnablePassthrough(),
        ...     }
        ...     | prompt_template(rag)
        ...     | ChatSAC(rag, max_tokens=8)
        ... )
        >>> said = chain.invoke("Who kept the light?")
        >>> said.usage_metadata["input_tokens"] > 0
        True
        >>> [chunk["status"] for chunk in said.response_metadata["sac"]]
        ['absent', 'absent']
        >>> said = chain.invoke("Who kept the light?")
        >>> [chunk["status"] for chunk in said.response_metadata["sac"]]
        ['hit', 'hit']

    Attributes:
        rag: The pipeline that answers; several components may share it.
        model: Name of the model in traces and metadata. Default: that of its config.
        plain: How messages are read. None: a prompt that `prompt_template(rag)` made is read as
            `rag.answer` reads it, in a chat template or as plain text; everything else is a chat.
            True: all contents are one plain text to complete, without a chat template and without
            roles. False: everything is a chat.
        max_tokens: Longest answer, in tokens.
        temperature: 0 takes the most likely token; above 0 samples.
        top_p: Sample from the most likely tokens that together have this probability.
        top_k: Sample from this many most likely tokens; 0 for no such limit.
        seed: Makes sampling repeatable.
        stop: Texts at which an answer ends, instead of those of `rag.prompt_format`, which end
            answers to its own plain prompts. `stop` in a call replaces both.
        ratio: Source tokens per KV entry of marked chunks, unless SACCompressor gave them one.
            None for that of the compressor.
        batch_size: Most inputs of a `batch` that are answered in one padded batch; lowered by
            `max_concurrency` of the config.

    Other fields that are None default to `rag.decoding`. All except the first three and the last
    can be given in a call or by `bind`; other arguments, such as tools, are refused.
    """

    rag: SacRAG = Field(repr=False, exclude=True)
    model: str
    plain: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: list[str] | None = None
    ratio: int | None = Field(default=None, strict=True)
    batch_size: int = Field(default=8, ge=1)

    def __init__(self, rag: SacRAG, **fields: Any) -> None:
        config = rag.generator.model.config
        fields.setdefault("model", _short(config.name_or_path) or config.model_type)
        super().__init__(rag=rag, **fields)  # type: ignore[call-arg]  # pydantic takes it

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str] = "smollm2-135m", **options: Any
    ) -> ChatSAC:
        """Loads a model and a compressor for it.

        Args:
            model: A default model's name, a local folder or a hub id.
            **options: Fields of this class and arguments of `SacRAG.from_pretrained`; `ratio` is
                the latter's.

        Raises as `SacRAG.from_pretrained` does.
        """
        names = cls.model_fields.keys() - {"ratio"}
        fields = {name: options.pop(name) for name in [*options] if name in names}
        return cls(SacRAG.from_pretrained(model, **options), model=_short(model), **fields)

    @model_validator(mode="after")
    def _decoding_is_possible(self) -> Self:
        self._decoding(None, {})
        self.rag.compressor.ratio_for(self.ratio)
        return self

    @property
    def _llm_type(self) -> str:
        return "sac"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything besides the prompt that determines an answer: a key of LangChain's caches."""
        compressor, generator = self.rag.compressor, self.rag.generator
        config = compressor.config
        template = None if self.plain else getattr(generator.tokenizer, "chat_template", None)
        # Decides which prompts are plain, and where answers to them end.
        format = self.rag.prompt_format
        rule = None if format.chat or self.plain is False else format.to_json()
        return {
            "model": self.model,
            "revision": generator.identity["weights"],
            "fingerprint": compressor.fingerprint,
            "method": config.method,
            "ratio": compressor.ratio_for(self.ratio),
            "on_miss": self.rag.on_miss,
            # Distinguishes tenants without revealing the namespace.
            "namespace": compressor.text_id(""),
            "plain": self.plain,
            "template": _digest(template),
            "format": _digest(rule),
            # Not named "stop", which LangChain overwrites with that of the call.
            "decoding": asdict(self._decoding(None, {})),
        }

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text in the tokenizer of the model."""
        return self.rag.generator.tokenize(text)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answers several inputs, each with its own chunks, in padded batches."""
        outputs: list[Any] = []
        for rows, configs, together in self._groups(inputs, config):

            def one(row: Any, config: RunnableConfig, together: Any = together) -> Any:
                with Place(self, together).reserved():
                    try:
                        return self.invoke(row, config, **kwargs)
                    except Exception as error:  # noqa: BLE001 (raised or returned below)
                        return error

            with ContextThreadPoolExecutor(max_workers=len(rows)) as threads:
                outputs += threads.map(one, rows, configs)
            _require_answers(outputs, return_exceptions)
        return outputs

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answers several inputs, each with its own chunks, in padded batches."""
        outputs: list[Any] = []
        for rows, configs, together in self._groups(inputs, config):

            async def one(row: Any, config: RunnableConfig, together: Any = together) -> Any:
                with Place(self, together).reserved():
                    try:
                        return await self.ainvoke(row, config, **kwargs)
                    except Exception as error:  # noqa: BLE001 (raised or returned below)
                        return error

            outputs += await asyncio.gather(*map(one, rows, configs))
            _require_answers(outputs, return_exceptions)
        return outputs

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        row = self._row(messages, stop, kwargs)
        place = Place.find(self)
        return self._result(place.ask(row).result() if place else self._answers([row])[0])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        place = Place.find(self)
        if place is None:
            # Token by token, so that cancelling this ends the work.
            return await agenerate_from_stream(self._astream(messages, stop=stop, **kwargs))
        row = self._row(messages, stop, kwargs)
        return self._result(await asyncio.wrap_future(place.ask(row)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        row = self._row(messages, stop, kwargs)
        if row.text is None:
            stream = self.rag.stream_chat(row.turns, row.decoding, ratio=row.ratio)
        else:
            stream = self.rag.stream_complete(row.text, row.decoding, ratio=row.ratio)
        for piece in stream:
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
        metadata = metadata_of(stream.answer, self.model)
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content="",
                usage_metadata=usage_of(stream.answer),
                response_metadata=metadata,
                chunk_position="last",
            ),
            generation_info={"finish_reason": metadata["finish_reason"]},
        )

    def _row(
        self, messages: list[BaseMessage], stop: list[str] | None, asked: dict[str, Any]
    ) -> _Row:
        ratio = self.ratio if asked.get("ratio") is None else asked["ratio"]
        decoding, key_of = self._decoding(stop, asked), self.rag.compressor.key
        if self.plain:
            return _Row((), plain_prompt(messages, key_of), decoding, ratio)
        turns = conversation(messages, key_of)
        if self.plain is None and [turn.role for turn in turns] == ["user"]:
            content = turns[0].content
            if self.rag.prompt_format.matches(content):
                return _Row((), content, decoding, ratio)
        return _Row(turns, None, decoding, ratio)

    def _answers(self, rows: Sequence[_Row]) -> list[Answer]:
        """Answers chats in one padded batch and plain prompts in one.

        All rows have the same decoding and ratio.
        """
        decoding, ratio = rows[0].decoding, rows[0].ratio
        turns = [row.turns for row in rows if row.text is None]
        texts = [row.text for row in rows if row.text is not None]
        chats = iter(self.rag.chat(turns, decoding, ratio=ratio))
        completions = iter(self.rag.complete(texts, decoding, ratio=ratio))
        return [next(chats if row.text is None else completions) for row in rows]

    def _result(self, answer: Answer) -> ChatResult:
        metadata = metadata_of(answer, self.model)
        message = AIMessage(
            answer.text, usage_metadata=usage_of(answer), response_metadata=metadata
        )
        info = {"finish_reason": metadata["finish_reason"]}
        return ChatResult(generations=[ChatGeneration(message=message, generation_info=info)])

    def _decoding(self, stop: list[str] | None, asked: dict[str, Any]) -> Decoding:
        if asked.get("model", self.model) != self.model:
            raise ValueError(
                f"this ChatSAC has {self.model!r} loaded, was asked for {asked['model']!r}; "
                "make another one for another model"
            )
        unknown = sorted(asked.keys() - _DECODING.keys() - _IGNORED - {"model", "ratio"})
        if unknown:
            raise TypeError(
                f"ChatSAC takes stop, {', '.join(_DECODING)}, ratio in a call, "
                f"got: {', '.join(unknown)}; it calls no tools and follows no schema"
            )
        changes: dict[str, Any] = {}
        for name, ours in _DECODING.items():
            value = getattr(self, name) if asked.get(name) is None else asked[name]
            if value is not None:
                changes[ours] = value
        if (ends := self.stop if stop is None else stop) is not None:
            changes["stop"] = ends
        return replace(self.rag.decoding, **changes)

    def _groups(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None,
    ) -> Iterator[tuple[list[LanguageModelInput], list[RunnableConfig], Together[_Row, Answer]]]:
        configs = get_config_list(config, len(inputs))
        size = self.batch_size
        if configs:
            size = min(size, configs[0].get("max_concurrency") or size)
        for start in range(0, len(inputs), size):
            rows = inputs[start : start + size]
            yield rows, configs[start : start + size], Together(len(rows), self._answers)


def _short(name: str | os.PathLike[str]) -> str:
    """Name of a model, without the path of a local folder."""
    return Path(name).name if Path(name).is_dir() else os.fspath(name)


def _digest(text: str | None) -> str:
    return "" if text is None else hashlib.sha256(text.encode()).hexdigest()


def _require_answers(outputs: Sequence[Any], return_exceptions: bool) -> None:
    for output in outputs:
        if isinstance(output, Exception) and not return_exceptions:
            raise output
