"""What the command line prints. Knows nothing of its arguments or of how results come about."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sac_rag.benchmarks.first_token import SpeedRow
    from sac_rag.benchmarks.throughput import ThroughputRow
    from sac_rag.collection import Collection
    from sac_rag.demo import DemoResult
    from sac_rag.evaluation.quality import QualityResult
    from sac_rag.precompress.estimate import Estimate
    from sac_rag.reports import Answer, PrecompressReport
    from sac_rag.retrieval.index import Hit
    from sac_rag.stores.disk.maintenance import StoreStats

out = Console(highlight=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False)


def print_introduction(collection: Collection, folder: Path) -> None:
    """What the demo runs on."""
    compressor = collection.rag.compressor.compressor
    out.print(
        f"{len(collection.index)} chunks of Wikipedia leads, {collection.settings.model} in "
        f"{collection.rag.generator.dtype_name}, in {folder}",
        markup=False,
    )
    kept = (
        "full: every token's KV is kept"
        if compressor.method == "full"
        else f"{compressor.method} at {compressor.config.ratio}x: one token's KV in "
        f"{compressor.config.ratio} is kept"
    )
    out.print(f"Compressor: {kept}", markup=False)


def print_demo(number: int, result: DemoResult) -> None:
    """One question of the demo."""
    out.print(f"\n[bold]{number}. {result.question}[/bold]")
    out.print(f"   {result.answer}", style="green", markup=False)
    for source in result.sources:
        out.print(
            f"   [{source.number}] {source.title} (score {source.score:.2f})",
            style="dim",
            markup=False,
        )
    out.print(
        f"   {result.hits} of {len(result.sources)} chunks were cached before; "
        f"{result.source_tokens} source tokens as {result.kv_entries} KV entries, "
        f"{human_bytes(result.kv_bytes)}"
    )
    out.print(
        f"   first token after {result.ttft_s:.3f} s; reading the text anew: "
        f"{result.ttft_full_text_s:.3f} s ({result.ttft_full_text_s / result.ttft_s:.1f}x)"
    )


def answer_as_json(question: str, answer: Answer, hits: list[Hit]) -> dict[str, Any]:
    """An answer with its sources, best first, as JSON holds it."""
    sources = [
        {
            "number": number,
            "title": hit.chunk.title,
            "id": hit.chunk.id,
            "score": hit.score,
            "status": report.status,
        }
        for number, (hit, report) in enumerate(
            zip(hits, reversed(answer.chunks), strict=True), start=1
        )
    ]
    return {
        "question": question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "sources": sources,
        "usage": asdict(answer.usage),
        "timings": asdict(answer.timings),
    }


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def human_bytes(count: int) -> str:
    """A size as people read it."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def human_time(seconds: float) -> str:
    """A duration as people read it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def print_estimate(expected: Estimate, folder: Path) -> None:
    """What a precompression will take, on standard error."""
    counted = (
        "counted" if expected.counted == 1 else f"estimated from {expected.counted:.0%} of the text"
    )
    done = f"{expected.hits:,} are there, {expected.empty:,} empty, {expected.bad:,} too long"
    line = f"{expected.chunks:,} chunks, {done}; {expected.source_tokens:,} tokens to compress"
    notes.print(f"{line} ({counted})", soft_wrap=True)
    if expected.tokens_per_s is not None:
        notes.print(
            f"about {human_time(expected.seconds)} at the {expected.tokens_per_s:,.0f} tokens/s "
            f"just measured, {human_bytes(expected.nbytes)} of anchors, into {folder}",
            markup=False,
            soft_wrap=True,
        )


def print_precompressed(done: PrecompressReport, indexed: int | None) -> None:
    """What a precompression did."""
    rate = done.source_tokens / done.seconds
    out.print(
        f"{done.chunks} chunks: {done.computed} compressed now ({done.source_tokens} tokens to "
        f"{done.anchors} anchors, {human_bytes(done.nbytes)}, {human_time(done.seconds)}, "
        f"{rate:,.0f} tokens/s, {done.padding:.0%} padding), {done.hits} there before"
    )
    for count, what in (
        (indexed, "newly indexed"),
        (done.deleted, "entries of former versions deleted"),
        (len(done.bad), "too long and left out"),
        (done.workers_lost, "workers lost, their work done again"),
    ):
        if count:
            out.print(f"{count} {what}")


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def print_account(answer: Answer, hits: list[Hit]) -> None:
    """Sources, best first, and what the answer cost."""
    out.print("\n")
    for number, (hit, report) in enumerate(
        zip(hits, reversed(answer.chunks), strict=True), start=1
    ):
        out.print(
            f"[{number}] {hit.chunk.title or hit.chunk.id or 'untitled'}  "
            f"(score {hit.score:.2f}, {report.status})",
            style="dim",
            markup=False,
        )
    usage = answer.usage
    out.print(
        f"{usage.source_tokens} source tokens as {usage.anchors_from_store} cached and "
        f"{usage.anchors_computed} new anchors ({human_bytes(usage.kv_bytes)}); first token after "
        f"{answer.timings.time_to_first_token_s:.2f} s",
        style="dim",
    )


def print_models(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """The default models, and what of them is on this disk."""
    table = Table("name", "kind", "from", "licence", "on disk", box=None, pad_edge=False)
    for row in rows:
        size = "not pulled" if row["bytes"] is None else human_bytes(row["bytes"])
        table.add_row(row["name"], row["kind"], row["package"], row["licence"], size)
    out.print(table)
    out.print(f"in {folder}", style="dim", markup=False)


def print_store(folder: Path, stats: StoreStats) -> None:
    """What is in a store, and what became of the rest."""
    table = Table(show_header=False, box=None, pad_edge=False)
    index, aside = human_bytes(stats.index_nbytes), human_bytes(stats.quarantined_nbytes)
    table.add_row("entries", f"{stats.entries}, {human_bytes(stats.nbytes)}, index {index}")
    if stats.ratio is not None:
        table.add_row("ratio", f"{stats.ratio:.1f}x")
    table.add_row("documents", str(stats.documents))
    table.add_row("pinned", str(stats.pinned))
    table.add_row("encrypted", "no" if stats.cipher is None else f"with key {stats.cipher}")
    if stats.oldest_s is not None and stats.newest_s is not None:
        table.add_row("stored", f"{_ago(stats.newest_s)} to {_ago(stats.oldest_s)} ago")
    if stats.unused_s is not None:
        table.add_row("evicted next", f"last used {_ago(stats.unused_s)} ago")
    rate = "" if stats.hit_rate is None else f" ({stats.hit_rate:.1%})"
    table.add_row("hits", f"{stats.hits} of {stats.hits + stats.misses} asked for{rate}")
    for reason, count in sorted(stats.reasons.items(), key=lambda item: -item[1]):
        table.add_row(f"  missed, {reason}", str(count))
    table.add_row("evicted ever", f"{stats.evicted}, {human_bytes(stats.evicted_nbytes)}")
    table.add_row("bad ever", f"{stats.set_aside}; in quarantine {stats.quarantined}, {aside}")
    out.print(table)
    for made_by in stats.fingerprints:
        size = f"{made_by.entries} entries, {human_bytes(made_by.nbytes)}"
        size += "" if made_by.ratio is None else f", {made_by.ratio:.1f}x"
        out.print(f"\nfingerprint {made_by.fingerprint or 'not told'}: {size}", markup=False)
        for name, value in sorted((made_by.fields or {}).items()):
            out.print(f"  {name} = {value}", style="dim", markup=False)
    out.print(f"\nin {folder}", style="dim", markup=False)


def print_speed(model: str, rows: Sequence[SpeedRow]) -> None:
    """Times to the first token and after it, a row for each setting."""
    columns = ("k", "ratio", "heads", "store", "entries", "KV", "TTFT", "a token", "floor")
    table = Table(*columns, "full text", "speed-up", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            str(row.k),
            "full" if row.ratio == 1 else f"{row.ratio}x",
            "equal" if row.budget == "uniform" else row.budget,
            row.store,
            str(row.kv_entries),
            human_bytes(row.kv_bytes),
            f"{row.ttft_s:.3f} s",
            f"{row.token_s:.3f} s",
            f"{row.floor_s:.3f} s",
            f"{row.full_text_s:.2f} s",
            f"{row.full_text_s / row.ttft_s:.1f}x",
        )
    out.print(f"{model}, {rows[0].dtype}, chunks of 510 tokens; TTFT = time to first token\n")
    out.print(table)


def print_throughput(model: str, rows: Sequence[ThroughputRow]) -> None:
    """Tokens a second of compressing, a row for each compressor."""
    columns = ("method", "ratio", "padding", "plain prefill", "compressing", "", "into a store", "")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        stored = row.stored_tokens_per_s, row.stored_relative
        table.add_row(
            row.method,
            f"{row.ratio}x",
            f"{row.padding:.0%}",
            f"{row.plain_tokens_per_s:,.0f} tokens/s",
            f"{row.tokens_per_s:,.0f} tokens/s",
            f"{row.relative:.2f}",
            "" if stored[0] is None else f"{stored[0]:,.0f} tokens/s",
            "" if stored[1] is None else f"{stored[1]:.2f}",
        )
    out.print(f"{model}, {rows[0].dtype}, passes of at most {rows[0].batch_tokens} tokens\n")
    out.print(table)


def print_quality(model: str, result: QualityResult) -> None:
    """How one system answered."""
    columns = ("system", "ratio", "k", "questions", "EM", "F1", "95 % of F1", "contains", "ended")
    # The generator is the user's own, unless this says otherwise.
    adapted = ("generator adapter",) if result.generator_adapter else ()
    table = Table(*columns, *adapted, box=None, pad_edge=False)
    low, high = result.f1_interval
    table.add_row(
        result.system,
        "-" if result.ratio is None else f"{result.ratio}x",
        str(result.k),
        str(result.n),
        f"{result.em:.3f}",
        f"{result.f1:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{result.contains:.3f}",
        "-" if result.ended is None else f"{result.ended:.3f}",
        *(f"rank {result.generator_adapter}" for _ in adapted),
    )
    out.print(f"{model}, {result.dtype}, seed {result.seed}, {result.seconds:.0f} s\n")
    out.print(table)
