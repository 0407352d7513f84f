"""Requests and responses of the endpoint: OpenAI's chat completions, with documents."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

# Fields of OpenAI's that have no meaning here, with the values at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "user": (),
    "verbosity": (),
    "web_search_options": (),
}
# The same of a message, as clients send an answer back.
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}

_INT64 = 2**63 - 1
_LONGEST_ANSWER = 2**20  # tokens; the model's last position is a tighter limit

Text = Annotated[str, StringConstraints(min_length=1)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
DocumentId = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of a chat; "developer" is another name for "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        return _without_neutral(values, _NEUTRAL_IN_MESSAGE)

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class DocumentText(_Strict):
    """A document that comes with the request: one chunk."""

    text: Text
    id: DocumentId | None = None
    title: Annotated[str, StringConstraints(max_length=1024)] | None = None


class StreamOptions(_Strict):
    """What a stream says besides the answer; there is nothing to obfuscate."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """Body of POST /v1/chat/completions.

    Attributes:
        documents: Texts, or ids of documents of the collection, that the answer is read from.
        retrieve: Number of the collection's chunks, those most like the last message, to read.
        ratio: Source tokens per KV entry. Default: the compressor's.
    """

    model: Annotated[str, StringConstraints(max_length=1024)]
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    documents: list[DocumentText | DocumentId] | None = None
    retrieve: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    ratio: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_LONGEST_ANSWER)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_LONGEST_ANSWER)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    n: Literal[1] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        return _without_neutral(values, _NEUTRAL)

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        last = self.messages[-1]
        if last.role != "user" or not last.text.strip():
            raise ValueError("the last message must be a user's and have text")
        if self.documents and self.retrieve:
            raise ValueError("give documents or retrieve, not both")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream: true")
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens must be equal if both are sent")
        return self

    @property
    def answer_tokens(self) -> int | None:
        """Longest answer that is asked for, in tokens."""
        return self.max_completion_tokens or self.max_tokens


def _without_neutral(values: Any, neutral: dict[str, tuple[Any, ...]]) -> Any:
    """A JSON object without the fields that have no meaning here, where they change nothing.

    Raises:
        ValueError: for one that would.
    """
    if not isinstance(values, dict):
        return values
    for name in values.keys() & neutral.keys():
        value = values[name]
        # 0 == False: only an equal type is the same value.
        if value is not None and not any(
            value == same and isinstance(value, bool) == isinstance(same, bool)
            for same in neutral[name]
        ):
            raise ValueError(f"{name} is not supported; leave it out")
    return {name: value for name, value in values.items() if name not in neutral}


class Citation(BaseModel):
    """How one chunk of an answer was read; see `reports.ChunkReport`."""

    document: str | None
    title: str | None
    status: str
    read_as: str
    tokens: int
    anchors: int


class Account(BaseModel):
    """Metadata of an answer.

    Attributes:
        citations: One per chunk, in reading order.
        source_tokens: Tokens of the text that the anchors stand for.
        anchors_from_store, anchors_computed: Anchors that were cached, and that were not.
        time_to_first_token_s: Seconds; of the whole batch, where requests were answered together.
    """

    citations: list[Citation]
    source_tokens: int
    anchors_from_store: int
    anchors_computed: int
    time_to_first_token_s: float


class PromptTokensDetails(BaseModel):
    """Of the prompt's positions, the anchors that came from the store."""

    cached_tokens: int


class CompletionUsage(BaseModel):
    """Positions that the model attended to, anchors included, and tokens of the answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class _Header(BaseModel):
    """What all chunks of a completion have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Header):
    """Response of POST /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]
    usage: CompletionUsage
    metadata: Account


class Delta(BaseModel):
    """New text of a stream."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The new text of the one answer."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionChunk(_Header):
    """One event of a stream; the last with a choice has the metadata."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None
    metadata: Account | None = None


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sac_rag"


class Models(BaseModel):
    """Response of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]
