"""The FastAPI app: chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any, TypeVar, cast

import anyio
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sac_rag.reports import Answer
from sac_rag.server import refusals, schemas
from sac_rag.server.auth import Tokens, require_local_host
from sac_rag.server.limits import Limits, Slots, read_body
from sac_rag.server.metrics import ServerMetrics
from sac_rag.server.refusals import RefusalError
from sac_rag.server.service import Asked, Service, refusal_of
from sac_rag.server.streams import EventResponse, Stream

Result = TypeVar("Result")

_CHAT = "/v1/chat/completions"


class Endpoint:
    """The requests that are worked on, and how they are answered.

    Attributes:
        is_draining: Whether new requests are refused, because the server is about to end.
        running: Number of requests of any kind that are worked on.
    """

    def __init__(self, service: Service, tokens: Tokens, limits: Limits) -> None:
        self.service = service
        self.tokens = tokens
        self.limits = limits
        self.metrics = ServerMetrics(service.pipelines.values(), limits.queue)
        self.is_draining = False
        self.running = 0
        self.created = int(time.time())
        self._reading = Slots(limits.queue)
        self._answering = Slots(limits.queue)
        self.metrics.queue.set_function(lambda: self._answering.used)

    async def complete(self, request: Request, namespace: str) -> Response:
        """Answers a chat completion."""
        with self._reading.taken():
            body = await read_body(request, self.limits)
        with ExitStack() as stack:
            stack.enter_context(self._answering.taken())
            wanted, asked = await anyio.to_thread.run_sync(self._prepare, body, namespace)
            header = self._header()
            if not wanted.stream:
                answer = await _unless_gone(request, asyncio.wrap_future(asked.submit()))
                return _json(_completion(answer, header))
            stream = Stream(asked.submit)
            stack.callback(stream.close)
            await _unless_gone(request, stream.start())
            options = wanted.stream_options or schemas.StreamOptions()
            events = _events(stream, header, with_usage=options.include_usage)
            return EventResponse(events, self.limits.stall_s, stack.pop_all().close)
        raise AssertionError  # for mypy: an ExitStack may swallow exceptions

    def _prepare(self, body: bytes, namespace: str) -> tuple[schemas.ChatRequest, Asked]:
        try:
            wanted = schemas.ChatRequest.model_validate_json(body)
        except ValidationError as error:
            raise refusals.of_validation(error) from None
        return wanted, self.service.prepare(wanted, namespace)

    def _header(self) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.service.name,
            "system_fingerprint": self.service.rag.compressor.fingerprint[:16],
        }


class _Gate:
    """Around all requests: counts them, refuses those that come too late, answers every error."""

    def __init__(self, app: ASGIApp, endpoint: Endpoint) -> None:
        self._app = app
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint, status, started = self._endpoint, 0, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        endpoint.running += 1
        try:
            if endpoint.is_draining:
                raise RefusalError(
                    503,
                    "the server is about to end; ask another one",
                    code="draining",
                    headers={"Connection": "close", "Retry-After": "5"},
                )
            if not endpoint.tokens:
                require_local_host(Request(scope).headers.get("host"))
            await self._app(scope, receive, noting)
        except Exception as error:  # noqa: BLE001 (answered, and logged without its text)
            refusal = refusal_of(error)
            if not status:
                await refusal.response()(scope, receive, noting)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if not status:
                message = "the server has ended before this request was answered"
                await RefusalError(503, message, code="ended").response()(scope, receive, noting)
        finally:
            endpoint.running -= 1
            if scope["path"] == _CHAT:
                endpoint.metrics.requests.labels(str(status)).inc()
                endpoint.metrics.seconds.observe(time.perf_counter() - started)


def make_app(
    service: Service, tokens: Tokens | None = None, limits: Limits | None = None
) -> FastAPI:
    """The app over a service; its `state.endpoint` is an Endpoint. It closes the service's store.

    Args:
        service: What is served.
        tokens: Who may ask. Default: everybody on this machine.
        limits: Limits of requests.
    """
    endpoint = Endpoint(service, tokens or Tokens([]), limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(service.close)

    def namespace_of(request: Request) -> str:
        return endpoint.tokens.namespace(request.headers.get("authorization"))

    # No pages about itself: they load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.endpoint = endpoint
    app.add_middleware(_Gate, endpoint=endpoint)
    app.exception_handler(HTTPException)(_http_error)
    model = schemas.Model(id=service.name, created=endpoint.created)

    @app.post(_CHAT, response_model=None)
    async def chat_completions(
        request: Request, namespace: str = Depends(namespace_of)
    ) -> Response:
        try:
            return await endpoint.complete(request, namespace)
        except Exception as error:  # noqa: BLE001 (not raised: FastAPI's traces have messages)
            return refusal_of(error).response()

    @app.get("/v1/models", response_model=None)
    async def models(namespace: str = Depends(namespace_of)) -> Response:
        return _json(schemas.Models(data=[model]))

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model_named(name: str, namespace: str = Depends(namespace_of)) -> Response:
        if name != service.name:
            raise RefusalError(404, f"the model must be {service.name}", code="model_not_found")
        return _json(model)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_model=None)
    async def metrics(namespace: str = Depends(namespace_of)) -> Response:
        text = await anyio.to_thread.run_sync(endpoint.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4")

    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """FastAPI's own errors, such as an unknown path, in OpenAI's format."""
    http = cast("HTTPException", error)  # it is registered for this type
    headers = dict(http.headers or {})
    return RefusalError(http.status_code, str(http.detail).lower(), headers=headers).response()


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, which is cancelled when the client closes the connection.

    Raises:
        RefusalError: 499, if it does.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaves(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RefusalError(499, "the client has closed the connection")
    finally:
        working.cancel()
        leaving.cancel()


async def _leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    stream: Stream, header: dict[str, Any], *, with_usage: bool
) -> AsyncIterator[str]:
    """A stream as OpenAI's events."""
    chunk = partial(schemas.CompletionChunk, **header)
    yield _event(chunk(choices=[_delta(role="assistant", content="")]))
    async for item in stream.items():
        if isinstance(item, str):
            yield _event(chunk(choices=[_delta(content=item)]))
        elif isinstance(item, RefusalError):
            yield f"data: {json.dumps(item.body())}\n\n"
        else:
            last = schemas.ChunkChoice(delta=schemas.Delta(), finish_reason=_reason(item))
            yield _event(chunk(choices=[last], metadata=_account(item)))
            if with_usage:
                yield _event(chunk(choices=[], usage=_usage(item)))
            yield "data: [DONE]\n\n"


def _delta(**fields: Any) -> schemas.ChunkChoice:
    return schemas.ChunkChoice(delta=schemas.Delta(**fields))


def _event(chunk: schemas.CompletionChunk) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=False, exclude_none=True)}\n\n"


def _completion(answer: Answer, header: dict[str, Any]) -> schemas.ChatCompletion:
    message = schemas.AnswerMessage(content=answer.text)
    return schemas.ChatCompletion(
        **header,
        choices=[schemas.Choice(message=message, finish_reason=_reason(answer))],
        usage=_usage(answer),
        metadata=_account(answer),
    )


def _reason(answer: Answer) -> Any:
    # OpenAI's names: "stop" is any end that the model chose.
    return "length" if answer.finish_reason == "length" else "stop"


def _usage(answer: Answer) -> schemas.CompletionUsage:
    usage = answer.usage
    return schemas.CompletionUsage(
        prompt_tokens=usage.positions_attended,
        completion_tokens=usage.generated_tokens,
        total_tokens=usage.positions_attended + usage.generated_tokens,
        prompt_tokens_details=schemas.PromptTokensDetails(cached_tokens=usage.anchors_from_store),
    )


def _account(answer: Answer) -> schemas.Account:
    return schemas.Account(
        citations=[
            schemas.Citation(
                document=report.chunk.id,
                title=report.chunk.title,
                status=report.status,
                read_as=report.read_as,
                tokens=report.num_tokens,
                anchors=report.num_anchors,
            )
            for report in answer.chunks
        ],
        source_tokens=answer.usage.source_tokens,
        anchors_from_store=answer.usage.anchors_from_store,
        anchors_computed=answer.usage.anchors_computed,
        time_to_first_token_s=answer.timings.time_to_first_token_s,
    )


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")
