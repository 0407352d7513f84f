"""SACLLM: a SacRAG as an LLM of LlamaIndex."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM

from llama_index_sac.markers import (
    UnanswerableError,
    escape,
    pieces,
    require_known,
    require_rag,
    tokenize,
)
from llama_index_sac.responses import Step, completion, growing, turn, whole
from sac_rag import Chunk, Decoding, Message, PromptTooLongError

if TYPE_CHECKING:
    from sac_rag import SacRAG

ResponseT = TypeVar("ResponseT")

# The turns of a chat, or the pieces of a plain text.
_Prompt: TypeAlias = list[Message] | tuple[str | Chunk, ...]

# Names that LlamaIndex's own LLMs have for fields of Decoding.
_ALIASES = {"max_tokens": "max_new_tokens"}
_DECODING = {*_ALIASES, *(field.name for field in fields(Decoding))}


class SACLLM(CustomLLM):
    """The frozen LM of a SacRAG; attends to nodes that a SACPostprocessor over it has marked.

    A prompt of `text_qa_template` is read as `rag.answer` reads it; everything else is a chat in
    the chat template of the model, or as `plain` defines. `complete`, `chat`, their streams and
    async versions give the same answer; async ones run in threads, and a stream that is closed
    stops generating. `raw["usage"]` of a response counts attended positions;
    `additional_kwargs["sac"]` has the status of each chunk.

    >>> from llama_index.core.llms import ChatMessage
    >>> llm = SACLLM(rag)
    >>> whole = llm.chat([ChatMessage("Who keeps a lighthouse?")])
    >>> streamed = llm.stream_chat([ChatMessage("Who keeps a lighthouse?")])
    >>> "".join(response.delta for response in streamed) == whole.message.content
    True
    >>> sorted(whole.raw["usage"])
    ['completion_tokens', 'prompt_tokens', 'total_tokens']

    Args:
        rag: The pipeline that answers. Its `on_miss` applies to chunks that were deleted from the
            store since retrieval.
        plain: How prompts are read. None: those in the plain format of `rag.prompt_format`, and
            those completed with `formatted=True`, are plain text; all others are chats. True: all
            are plain text: no template, no roles, messages joined by blank lines. False: all are
            chats.
        decoding: How answers are generated. Default: that of the SacRAG. Without a `stop`, answers
            to prompts in the plain format end at its stop texts.
        ratio: Source tokens per KV entry of marked chunks, unless a SACPostprocessor gave them one;
            also an option of each call. Default: that of the compressor.
        **settings: Fields of Decoding, of which `max_tokens` is another name of `max_new_tokens`;
            each call can change them, as in `llm.complete(prompt, temperature=0.7, seed=1)`. And
            fields of LlamaIndex's LLM.

    Raises:
        TypeError: if rag is not a SacRAG, or for an unknown setting.
        ValueError: if answers could be as long as the context of the model, or for a ratio that
            the compressor does not have.
    """

    plain: bool | None = Field(
        default=None, description="Whether prompts are plain text, no chats; None decides for each."
    )
    ratio: int | None = Field(
        default=None, strict=True, description="Source tokens per KV entry of marked chunks."
    )

    _rag: SacRAG = PrivateAttr()
    _decoding: Decoding = PrivateAttr()

    def __init__(
        self,
        rag: SacRAG,
        *,
        plain: bool | None = None,
        decoding: Decoding | None = None,
        ratio: int | None = None,
        **settings: Any,
    ) -> None:
        require_rag(rag)
        rag.compressor.ratio_for(ratio)
        changes = {name: settings.pop(name) for name in _DECODING & settings.keys()}
        require_known(settings, {*type(self).model_fields, *_DECODING}, type(self).__name__, "")
        if plain:
            settings.setdefault("messages_to_prompt", _paragraphs)
        super().__init__(plain=plain, ratio=ratio, **settings)
        self._rag = rag
        self._decoding = _changed(decoding or rag.decoding, changes)
        metadata = self.metadata
        if metadata.num_output >= metadata.context_window:
            raise ValueError(
                f"answers must be shorter than the model's context of {metadata.context_window} "
                f"tokens, may have {metadata.num_output}; give a Decoding with fewer max_new_tokens"
            )

    @classmethod
    def from_pretrained(
        cls, model: str | Path = "smollm2-135m", *, plain: bool | None = None, **options: Any
    ) -> SACLLM:
        """Loads a model with its compressor; the SacRAG for the postprocessor is `llm.rag`.

        Args:
            model: A default model's name, a local folder or a hub id.
            plain: How prompts are read.
            **options: Settings of this class; all others are those of `SacRAG.from_pretrained`,
                whose errors are raised.
        """
        from sac_rag import SacRAG

        # A ratio is the compressor's, which one that is not nested must be made for.
        ours = (_DECODING | cls.model_fields.keys()) - {"ratio"}
        settings = {name: options.pop(name) for name in ours & options.keys()}
        return cls(SacRAG.from_pretrained(model, **options), plain=plain, **settings)

    @classmethod
    def class_name(cls) -> str:
        """The name in events and traces."""
        return "SACLLM"

    @property
    def rag(self) -> SacRAG:
        """The SacRAG that answers."""
        return self._rag

    @property
    def metadata(self) -> LLMMetadata:
        """Limits by which LlamaIndex builds prompts, in tokens of text; a chunk counts in full."""
        generator = self._rag.generator
        config = generator.model.config
        return LLMMetadata(
            context_window=generator.max_positions,
            num_output=self._decoding.max_new_tokens,
            is_chat_model=self.plain is not True,
            model_name=Path(config.name_or_path or config.model_type).name,
        )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a SACLLM cannot be pickled, since it holds a loaded model; load it in the other "
            "process, as in SACLLM.from_pretrained('smollm2-135m')"
        )

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; those of a marker are those of its chunk.

        With `Settings.tokenizer = llm.tokenize`, LlamaIndex builds prompts by their actual lengths.
        """
        return tokenize(text, self._rag)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponse:
        """Answers a prompt: one turn of a user, or plain text to continue, depending on `plain`.

        Args:
            prompt: Passed through `completion_to_prompt` of the LLM, unless it is formatted.
            formatted: Whether the prompt is complete, so that no chat template is applied unless
                `plain` is False.
            **options: Fields of Decoding, and ratio.

        Raises:
            UnanswerableError: if it is too long.
            ChunkMissError: with the SacRAG's on_miss="raise", if the store has lost a chunk.
            TypeError: for an option that is neither a field of Decoding nor ratio.
        """
        *_, last = self._steps(self._completion(prompt, formatted), options)
        return completion(last)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **options: Any
    ) -> CompletionResponseGen:
        """The same as a stream; raises as `complete` does, before the first piece."""
        return _each(self._steps(self._completion(prompt, formatted), options), completion)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponse:
        """Generates the next turn of the assistant. Raises as `complete` does."""
        *_, last = self._steps(self._conversation(messages), options)
        return turn(last)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponseGen:
        """The same as a stream; raises as `complete` does, before the first piece."""
        return _each(self._steps(self._conversation(messages), options), turn)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **options: Any
    ) -> CompletionResponse:
        """As `complete`, in a batch with others asked for meanwhile; cancelling ends the work."""
        return completion(await self._answer(self._completion(prompt, formatted), options))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **options: Any
    ) -> CompletionResponseAsyncGen:
        """As `stream_complete`, in threads."""
        return await self._aeach(self._completion(prompt, formatted), options, completion)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponse:
        """As `chat`, in a batch with others asked for meanwhile; cancelling ends the work."""
        return turn(await self._answer(self._conversation(messages), options))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **options: Any
    ) -> ChatResponseAsyncGen:
        """As `stream_chat`, in threads."""
        return await self._aeach(self._conversation(messages), options, turn)

    def _completion(self, prompt: str, formatted: bool) -> _Prompt:
        text = prompt if formatted else (self.completion_to_prompt or str)(prompt)
        content = pieces(text, self._rag)
        if self.plain or (formatted and self.plain is None):
            return content
        return self._recognized([Message(MessageRole.USER.value, content)])

    def _conversation(self, messages: Sequence[ChatMessage]) -> _Prompt:
        if self.plain:
            return pieces((self.messages_to_prompt or _paragraphs)(messages), self._rag)
        turns = [
            Message(message.role.value, pieces(_text(message), self._rag)) for message in messages
        ]
        return self._recognized(turns)

    def _recognized(self, turns: list[Message]) -> _Prompt:
        """Turns of a chat, or their plain text if they are in the plain format."""
        if self.plain is None and [turn.role for turn in turns] == [MessageRole.USER.value]:
            content = turns[0].content
            if self._rag.prompt_format.matches(content):
                return content
        return turns

    def _asked(self, options: dict[str, Any]) -> tuple[Decoding, int | None]:
        """Decoding and ratio of a call."""
        ratio = self.ratio if options.get("ratio") is None else options["ratio"]
        changes = {name: value for name, value in options.items() if name != "ratio"}
        return _changed(self._decoding, changes), ratio

    def _steps(self, prompt: _Prompt, options: dict[str, Any]) -> Iterator[Step]:
        """The answer as it is generated; started here, so that a bad prompt raises at once."""
        decoding, ratio = self._asked(options)
        with _unanswerable():
            if isinstance(prompt, tuple):
                stream = self._rag.stream_complete(prompt, decoding, ratio=ratio)
            else:
                stream = self._rag.stream_chat(prompt, decoding, ratio=ratio)
        return growing(stream)

    async def _answer(self, prompt: _Prompt, options: dict[str, Any]) -> Step:
        decoding, ratio = self._asked(options)
        with _unanswerable():
            if isinstance(prompt, tuple):
                answer = self._rag.submit_complete(prompt, decoding, ratio=ratio)
            else:
                answer = self._rag.submit_chat(prompt, decoding, ratio=ratio)
            # Cancelling this cancels the future, which ends the work.
            return whole(await asyncio.wrap_future(answer))

    async def _aeach(
        self,
        prompt: _Prompt,
        options: dict[str, Any],
        make: Callable[[Step], ResponseT],
    ) -> AsyncGenerator[ResponseT, None]:
        # One thread call per step: a stream that is closed or cancelled takes no further step.
        steps = await asyncio.to_thread(self._steps, prompt, options)

        async def responses() -> AsyncGenerator[ResponseT, None]:
            while (step := await asyncio.to_thread(next, steps, None)) is not None:
                yield make(step)

        return responses()


@contextmanager
def _unanswerable() -> Iterator[None]:
    """Raises UnanswerableError in place of ValueError, which LlamaIndex swallows."""
    try:
        yield
    except PromptTooLongError as error:
        raise UnanswerableError(
            f"{error}; with Settings.tokenizer = llm.tokenize LlamaIndex makes several prompts"
        ) from error
    except ValueError as error:
        raise UnanswerableError(str(error)) from error


def _changed(decoding: Decoding, options: dict[str, Any]) -> Decoding:
    require_known(options, {*_DECODING, "ratio"}, "a call of a SACLLM", "")
    return replace(decoding, **{_ALIASES.get(name, name): v for name, v in options.items()})


def _text(message: ChatMessage) -> str:
    """Text of a message. That of the assistant contains no markers: it was never shown one."""
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise UnanswerableError(f"the model reads text only, got a {type(block).__name__}")
    text = message.content or ""
    return escape(text) if message.role == MessageRole.ASSISTANT else text


def _paragraphs(messages: Sequence[ChatMessage]) -> str:
    return "\n\n".join(map(_text, messages))


def _each(
    steps: Iterator[Step], make: Callable[[Step], ResponseT]
) -> Generator[ResponseT, None, None]:
    # LlamaIndex recognizes a stream by its being a generator.
    yield from map(make, steps)
