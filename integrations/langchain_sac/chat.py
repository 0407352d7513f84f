"""ChatSAC: a LangChain chat model that attends to marked chunks."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ContextThreadPoolExecutor, get_config_list
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, Field, model_validator
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
    "stop": "stop",
}
# Other names of fields, in LangChain and in transformers.
_ALIASES = {
    "model_name": "model",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stop_sequences": "stop",
}
# Arguments for models behind a network, without a meaning here.
_IGNORED = {"api_key", "stream", "stream_usage", "timeout", "max_retries"}


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
        streaming: Whether `invoke` and `ainvoke` stream too, for callbacks that take tokens.
        profile: What LangChain's agents and middleware ask of a model: the longest prompt and
            answer, and that it reads text and calls no tools.

    Other fields that are None default to `rag.decoding`. From `max_tokens` to `ratio` they can be
    given in a call or by `bind`. `max_new_tokens`, `stop_sequences` and `model_name` are other
    names of max_tokens, stop and model; `model_kwargs` is a dict of any of these. `timeout`,
    `max_retries` and `api_key`, which every chat model of LangChain takes, have no effect on a
    local one. Unknown arguments are refused.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    rag: SacRAG = Field(repr=False, exclude=True)
    model: str
    plain: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: list[str] | str | None = None
    ratio: int | None = Field(default=None, strict=True)
    batch_size: int = Field(default=8, ge=1)
    streaming: bool = False

    def __init__(self, rag: SacRAG, **fields: Any) -> None:
        fields = _renamed({**(fields.pop("model_kwargs", None) or {}), **fields})
        if isinstance(rag, SacRAG):
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
            **options: Fields of this class and arguments of `SacRAG.from_pretrained`; `ratio` and
                `model_kwargs` are the latter's.

        Raises as `SacRAG.from_pretrained` does.
        """
        names = (cls.model_fields.keys() | _ALIASES.keys() | _IGNORED) - {"ratio"}
        fields = {name: options.pop(name) for name in [*options] if name in names}
        return cls(SacRAG.from_pretrained(model, **options), model=_short(model), **fields)

    @model_validator(mode="after")
    def _settings_are_possible(self) -> Self:
        longest = self._decoding({}).max_new_tokens
        self.rag.compressor.ratio_for(self.ratio)
        if self.profile is None:
            self.profile = {
                "max_input_tokens": self.rag.generator.max_positions - longest,
                "max_output_tokens": longest,
                "image_inputs": False,
                "audio_inputs": False,
                "video_inputs": False,
                "reasoning_output": False,
                "tool_calling": False,
                "structured_output": False,
            }
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
            "decoding": asdict(self._decoding({})),
        }

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with arguments bound, if there are no tools: it calls none.

        Raises:
            NotImplementedError: for tools.
        """
        if tools:
            raise NotImplementedError(
                f"ChatSAC calls no tools and follows no schema, got {len(tools)} tools; retrieve "
                "in a step of its own before it answers (docs/langchain.md, Graphs and agents), or "
                "give the tools to another model"
            )
        return self.bind(**kwargs)

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
        row = self._row(messages, stop, kwargs)
        place = Place.find(self)
        # Cancelling this cancels the future, which ends the work.
        return self._result(
            await asyncio.wrap_future(place.ask(row) if place else self._submitted(row))
        )

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
        asked = _renamed(asked if stop is None else {"stop": stop, **asked})
        ratio = self.ratio if asked.get("ratio") is None else asked["ratio"]
        decoding, key_of = self._decoding(asked), self.rag.compressor.key
        if self.plain:
            return _Row((), plain_prompt(messages, key_of), decoding, ratio)
        turns = conversation(messages, key_of)
        if self.plain is None and [turn.role for turn in turns] == ["user"]:
            content = turns[0].content
            if self.rag.prompt_format.matches(content):
                return _Row((), content, decoding, ratio)
        return _Row(turns, None, decoding, ratio)

    def _submitted(self, row: _Row) -> Future[Answer]:
        """The answer to a row, in a batch with others that are asked for meanwhile."""
        if row.text is None:
            return self.rag.submit_chat(row.turns, row.decoding, ratio=row.ratio)
        return self.rag.submit_complete(row.text, row.decoding, ratio=row.ratio)

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

    def _decoding(self, asked: Mapping[str, Any]) -> Decoding:
        if asked.get("model", self.model) != self.model:
            raise ValueError(
                f"this ChatSAC has {self.model!r} loaded, was asked for {asked['model']!r}; "
                "make another one for another model"
            )
        unknown = sorted(asked.keys() - _DECODING.keys() - {"model", "ratio"})
        if unknown:
            raise TypeError(
                f"ChatSAC takes {', '.join(_DECODING)}, ratio in a call, "
                f"got: {', '.join(unknown)}; it calls no tools and follows no schema"
            )
        changes: dict[str, Any] = {}
        for name, field in _DECODING.items():
            value = getattr(self, name) if asked.get(name) is None else asked[name]
            if value is not None:
                changes[field] = value
        return replace(self.rag.decoding, **changes)

    def _groups(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None,
    ) -> Iterator[tuple[list[LanguageModelInput], list[RunnableConfig], Together[_Row, Answer]]]:
        if isinstance(inputs, str):
            raise TypeError("expected a list of inputs, got one str; put it in a list")
        configs = get_config_list(config, len(inputs))
        size = self.batch_size
        if configs:
            size = min(size, configs[0].get("max_concurrency") or size)
        for start in range(0, len(inputs), size):
            rows = inputs[start : start + size]
            yield rows, configs[start : start + size], Together(len(rows), self._answers)


def _renamed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under the names of ChatSAC's fields, without those of models behind a network.

    Raises:
        TypeError: if one is given under two names.
    """
    renamed: dict[str, Any] = {}
    for name, value in arguments.items():
        field = _ALIASES.get(name, name)
        if field in renamed:
            raise TypeError(f"{field} was given twice, the second time as {name}; give it once")
        if name not in _IGNORED:
            renamed[field] = value
    return renamed


def _short(name: str | os.PathLike[str]) -> str:
    """Name of a model, without the path of a local folder."""
    return Path(name).name if Path(name).is_dir() else os.fspath(name)


def _digest(text: str | None) -> str:
    return "" if text is None else hashlib.sha256(text.encode()).hexdigest()


def _require_answers(outputs: Sequence[Any], return_exceptions: bool) -> None:
    for output in outputs:
        if isinstance(output, Exception) and not return_exceptions:
            raise output
