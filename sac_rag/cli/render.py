"""What commands print: results as one JSON value or as text and tables, sizes and times."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from sac_rag.benchmarks.dtypes import DtypeRow
    from sac_rag.benchmarks.load import LoadReport
    from sac_rag.benchmarks.serving import ServingReport
    from sac_rag.benchmarks.store import LookupSpeed, PrefetchSpeed, ReadSpeed
    from sac_rag.benchmarks.throughput import ThroughputRow
    from sac_rag.collection import Collection
    from sac_rag.demo import DemoResult
    from sac_rag.evaluation.dropin import DropinResult
    from sac_rag.evaluation.peers.registry import PeerStatus
    from sac_rag.evaluation.quality import QualityResult
    from sac_rag.precompress.estimate import Estimate
    from sac_rag.precompress.job import JobReport
    from sac_rag.reports import Answer
    from sac_rag.retrieval.index import Hit
    from sac_rag.stores.disk import StoreStats
    from sac_rag.training.anchor_oracle import AnchorChoice
    from sac_rag.training.fit_figures import FitFigure
    from sac_rag.training.sinks import SinkScore
    from sac_rag.training.step_speed import StepSpeed


def _literal(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console for any text: a title may have [brackets] or :colons:, no path is ever broken."""
    return Console(
        stderr=stderr, width=width, markup=False, emoji=False, highlight=False, soft_wrap=True
    )


out = _literal()
notes = _literal(stderr=True)


def write(value: object, show: Callable[[], None], *, as_json: bool) -> None:
    """Writes the result of a command, as JSON or as text.

    Args:
        value: What --json prints; may hold dataclasses, which JSON holds as objects: what their
            `to_dict` gives, if they have one, or else their fields.
        show: Prints the same for people.
        as_json: Which of both.
    """
    if as_json:
        print_json(value)
    else:
        show()


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    text = json.dumps(value, ensure_ascii=False, indent=2, default=_as_json)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # the same value in ASCII
        text = json.dumps(value, indent=2, default=_as_json)
    sys.stdout.write(text + "\n")


def _as_json(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"JSON cannot hold a {type(value).__name__}: {value!r:.80}")


def _table(*columns: str, show_header: bool = True) -> Table:
    return Table(*columns, box=None, pad_edge=False, show_header=show_header)


def _print_table(table: Table) -> None:
    """A table, as wide as its cells unless it is on a terminal."""
    (out if out.is_terminal else _literal(width=10_000)).print(table)


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


def print_introduction(collection: Collection, folder: Path) -> None:
    """The demo's chunks, model and compressor."""
    compressor = collection.rag.compressor
    out.print(
        f"{len(collection.index)} chunks of Wikipedia leads, {collection.settings.model} in "
        f"{collection.rag.generator.dtype_name}, in {folder}",
    )
    method = (
        "full: every token's KV is kept"
        if compressor.method == "full"
        else f"{compressor.method} at {compressor.config.ratio}x: one token's KV in "
        f"{compressor.config.ratio} is kept"
    )
    out.print(f"Compressor: {method}")


def print_demo(number: int, result: DemoResult) -> None:
    """One question of the demo."""
    out.print(f"\n{number}. {result.question}", style="bold")
    out.print(f"   {result.answer}", style="green")
    for source in result.sources:
        out.print(
            f"   [{source.number}] {source.title} (score {source.score:.2f})",
            style="dim",
        )
    out.print(
        f"   {result.hits} of {len(result.sources)} chunks were cached before; "
        f"{result.source_tokens} source tokens as {result.kv_entries} KV entries, "
        f"{human_bytes(result.kv_bytes)}"
    )
    ours = result.ttft_s, result.answer_s
    out.print(
        f"   first token after {ours[0]:.2f} s, all {result.answer_tokens} after {ours[1]:.2f} s"
    )
    for name, first, last in (
        ("HF, reading the text", result.ttft_full_text_s, result.answer_full_text_s),
        ("llama.cpp, reading the text", result.ttft_llama_cpp_s, result.answer_llama_cpp_s),
    ):
        if first is not None and last is not None:
            times = f"{first:.2f} s ({first / ours[0]:.1f}x), {last:.2f} s ({last / ours[1]:.1f}x)"
            out.print(f"   {name}: {times}")


def answer_as_json(question: str, answer: Answer, hits: list[Hit]) -> dict[str, Any]:
    """An answer with its sources, best first, as JSON holds it."""
    sources = [
        {
            "number": number,
            "title": hit.chunk.title,
            "id": hit.chunk.id,
            "documents": list(hit.documents),
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


def print_estimate(expected: Estimate, folder: Path) -> None:
    """The time and bytes that a precompression will take, on standard error."""
    counted = (
        "counted" if expected.counted == 1 else f"estimated from {expected.counted:.0%} of the text"
    )
    rest = f"{expected.hits:,} are there, {expected.empty:,} empty, {expected.bad:,} too long"
    line = f"{expected.chunks:,} chunks, {rest}; {expected.source_tokens:,} tokens to compress"
    notes.print(f"{line} ({counted})")
    if expected.tokens_per_s is not None:
        notes.print(
            f"about {human_time(expected.seconds)} at the {expected.tokens_per_s:,.0f} tokens/s "
            f"just measured, {human_bytes(expected.nbytes)} of anchors, into {folder}",
        )


def print_precompressed(report: JobReport) -> None:
    """The counts of a precompression."""
    counts = report.counts
    rate = counts.source_tokens / counts.seconds
    out.print(
        f"{counts.chunks} chunks: {counts.computed} compressed now ({counts.source_tokens} tokens "
        f"to {counts.anchors} anchors, {human_bytes(counts.nbytes)}, {human_time(counts.seconds)}, "
        f"{rate:,.0f} tokens/s, {counts.padding:.0%} padding), {counts.hits} there before"
    )
    for count, what in (
        (report.indexed, "newly indexed"),
        (counts.deleted, "entries of former versions deleted"),
        (len(counts.bad), "too long and left out"),
        (counts.workers_lost, "workers lost, their work done again"),
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
        others = "".join(f", also in {name}" for name in hit.documents[1:])
        out.print(
            f"[{number}] {hit.chunk.title or hit.chunk.id or 'untitled'}{others}  "
            f"(score {hit.score:.2f}, {report.status})",
            style="dim",
        )
    usage = answer.usage
    out.print(
        f"{usage.source_tokens} source tokens as {usage.anchors_from_store} cached and "
        f"{usage.anchors_computed} new anchors ({human_bytes(usage.kv_bytes)}); first token after "
        f"{answer.timings.time_to_first_token_s:.2f} s",
        style="dim",
    )


def print_models(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """The default models, and their bytes on this disk."""
    table = _table("name", "kind", "from", "licence", "on disk")
    for row in rows:
        size = "not pulled" if row["bytes"] is None else human_bytes(row["bytes"])
        table.add_row(row["name"], row["kind"], row["package"], row["licence"], size)
    _print_table(table)
    out.print(f"in {folder}", style="dim")


def print_store(folder: Path, stats: StoreStats) -> None:
    """The contents of a store, and the reasons of its misses."""
    table = _table(show_header=False)
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
    table.add_row(
        "bad ever", f"{stats.total_quarantined}; in quarantine {stats.quarantined}, {aside}"
    )
    _print_table(table)
    for made_by in stats.fingerprints:
        size = f"{made_by.entries} entries, {human_bytes(made_by.nbytes)}"
        size += "" if made_by.ratio is None else f", {made_by.ratio:.1f}x"
        out.print(f"\nfingerprint {made_by.fingerprint or 'not recorded'}: {size}")
        for name, value in sorted((made_by.fields or {}).items()):
            out.print(f"  {name} = {value}", style="dim")
    out.print(f"\nin {folder}", style="dim")


def print_throughput(model: str, rows: Sequence[ThroughputRow]) -> None:
    """Tokens per second of compressing, a row per compressor."""
    columns = ("method", "ratio", "padding", "plain prefill", "compressing", "", "into a store", "")
    table = _table(*columns)
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
    _print_table(table)


def print_quality(model: str, result: QualityResult) -> None:
    """The scores of one system."""
    columns = ("system", "ratio", "k", "questions", "EM", "F1", "95 % of F1", "contains", "ended")
    # The generator is the user's own, unless this says otherwise.
    adapted = ("generator adapter",) if result.generator_adapter else ()
    retrieved = () if result.recall is None else ("gold found",)
    table = _table(*columns, *retrieved, *adapted)
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
        *(f"{result.recall:.3f}" for _ in retrieved),
        *(f"rank {result.generator_adapter}" for _ in adapted),
    )
    out.print(f"{model}, {result.dtype}, seed {result.seed}, {result.seconds:.0f} s\n")
    _print_table(table)


def print_dtypes(model: str, dtype: str, rows: Sequence[DtypeRow]) -> None:
    """Stored dtypes beside float32, which holds the computed values."""
    columns = ("stored", "entry", "logits", "at most", "KL", "same answers", "F1", "change")
    table = _table(*columns)
    for row in rows:
        table.add_row(
            row.stored_dtype,
            human_bytes(round(row.entry_bytes)),
            f"{row.logit_rms:.4f}",
            f"{row.logit_max:.3f}",
            f"{row.kl:.1e}",
            f"{row.same_answers:.1%}",
            f"{row.f1:.3f}",
            f"{row.f1_change:+.3f}",
        )
    out.print(f"{model}, {dtype}, {rows[0].n} questions; logits: root mean square of errors\n")
    _print_table(table)


def print_dropin(model: str, dtype: str, rows: Sequence[DropinResult]) -> None:
    """Prompts of the frameworks, a table per number of chunks and ratio."""
    columns = ("framework", "prompt", "n", "F1", "gold", "words", "ended", "empty", "repeated")
    out.print(
        f"{model}, {dtype}; gold: contained in the answer; words: median; repeated: word bigrams",
    )
    groups: dict[tuple[int, int], list[DropinResult]] = {}
    for row in rows:
        groups.setdefault((row.k, row.ratio or 0), []).append(row)
    # Text first, then anchors by ratio; within that as they were measured.
    for (k, ratio), group in sorted(groups.items()):
        table = _table(*columns)
        for row in group:
            table.add_row(
                row.framework,
                row.prompt,
                str(row.n),
                *("-" if score is None else f"{score:.3f}" for score in (row.f1, row.contains)),
                f"{row.words:.1f}",
                *(f"{share:.2f}" for share in (row.ended, row.empty, row.repeated)),
            )
        out.print(f"\nk={k}, {f'anchors, {ratio}x' if ratio else 'text'}\n")
        _print_table(table)


def print_reads(rows: Sequence[ReadSpeed]) -> None:
    """Reading times of a store beside those of safetensors."""
    columns = ("stored", "entry", "store", "half", "safetensors", "ratio", "read", "mapped")
    table = _table(*columns)
    for row in rows:
        seconds = (row.store_s, row.half_s, row.safetensors_s, row.read_s, row.mapped_s)
        store, half, safetensors, read, mapped = (f"{1000 * s:.3f} ms" for s in seconds)
        size = human_bytes(row.nbytes)
        name = f"{row.stored_dtype}, encrypted" if row.encrypted else row.stored_dtype
        table.add_row(name, size, store, half, safetensors, f"{row.ratio:.2f}", read, mapped)
    _print_table(table)


def print_lookups(speeds: Sequence[LookupSpeed]) -> None:
    """Times of stores by their number of entries."""
    table = _table("entries", "read", "bytes alone", "miss", "write", "forget", "open", "index")
    for speed in speeds:
        ms = (speed.hit_ms, speed.read_ms, speed.miss_ms, speed.put_ms, speed.forget_ms)
        times = [f"{value:.3f} ms" for value in (*ms, speed.open_ms)]
        table.add_row(f"{speed.entries:,}", *times, human_bytes(speed.index_nbytes))
    _print_table(table)


def print_prefetch(speed: PrefetchSpeed) -> None:
    """Times of reading with and without a prefetch."""
    out.print(
        f"eight entries: {speed.warm_ms:.1f} ms from the system's memory, {speed.cold_ms:.1f} ms "
        f"from the disk, {speed.prefetched_ms:.1f} ms from the disk prefetched"
    )


def print_load(report: LoadReport) -> None:
    """What came of a store under load."""
    out.print(
        f"{report.operations} operations in {report.seconds:.0f} s: {report.hits} right reads, "
        f"{report.writes} writes, {report.forgotten} documents forgotten, {report.rekeys} changes "
        f"of the key, {report.refused} refused; {report.kills} kills, {report.stops} stops, "
        f"{report.moves} moves of the folder"
    )
    out.print(f"{report.wrong} wrong, {report.lost} lost, {report.hung} hung")
    for problem in report.problems:
        out.print(problem, style="yellow")


def print_serving(report: ServingReport) -> None:
    """What clients got from the endpoint."""
    out.print(
        f"{report.requests} requests in {report.seconds:.0f} s, "
        f"{sum(report.failed.values())} failed"
    )
    table = _table("clients", "answers/s", "median", "p99")
    table.add_row("1", f"{report.alone_per_s:.2f}", f"{report.alone_s:.2f} s", "")
    waits = (f"{report.together_s:.2f} s", f"{report.together_p99_s:.2f} s")
    table.add_row(str(report.clients), f"{report.together_per_s:.2f}", *waits)
    _print_table(table)
    out.print(f"{report.speedup:.2f} times one by one, the median of rounds")
    for reason, count in report.failed.items():
        out.print(f"{count} failed: {reason}", style="yellow")


def print_anchors(rows: Sequence[AnchorChoice]) -> None:
    """Selections of anchors from the same KV, best first at each ratio."""
    columns = ("ratio", "chosen by", "attention kept", "loss", "accuracy")
    table = _table(*columns)
    for row in sorted(rows, key=lambda row: (row.ratio, row.loss)):
        figures = (f"{row.attention_kept:.1%}", f"{row.loss:.3f}", f"{row.accuracy:.3f}")
        table.add_row(f"{row.ratio}x", row.anchors, *figures)
    _print_table(table)


def print_sinks(rows: Sequence[SinkScore]) -> None:
    """A row per sink: loss and accuracy in each prompt."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    table = _table("sink", *prompts)
    for sink in dict.fromkeys(row.sink for row in rows):
        of_sink = {row.prompt: row for row in rows if row.sink == sink}
        scored = (of_sink[prompt] for prompt in prompts)
        table.add_row(sink, *(f"{row.loss:.3f} / {row.accuracy:.3f}" for row in scored))
    out.print("loss, nats per token / share of tokens right, every token kept\n")
    out.print(table)


def print_peers(rows: Sequence[PeerStatus]) -> None:
    """A row per peer: what it does, its package, and why it cannot run."""
    table = Table(
        Column("peer", no_wrap=True),
        Column("package", no_wrap=True),
        "what it does",
        "cannot run because",
        box=None,
        pad_edge=False,
    )
    for row in rows:
        package = f"{row.package} {row.version}".strip() or "sac-rag"
        table.add_row(row.name, package, row.does, row.reason)
    out.print(table)


def print_fit(figures: Sequence[FitFigure]) -> None:
    """Each prompt at each ratio, and beside it the same scorer's anchors with equal heads."""
    columns = ("prompt", "ratio", "attention kept", "loss", "accuracy", "equal heads:", "", "")
    table = _table(*columns)
    by_setting = {(row.prompt, row.ratio, row.budget): row for row in figures}
    for row in figures:
        if row.budget != "shared":
            continue
        equal = by_setting.get((row.prompt, row.ratio, "uniform"))
        cells = [
            cell
            for of in (row, equal)
            if of is not None
            for cell in (f"{of.attention_kept:.1%}", f"{of.loss:.3f}", f"{of.accuracy:.3f}")
        ]
        table.add_row(row.prompt, "all kept" if row.ratio == 1 else f"{row.ratio}x", *cells)
    _print_table(table)


def print_steps(rows: Sequence[StepSpeed]) -> None:
    """Tokens per second of training and of the model alone."""
    table = _table("what", "tokens", "seconds", "tokens/s")
    for row in rows:
        figures = (f"{row.tokens:,}", f"{row.seconds:.2f}", f"{row.tokens_per_s:,.0f}")
        table.add_row(row.what, *figures)
    _print_table(table)
