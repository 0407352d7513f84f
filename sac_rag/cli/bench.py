"""bench: measurements that anyone can repeat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sac_rag.cli.console import loading, pull_if_default
from sac_rag.cli.options import (
    AsJson,
    BatchSize,
    Compressor,
    CompressorOrDefault,
    Dtype,
    DtypeOrDefault,
    Limit,
    LimitOrAll,
    MaxNewTokens,
    Model,
    NumChunks,
    NumsOfChunks,
    Questions,
    Ratios,
    Repeats,
    Seed,
    name_of,
)
from sac_rag.cli.progress import progress
from sac_rag.cli.render import (
    human_bytes,
    notes,
    out,
    print_dropin,
    print_dtypes,
    print_serving,
    print_throughput,
    write,
)

if TYPE_CHECKING:
    from sac_rag.evaluation.sample import Sample

SPEED_TEXT = "wikipedia-leads"  # what speed is measured on

app = typer.Typer(no_args_is_help=True, help="Measurements that anyone can take again.")


class ReadAs(str, Enum):
    """What chunks are attended to as."""

    text = "text"
    anchors = "anchors"


@app.command()
def speed(
    k: NumsOfChunks = None,
    ratio: Ratios = None,
    store: Annotated[
        list[str] | None,
        typer.Option(
            help="disk, memory or cold (on disk alone); may be repeated. Default: the first two."
        ),
    ] = None,
    answer_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Length of the answer; may be repeated. Default: 1 and 32."),
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each chunk.")] = 510,
    gguf: Annotated[Path | None, typer.Option(help="The same model for llama.cpp.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: CUDA if there is one.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for speed.json, speed.md and speed.png.")
    ] = None,
    model: Model = "smollm2-135m",
    dtype: DtypeOrDefault = None,
    repeats: Repeats = 3,
    as_json: AsJson = False,
) -> None:
    """Times first token and answer from anchors, in turn with HF and llama.cpp reading the text."""
    pull_if_default(model, SPEED_TEXT)
    with loading():
        import torch

        from sac_rag.benchmarks.side_by_side import Settings, measure, to_markdown, write_files
        from sac_rag.compressors import checkpoint
        from sac_rag.demo import wikipedia_leads
        from sac_rag.lm.generator import Generator

        if threads is not None:
            torch.set_num_threads(threads)
        # A second model for HF, without the compressor's LoRA beside its weights.
        generator, plain = (
            Generator.from_pretrained(model, device=device, dtype=name_of(dtype)) for _ in range(2)
        )
        trained = checkpoint.find(checkpoint.default(model), model)
    settings = Settings(
        ks=k or (1, 4, 8),
        ratios=ratio or (1, 5, 15),
        stores=store or ("disk", "memory"),
        answer_tokens=answer_tokens or (1, 32),
        chunk_tokens=chunk_tokens,
        repeats=repeats,
        gguf=gguf,
    )
    rows = []
    with progress("measuring", show=not as_json) as advance:
        for row in measure(
            generator,
            (lead.text for lead in wikipedia_leads()),
            settings,
            compressor=checkpoint.load(trained, generator) if trained else None,
            plain=plain,
        ):
            advance(1)
            rows.append(row)
    if folder is not None:
        write_files(rows, folder)
    write({"rows": rows}, lambda: out.print(to_markdown(rows)), as_json=as_json)


@app.command()
def quality(
    data: Questions,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of answers and figures; run again to resume.")
    ] = Path("runs/quality"),
    k: NumsOfChunks = None,
    ratio: Ratios = None,
    limit: LimitOrAll = 500,
    seed: Seed = 0,
    held_out_share: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Ask about this share of each file alone, the last articles, which `train` leaves "
            "out if it has the same share. Default: all.",
        ),
    ] = 1.0,
    close_distractors: Annotated[
        bool,
        typer.Option(
            "--close-distractors",
            help="Other passages are those with most of the question's words, as a search finds.",
        ),
    ] = False,
    model: Model = "smollm2-135m",
    compressor: Compressor = "shipped",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="full-text, truncated, closed-book, compressed or uniform (anchors, equal heads) "
            "alone; may be repeated. Default: all."
        ),
    ] = None,
    dtype: DtypeOrDefault = None,
    as_json: AsJson = False,
) -> None:
    """Answers the same questions from text, from nothing and from anchors at several ratios."""
    samples = samples_of(data, k or (1, 4), limit, seed, close_distractors, held_out_share)
    pull_if_default(model)
    with loading():
        from sac_rag import SacRAG
        from sac_rag.evaluation import comparison
        from sac_rag.evaluation.provenance import provenance

        rag = SacRAG.from_pretrained(model, compressor=compressor, dtype=name_of(dtype))
    results = []
    kinds = only or comparison.KINDS
    for result in comparison.compare(
        rag,
        samples,
        ratio or (1, 2, 5, 15),
        folder,
        kinds=kinds,
        labels=provenance(model, data),
    ):
        results.append(result)
        notes.print(
            f"{result.system}, ratio {result.ratio or 'none'}, {result.budget or 'no'} budget, "
            f"k={result.k}: F1 {result.f1:.3f}, "
            f"{result.seconds:.0f} s",
        )
    write(
        {"model": model, "rows": results},
        lambda: out.print(comparison.to_markdown(results)),
        as_json=as_json,
    )


@app.command()
def dropin(
    data: Questions,
    limit: Limit = 40,
    k: NumsOfChunks = None,
    ratio: Ratios = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="retrieval-qa, rag-prompt, tutorial (LangChain), compact, refine, tree-summarize, "
            "context-chat (LlamaIndex), own (the compressor's), summarise, list-facts or explain; "
            "may be repeated. Default: all but the last three."
        ),
    ] = None,
    framework: Annotated[
        list[str] | None,
        typer.Option(help="langchain or llama-index; may be repeated. Default: both."),
    ] = None,
    instructions: Annotated[
        bool, typer.Option("--instructions", help="Also summarise, list-facts and explain.")
    ] = False,
    read_as: Annotated[
        list[ReadAs] | None,
        typer.Option(help="text or anchors; may be repeated. Default: both."),
    ] = None,
    seed: Seed = 0,
    max_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 8,
    model: Model = "smollm2-135m",
    compressor: CompressorOrDefault = None,
    dtype: DtypeOrDefault = None,
    as_json: AsJson = False,
) -> None:
    """Answers in LangChain's and LlamaIndex's own prompts, through the adapters."""
    samples = samples_of(data, k or (1, 4), limit, seed)
    with loading():
        from sac_rag.evaluation.dropin import measure, select_prompts

        prompts = select_prompts(prompt or (), framework or (), instructions=instructions)
    pull_if_default(model)
    with loading():
        from sac_rag import SacRAG
        from sac_rag.stores import MemoryStore

        rag = SacRAG.from_pretrained(
            model, compressor=compressor, store=MemoryStore(6 * 2**30), dtype=name_of(dtype)
        )
    rows = []
    kinds = read_as or list(ReadAs)
    settings = (ReadAs.text in kinds) + len({*(ratio or (1,))}) * (ReadAs.anchors in kinds)
    total = settings * len(samples) * len(prompts)
    with progress("answering", total=total, show=not as_json) as advance:
        for row in measure(
            rag,
            samples,
            prompts,
            ratios=ratio or (),
            read_as=[kind.value for kind in kinds],
            max_new_tokens=max_tokens,
            batch_size=batch_size,
        ):
            advance(1)
            rows.append(row)
            # Printed at once: whatever ends a long run, these rows are not lost.
            notes.print(json.dumps(row.to_dict()))
    write(
        {"model": model, "rows": rows},
        lambda: print_dropin(model, rag.generator.dtype_name, rows),
        as_json=as_json,
    )


@app.command()
def precompress(
    model: Model = "smollm2-135m",
    compressor: CompressorOrDefault = None,
    dtype: DtypeOrDefault = None,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks compressed each time.")] = 16,
    chunk_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the longest.")] = 256,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a pass, on both sides.")] = (
        2048
    ),
    repeats: Repeats = 5,
    as_json: AsJson = False,
) -> None:
    """Times compressing into a store, in turn with a plain prefill of the same tokens."""
    pull_if_default(model, SPEED_TEXT)
    with loading():
        from sac_rag.benchmarks.throughput import measure
        from sac_rag.compressors import checkpoint
        from sac_rag.demo import wikipedia_leads
        from sac_rag.lm.generator import Generator

        generator = Generator.from_pretrained(model, dtype=name_of(dtype))
        trained = checkpoint.find(compressor or checkpoint.default(model), model)
    rows = []
    with progress("measuring", show=not as_json) as advance:
        for row in measure(
            generator,
            (lead.text for lead in wikipedia_leads()),
            compressor=checkpoint.load(trained, generator) if trained else None,
            chunks=chunks,
            chunk_tokens=chunk_tokens,
            batch_tokens=batch_tokens,
            repeats=repeats,
        ):
            advance(1)
            rows.append(row)
    write({"rows": rows}, lambda: print_throughput(model, rows), as_json=as_json)


@app.command()
def dtypes(
    data: Questions,
    limit: Limit = 40,
    k: NumChunks = 1,
    seed: Seed = 0,
    model: Model = "smollm2-135m",
    compressor: CompressorOrDefault = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype that the model computes in; float32 shows all rounding.")
    ] = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Compares stored dtypes: bytes, logits, greedy answers and their F1."""
    (sample,) = samples_of(data, (k,), limit, seed)
    pull_if_default(model)
    with loading():
        from sac_rag import SacRAG
        from sac_rag.benchmarks.dtypes import measure
        from sac_rag.compressors import checkpoint
        from sac_rag.prompts.format import SPANS

        folder = checkpoint.find(compressor or checkpoint.default(model), model)
        prompt_format = checkpoint.load_prompt_format(folder) if folder else None
        rag = SacRAG.from_pretrained(
            model, compressor=compressor, prompt_format=prompt_format or SPANS, dtype=dtype.value
        )
    with progress("answering", total=len(sample.trials), show=not as_json) as advance:
        rows = measure(rag, sample, on_progress=advance)
    write(
        {"model": model, "dtype": dtype.value, "rows": rows},
        lambda: print_dtypes(model, dtype.value, rows),
        as_json=as_json,
    )


@app.command()
def memory(
    k: NumsOfChunks = None,
    chunk_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each chunk.")] = 510,
    model: Model = "smollm2-135m",
    compressor: CompressorOrDefault = None,
    dtype: DtypeOrDefault = None,
    as_json: AsJson = False,
) -> None:
    """Measures the peak memory of a process that answers: from a store, an archive, the text."""
    pull_if_default(model, SPEED_TEXT)
    with loading():
        from sac_rag.benchmarks.memory import measure_memory
        from sac_rag.demo import wikipedia_leads
    rows = []
    with progress("answering", show=not as_json) as advance:
        for row in measure_memory(
            model,
            (lead.text for lead in wikipedia_leads()),
            ks=k or (1, 8),
            compressor=compressor,
            chunk_tokens=chunk_tokens,
            dtype=name_of(dtype),
        ):
            advance(1)
            rows.append(row)

    def show() -> None:
        for row in rows:
            loaded, peak = map(human_bytes, (row.loaded_bytes, row.peak_bytes))
            out.print(f"{row.k} chunks from the {row.way}: {peak}; {loaded} before the answer")

    write({"rows": rows}, show, as_json=as_json)


@app.command()
def serve(
    minutes: Annotated[float, typer.Option(min=0.01, help="How long.")] = 10.0,
    clients: Annotated[int, typer.Option(min=1, help="Clients at the same time.")] = 32,
    model: Model = "smollm2-135m",
    dtype: DtypeOrDefault = None,
    as_json: AsJson = False,
) -> None:
    """Asks the endpoint from many clients at the same time, in turn with one alone.

    Exit code 1 if a request has failed.
    """
    pull_if_default(model, SPEED_TEXT)
    with loading():
        from sac_rag import SacRAG
        from sac_rag.benchmarks.serving import measure_serving
        from sac_rag.demo import wikipedia_leads
        from sac_rag.server.service import Service

        service = Service(SacRAG.from_pretrained(model, dtype=name_of(dtype)), "served")
    with progress("asking", show=not as_json) as advance:
        report = measure_serving(
            service,
            wikipedia_leads()[:64],
            clients=clients,
            seconds=60 * minutes,
            on_progress=advance,
        )
    write(report, lambda: print_serving(report), as_json=as_json)
    if report.failed:
        raise typer.Exit(1)


def samples_of(
    data: Sequence[Path],
    ks: Sequence[int],
    limit: int | None,
    seed: int,
    close: bool = False,
    held_out_share: float = 1.0,
) -> list[Sample]:
    """The same questions for each number of chunks; see `sample.draw` and `questions.hold_out`."""
    from sac_rag.evaluation.questions import hold_out, read_questions
    from sac_rag.evaluation.sample import draw

    files = [list(read_questions([path])) for path in data]
    examples = [one for of_file in files for one in hold_out(of_file, held_out_share)[1]]
    return [draw(examples, k=k, limit=limit, seed=seed, close=close) for k in ks]
