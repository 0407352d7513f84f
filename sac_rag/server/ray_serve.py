"""The endpoint on Ray Serve: `serve run sac_rag.server.ray_serve:app place=library/`."""

from __future__ import annotations

import os
from pathlib import Path

# Before Ray is imported: nothing about its use leaves the machine unasked.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    from ray import serve
except ImportError as error:
    raise ImportError(
        "sac_rag.server.ray_serve needs the 'ray' extra: pip install 'sac-rag[ray,serve]'"
    ) from error

from fastapi import FastAPI
from pydantic import BaseModel, Field

from sac_rag.server.app import make_app
from sac_rag.server.auth import Tokens
from sac_rag.server.limits import Limits
from sac_rag.server.service import Service


class Options(BaseModel):
    """Arguments of `app`; in `serve run`, name=value each.

    Attributes:
        place: Folder of a collection, or an archive; the same on every machine.
        model: The archive's model.
        tokens: File of bearer tokens, read by each replica. Default: those of SAC_RAG_TOKENS there.
        replicas: Copies of the server, each with the model.
        max_replicas: Most of them under load. Default: as many as `replicas`, always.
        queue: Requests at the same time in each replica.
        cpus: CPUs of each replica.
        gpus: GPUs of each replica; may be a share of one.
    """

    place: Path
    model: str | None = None
    tokens: Path | None = None
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    queue: int = Field(64, ge=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)


def app(options: Options) -> serve.Application:
    """The endpoint of `sac-rag serve`, as one deployment."""
    place = options.place.absolute()
    limits = Limits(queue=options.queue)

    def build() -> FastAPI:
        tokens = Tokens.read(options.tokens)
        service = Service.open(place, options.model, namespaces=tokens.namespaces, limits=limits)
        return make_app(service, tokens, limits)

    scaling = {
        "min_replicas": options.replicas,
        "max_replicas": options.max_replicas or options.replicas,
        # A replica batches what comes meanwhile: more of them pay off before its queue is full.
        "target_ongoing_requests": max(1, options.queue // 8),
    }
    return serve.deployment(
        serve.ingress(build)(),
        name="sac-rag",
        autoscaling_config=scaling,
        max_ongoing_requests=options.queue,
        graceful_shutdown_timeout_s=limits.drain_s,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    ).bind()
