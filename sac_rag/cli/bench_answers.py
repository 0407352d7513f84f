"""bench decode, same-answers and batch: measurements of writing answers."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from sac_rag.cli.bench import SPEED_TEXT, samples_of
from sac_rag.cli.console import loading, pull_if_default
from sac_rag.cli.options import (
    AsJson,
    CompressorOrDefault,
    Dtype,
    DtypeOrDefault,
    Limit,
    MaxNewTokens,
    Model,
    NumChunks,
    NumsOfChunks,
    Questions,
    Repeats,
    Seed,
    name_of,
)
from sac_rag.cli.progress import progress
from sac_rag.cli.render import out, write


def decode(
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Answers written together; may be repeated. Default: 1 and 8."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens timed each time.")] = 16,
    model: Model = "smollm2-135m",
    dtype: DtypeOrDefault = None,
    repeats: Repeats = 3,
    as_json: AsJson = False,
) -> None:
    """Times the tokens of answers: transformers' generate, the decoder, and it in fewer bits."""
    pull_if_default(model, SPEED_TEXT)
    with loading():
        from sac_rag.benchmarks.decode import measure
        from sac_rag.demo import wikipedia_leads
        from sac_rag.lm.generator import Generator

        generator = Generator.from_pretrained(model, dtype=name_of(dtype))
        text = wikipedia_leads()[0].text
    measured = measure(generator, text, rows=rows or (1, 8), tokens=tokens, repeats=repeats)

    def show() -> None:
        table = Table("way", "rows", "per token", "tokens/s", "of generate's", title=model)
        for row in measured:
            figures = f"{row.token_ms:.1f} ms", f"{row.tokens_per_s:.1f}", f"{row.relative:.2f}x"
            table.add_row(row.way, str(row.rows), *figures)
        out.print(table)

    write({"model": model, "rows": measured}, show, as_json=as_json)


def same_answers(
    data: Questions,
    limit: Limit = 100,
    k: NumChunks = 1,
    seed: Seed = 0,
    max_tokens: MaxNewTokens = 16,
    model: Model = "smollm2-135m",
    compressor: CompressorOrDefault = None,
    dtype: Dtype = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Compares the decoder's greedy answers with those of transformers, token for token.

    Exit code 1 if one differs. In fewer bits than float32, answers of another order of sums differ.
    """
    (sample,) = samples_of(data, (k,), limit, seed)
    pull_if_default(model)
    with loading():
        from sac_rag import SacRAG
        from sac_rag.benchmarks.same_answers import measure

        rag = SacRAG.from_pretrained(model, compressor=compressor, dtype=dtype.value)
    with progress("answering", total=len(sample.trials), show=not as_json) as advance:
        same = measure(rag, sample.trials, max_new_tokens=max_tokens, on_progress=advance)
    line = (
        f"of {same.questions} answers the same, from text: {same.from_text} ({same.tokens} "
        f"tokens); from anchors: {same.from_anchors}"
    )
    write(same, lambda: out.print(line), as_json=as_json)
    if same.from_text + same.from_anchors < 2 * same.questions:
        raise typer.Exit(1)


def batch(
    questions: Annotated[int, typer.Option(min=2, help="Questions answered together.")] = 8,
    k: NumsOfChunks = None,
    answer_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Length of the answers; may be repeated. Default: 4 and 32."),
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each chunk.")] = 510,
    model: Model = "smollm2-135m",
    compressor: CompressorOrDefault = None,
    dtype: DtypeOrDefault = None,
    repeats: Repeats = 3,
    as_json: AsJson = False,
) -> None:
    """Times questions that are answered in one batch, in turn with one by one."""
    pull_if_default(model, SPEED_TEXT)
    with loading():
        from sac_rag import SacRAG
        from sac_rag.benchmarks.batches import measure
        from sac_rag.benchmarks.first_token import FORMAT
        from sac_rag.demo import wikipedia_leads

        rag = SacRAG.from_pretrained(
            model, compressor=compressor, dtype=name_of(dtype), prompt_format=FORMAT, guard=False
        )
    rows = []
    with progress("measuring", show=not as_json) as advance:
        for row in measure(
            rag,
            (lead.text for lead in wikipedia_leads()),
            questions=questions,
            ks=k or (1, 4),
            answer_tokens=answer_tokens or (4, 32),
            chunk_tokens=chunk_tokens,
            repeats=repeats,
        ):
            advance(1)
            rows.append(row)

    def show() -> None:
        table = Table("chunks", "answer", "one by one", "together", "faster", title=model)
        for row in rows:
            seconds = (f"{times.median:.2f} s" for times in (row.one_by_one, row.together))
            table.add_row(str(row.k), f"{row.answer_tokens} tokens", *seconds, f"{row.faster:.2f}x")
        out.print(table)

    write({"model": model, "questions": questions, "rows": rows}, show, as_json=as_json)
