"""bench: measurements that anyone can take again. Knows nothing of how they are taken."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sac_rag.cli.console import AsJson, Dtype, all_models, loading, progress, pull_missing
from sac_rag.cli.render import (
    notes,
    out,
    print_json,
    print_speed,
    print_throughput,
)
from sac_rag.cli.tables import print_dropin, print_dtypes, print_lookups, print_reads

app = typer.Typer(no_args_is_help=True, help="Measurements that anyone can take again.")


class ReadAs(str, Enum):
    """What chunks are attended to as."""

    text = "text"
    anchors = "anchors"


@app.command()
def speed(
    k: Annotated[list[int] | None, typer.Option(min=1, help="Chunks; may be repeated.")] = None,
    ratio: Annotated[
        list[int] | None, typer.Option(min=1, help="Source tokens per anchor; may be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Default model, local folder or hub id.")
    ] = "smollm2-135m",
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the fastest here.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Best of so many.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Times the first token: cached anchors against reading the text, in one process."""
    pull_missing()
    with loading():
        from sac_rag.benchmarks.first_token import measure
        from sac_rag.compressors import checkpoint
        from sac_rag.demo import wikipedia_leads
        from sac_rag.lm.generator import Generator

        generator = Generator.from_pretrained(model, dtype=dtype.value if dtype else None)
        folder = checkpoint.find(checkpoint.default(model), model)
    rows = []
    with progress("measuring", show=not as_json) as advance:
        for row in measure(
            generator,
            (lead.text for lead in wikipedia_leads()),
            ks=k or (1, 4, 8),
            ratios=ratio or (1, 5, 15),
            compressor=checkpoint.load(folder, generator) if folder else None,
            repeats=repeats,
        ):
            advance(1)
            rows.append(row)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
    else:
        print_speed(model, rows)


@app.command()
def quality(
    data: Annotated[list[Path], typer.Option(help="Questions with answers, as for evaluate.")],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of answers and figures; run again to go on.")
    ] = Path("runs/quality"),
    k: Annotated[list[int] | None, typer.Option(min=1, help="Chunks; may be repeated.")] = None,
    ratio: Annotated[
        list[int] | None, typer.Option(min=1, help="Source tokens per anchor; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions. Default: all.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions, distractors and places.")] = 0,
    model: Annotated[
        str, typer.Option(help="Default model, local folder or hub id.")
    ] = "smollm2-135m",
    compressor: Annotated[
        str, typer.Option(help="'shipped', 'fitted' or the folder of a compressor.")
    ] = "shipped",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="full-text, truncated, no-text, compressed or uniform (anchors, equal heads) "
            "alone; may be repeated. Default: all."
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the fastest here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answers the same questions from text, from nothing and from anchors at several ratios."""
    from sac_rag.evaluation.questions import read_questions
    from sac_rag.evaluation.sample import draw

    examples = list(read_questions(data))
    samples = [draw(examples, k=chunks, limit=limit, seed=seed) for chunks in k or (1, 4)]
    if model in all_models():
        pull_missing([model])
    with loading():
        from sac_rag import SacRAG
        from sac_rag.evaluation import comparison

        rag = SacRAG.from_pretrained(
            model, compressor=compressor, dtype=dtype.value if dtype else None
        )
    results = []
    kinds = only or comparison.KINDS
    for result in comparison.compare(rag, samples, ratio or (1, 2, 5, 15), folder, kinds=kinds):
        results.append(result)
        notes.print(
            f"{result.system}, ratio {result.ratio or 'none'}, {result.budget or 'no'} budget, "
            f"k={result.k}: F1 {result.f1:.3f}, "
            f"{result.seconds:.0f} s",
            markup=False,
        )
    if as_json:
        print_json({"model": model, "rows": [asdict(result) for result in results]})
    else:
        out.print(comparison.to_markdown(results), markup=False)


@app.command()
def dropin(
    data: Annotated[list[Path], typer.Option(help="Questions with answers, as for evaluate.")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Questions to draw.")] = 40,
    k: Annotated[
        list[int] | None, typer.Option("--k", "-k", min=1, help="Chunks; may be repeated.")
    ] = None,
    ratio: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Source tokens per anchor; may be repeated. Default: the compressor's."
        ),
    ] = None,
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
    seed: Annotated[int, typer.Option(min=0, help="Of the questions, distractors and places.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions answered together in LangChain.")
    ] = 8,
    model: Annotated[
        str, typer.Option(help="Default model, local folder or hub id.")
    ] = "smollm2-135m",
    compressor: Annotated[
        str | None,
        typer.Option(help="'shipped', 'fitted', 'full' or the folder of a compressor."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the fastest here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answers in LangChain's and LlamaIndex's own prompts, through the adapters."""
    from sac_rag.evaluation.questions import read_questions
    from sac_rag.evaluation.sample import draw

    examples = list(read_questions(data))
    samples = [draw(examples, k=chunks, limit=limit, seed=seed) for chunks in k or (1, 4)]
    with loading():
        from sac_rag.evaluation.dropin import measure, select_prompts

        prompts = select_prompts(prompt or (), framework or (), instructions=instructions)
    if model in all_models():
        pull_missing([model])
    with loading():
        from sac_rag import SacRAG
        from sac_rag.stores import MemoryStore

        rag = SacRAG.from_pretrained(
            model,
            compressor=compressor,
            store=MemoryStore(6 * 2**30),
            dtype=dtype.value if dtype else None,
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
            # Whatever ends a long run, this much is known.
            notes.print(json.dumps(row.to_dict()), markup=False, soft_wrap=True)
    if as_json:
        print_json({"model": model, "rows": [row.to_dict() for row in rows]})
    else:
        print_dropin(model, rag.generator.dtype_name, rows)


@app.command()
def precompress(
    model: Annotated[
        str, typer.Option(help="Default model, local folder or hub id.")
    ] = "smollm2-135m",
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the fastest here.")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks compressed each time.")] = 16,
    chunk_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the longest.")] = 256,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a pass, on both sides.")] = (
        2048
    ),
    repeats: Annotated[int, typer.Option(min=1, help="The median of so many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Times compressing into a store: against a plain prefill of the same tokens, by turns."""
    pull_missing()
    with loading():
        from sac_rag.benchmarks.throughput import measure
        from sac_rag.demo import wikipedia_leads
        from sac_rag.lm.generator import Generator

        generator = Generator.from_pretrained(model, dtype=dtype.value if dtype else None)
    rows = []
    with progress("measuring", show=not as_json) as advance:
        for row in measure(
            generator,
            (lead.text for lead in wikipedia_leads()),
            chunks=chunks,
            chunk_tokens=chunk_tokens,
            batch_tokens=batch_tokens,
            repeats=repeats,
        ):
            advance(1)
            rows.append(row)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
    else:
        print_throughput(model, rows)


@app.command()
def dtypes(
    data: Annotated[list[Path], typer.Option(help="Questions with answers, as for evaluate.")],
    limit: Annotated[int, typer.Option(min=1, help="Questions to draw.")] = 40,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Chunks to answer from.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions.")] = 0,
    model: Annotated[
        str, typer.Option(help="Default model, local folder or hub id.")
    ] = "smollm2-135m",
    compressor: Annotated[
        str | None,
        typer.Option(help="'shipped', 'fitted', 'full' or the folder of a compressor."),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="What the model computes in; float32 shows all rounding.")
    ] = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Compares stored dtypes: bytes, logits, greedy answers and their F1."""
    from sac_rag.evaluation.questions import read_questions
    from sac_rag.evaluation.sample import draw

    sample = draw(read_questions(data), k=k, limit=limit, seed=seed)
    pull_missing()
    with loading():
        from sac_rag import SacRAG
        from sac_rag.benchmarks.dtypes import measure
        from sac_rag.compressors import checkpoint
        from sac_rag.prompts.format import SPANS

        folder = checkpoint.find(compressor or checkpoint.default(model), model)
        own = checkpoint.load_prompt_format(folder) if folder else None
        rag = SacRAG.from_pretrained(
            model, compressor=compressor, prompt_format=own or SPANS, dtype=dtype.value
        )
    with progress("answering", total=len(sample.trials), show=not as_json) as advance:
        rows = measure(rag, sample, on_progress=advance)
    if as_json:
        print_json({"model": model, "dtype": dtype.value, "rows": [asdict(row) for row in rows]})
    else:
        print_dtypes(model, dtype.value, rows)


@app.command()
def store(
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure. Default: a temporary folder.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Best of so many.")] = 200,
    entries: Annotated[int, typer.Option(min=1, help="To look up among so many.")] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Times reading a chunk of 510 tokens at 5x, beside bare safetensors, and looking chunks up."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        with loading():
            from sac_rag.benchmarks.store import measure_lookups, measure_reads

            rows = measure_reads(Path(place), repeats=repeats)
        with progress("filling a store", total=entries, show=not as_json) as advance:
            lookups = measure_lookups(Path(place) / "many", entries, repeats, advance)
    if as_json:
        print_json(
            {
                "reads": [{**asdict(row), "ratio": row.ratio} for row in rows],
                "lookups": {**asdict(lookups), "lookup_ms": lookups.lookup_ms},
            }
        )
    else:
        print_reads(rows)
        print_lookups(lookups)
