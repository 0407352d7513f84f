"""serve: an OpenAI-compatible endpoint over a collection or an archive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sac_rag.cli.console import loading, pull_if_default
from sac_rag.cli.options import ModelOrDefault
from sac_rag.cli.render import notes

if TYPE_CHECKING:
    from sac_rag.server.auth import Tokens
    from sac_rag.server.limits import Limits
    from sac_rag.server.service import Service


def serve(
    place: Annotated[Path, typer.Argument(help="Folder of a collection, or an archive.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="File of bearer tokens, TOKEN or TOKEN:NAMESPACE per line. Default: those of the "
            "environment variable SAC_RAG_TOKENS, separated by spaces or commas."
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate and chain, for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key.")] = None,
    model: ModelOrDefault = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests at the same time; then 429.")] = 64,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 8 * 2**20,
    max_documents: Annotated[int, typer.Option(min=1, help="Of a request.")] = 64,
    max_document_bytes: Annotated[int, typer.Option(min=1, help="Of one document.")] = 2**20,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 1024,
    drain_seconds: Annotated[
        float, typer.Option(min=0.1, help="How long running requests are waited for at the end.")
    ] = 30.0,
) -> None:
    """Serves chat completions as OpenAI's clients expect them, until SIGTERM or Ctrl-C."""
    from sac_rag.server.auth import Tokens
    from sac_rag.server.limits import Limits
    from sac_rag.server.running import require_tokens

    limits = Limits(
        body_bytes=max_body_bytes,
        documents=max_documents,
        document_bytes=max_document_bytes,
        queue=queue,
        answer_tokens=max_answer_tokens,
        drain_s=drain_seconds,
    )
    known = Tokens.read(tokens)
    require_tokens(host, known)  # before models are loaded
    service = open_service(place, model, known, limits)
    from sac_rag.server.app import make_app
    from sac_rag.server.running import serve

    def show(url: str) -> None:
        asked = "a bearer token" if known else "no token, on this machine only"
        notes.print(f"{service.name} at {url}, with {asked}; Ctrl-C ends it")

    app = make_app(service, known, limits)
    serve(app, host, port, tls_cert=tls_cert, tls_key=tls_key, on_start=show)
    notes.print("ended; all requests were answered or refused")


def mcp(
    place: Annotated[Path, typer.Argument(help="Folder of a collection, or an archive.")],
    model: ModelOrDefault = None,
) -> None:
    """Serves the tools ask, search and precompress to an MCP client, over its pipes."""
    from sac_rag.server.auth import Tokens
    from sac_rag.server.limits import Limits
    from sac_rag.server.mcp import make_mcp

    service = open_service(place, model, Tokens([]), Limits())
    try:
        make_mcp(service).run("stdio")
    finally:
        service.close()


def open_service(place: Path, model: str | None, tokens: Tokens, limits: Limits) -> Service:
    """What is served of a collection's folder, or of an archive with a model."""
    with loading():
        from sac_rag.collection import Collection, read_settings
        from sac_rag.server.service import DEFAULT_MODEL, Service
    if Collection.exists(place):
        saved = read_settings(place)
        pull_if_default(saved.model, saved.embedder)
    elif place.is_file():
        pull_if_default(model or DEFAULT_MODEL)
    with loading():
        return Service.open(place, model, namespaces=tokens.namespaces, limits=limits)
