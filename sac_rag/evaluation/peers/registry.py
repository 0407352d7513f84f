"""All peers by name, and their measurement on samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sac_rag.evaluation.peers import kvpress_peers, llmlingua_peers, neighbours, text_peers
from sac_rag.evaluation.peers.base import Peer
from sac_rag.evaluation.quality import QualityResult, evaluate_answering
from sac_rag.evaluation.sample import Sample
from sac_rag.pipeline import SacRAG

PEERS: Mapping[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        kvpress_peers.KVzip,
        kvpress_peers.AdaKV,
        kvpress_peers.CriticalAdaKV,
        kvpress_peers.SnapKV,
        kvpress_peers.Knorm,
        llmlingua_peers.LLMLingua,
        llmlingua_peers.LongLLMLingua,
        text_peers.LlamaIndexOptimizer,
        text_peers.LangChainFilter,
        text_peers.BM25Sentences,
        neighbours.ReadAgainAnchors,
        neighbours.Merged,
        neighbours.Refit,
        neighbours.SurprisalAnchors,
        neighbours.UniformAnchors,
        neighbours.RandomAnchors,
        llmlingua_peers.LLMLingua2,
        llmlingua_peers.LMCache,
    )
}


@dataclass(frozen=True)
class PeerStatus:
    """A row of the list of peers.

    Attributes:
        name: Its name on the command line.
        does: What it does.
        package: Distribution that it comes from; "" for this one.
        version: Of the package; "" if it is not installed.
        reason: Why it cannot run; "" if it can.
    """

    name: str
    does: str
    package: str
    version: str
    reason: str


def list_peers() -> list[PeerStatus]:
    """All peers, and why some cannot run here."""
    return [
        PeerStatus(peer.name, peer.does, peer.package or "", peer.version(), peer.reason())
        for peer in PEERS.values()
    ]


def select(names: Iterable[str] = ()) -> tuple[list[type[Peer]], list[PeerStatus]]:
    """Peers to measure, and those of them that cannot run.

    Args:
        names: Default: all.

    Raises:
        ValueError: for an unknown name.
    """
    wanted = list(dict.fromkeys(names)) or list(PEERS)
    if unknown := sorted(set(wanted) - set(PEERS)):
        raise ValueError(f"peers must be among {', '.join(PEERS)}, unknown: {unknown}")
    status = {row.name: row for row in list_peers()}
    runnable = [PEERS[name] for name in wanted if not status[name].reason]
    return runnable, [status[name] for name in wanted if status[name].reason]


def measure_peers(
    rag: SacRAG,
    samples: Sequence[Sample],
    peers: Sequence[type[Peer]],
    ratios: Sequence[int],
    out: str | os.PathLike[str],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    labels: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[QualityResult]:
    """Measures peers on the same questions as `evaluate`, each at several ratios.

    Answers that are in `out` already are not measured again.

    Args:
        rag: Model, prompt format, and the compressor whose budget peers have.
        samples: Questions, one sample per number of chunks.
        peers: Of PEERS.
        ratios: Source tokens per KV entry, or per token of text.
        out: Folder for the answers, one file each; `write_report` reads it.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Questions answered together.
        labels: Noted in the first line of each file.
        on_progress: Called with the number of questions answered since the last call.

    Raises as `evaluate_answering` does.
    """
    for kind in peers:
        for ratio in sorted(ratios):
            peer = kind(rag, ratio)
            for sample in samples:
                package = f"{kind.package} {kind.version()}" if kind.package else "sac-rag"
                yield evaluate_answering(
                    peer.answering(),
                    rag,
                    sample,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    out=Path(out) / f"{kind.name}-{ratio}x-k{sample.k}.jsonl",
                    labels={**(labels or {}), "title": kind.title, "package": package},
                    on_progress=on_progress,
                )
