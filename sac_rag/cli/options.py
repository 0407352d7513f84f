"""Options that several commands have, each defined once; what one command has is in its file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """Dtypes that the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(str, Enum):
    """What matrices are packed as for the tokens of answers."""

    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


_MODEL = "Default model, local folder or hub id."
_COMPRESSOR = "'shipped', 'fitted', 'full' or the folder of a compressor."
_RATIO = "Source tokens per anchor"

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

Store = Annotated[Path, typer.Option("--store", help="Folder of the collection.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a store, or of a collection.")]
ArchiveFile = Annotated[Path, typer.Argument(help="The file with the chunks.")]
KeyEnv = Annotated[
    str | None, typer.Option(help="Environment variable with the key of an encrypted store.")
]
KeyFile = Annotated[Path | None, typer.Option(help="File with the key of an encrypted store.")]

Model = Annotated[str, typer.Option(help=_MODEL)]
ModelOrDefault = Annotated[str | None, typer.Option(help=_MODEL)]
ModelOfCompressor = Annotated[str, typer.Option(help="The model that the compressor is for.")]
Compressor = Annotated[str, typer.Option(help=_COMPRESSOR)]
CompressorOrDefault = Annotated[str | None, typer.Option(help=_COMPRESSOR)]
DtypeOrDefault = Annotated[Dtype | None, typer.Option(help="Default: the fastest here.")]
WeightsOrDefault = Annotated[
    Weights | None,
    typer.Option(help="Of answers' tokens after the first, on a CPU. Default: as they are."),
]

RatioOrDefault = Annotated[int | None, typer.Option(min=1, help=f"{_RATIO}.")]
Ratios = Annotated[
    list[int] | None, typer.Option("--ratio", min=1, help=f"{_RATIO}; may be repeated.")
]
NumChunks = Annotated[int, typer.Option("--k", "-k", min=1, help="Chunks to answer from.")]
NumsOfChunks = Annotated[
    list[int] | None, typer.Option("--k", "-k", min=1, help="Chunks; may be repeated.")
]

Questions = Annotated[
    list[Path],
    typer.Option(
        "--data",
        help="Questions with answers: SQuAD, MRQA or passages (README); may be repeated.",
    ),
]
QuestionsOrDefault = Annotated[
    list[Path] | None,
    typer.Option(
        "--data", help="Questions with answers: SQuAD, MRQA or passages; may be repeated."
    ),
]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="Questions to draw.")]
LimitOrAll = Annotated[
    int | None, typer.Option("--limit", "-n", min=1, help="Questions to draw. Default: all.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn at random.")]

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions answered together.")]
Config = Annotated[
    Path | None, typer.Option(help="Settings of the run, .toml or .json (docs/training.md).")
]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements; the best or the median counts.")]


def name_of(dtype: Dtype | None) -> str | None:
    """The name that the library takes; None for its default."""
    return dtype.value if dtype else None
