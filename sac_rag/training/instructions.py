"""Answers to open instructions, written by the frozen LM from the text itself.

Trained on questions with short gold answers only, a compressor answers everything in three words.
The frozen LM's answers to open instructions (summarise, list, explain, compare) keep its manner:
they are generated once, stored in a file, and learned from anchors.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors.full import Full
from sac_rag.evaluation.passages import PassagePool
from sac_rag.evaluation.questions import QAExample
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.generate import Decoding
from sac_rag.training.prompts import OPEN, TRAINED

# Each with its number of passages; "{question}" is replaced by a question about the passage.
INSTRUCTIONS = (
    ("Summarise the text in two sentences.", 1),
    ("What is this text about?", 1),
    ("List the main points of the text.", 1),
    ("Explain the text to somebody who knows nothing of its subject.", 1),
    ("Write one short paragraph that sums up the passages.", 2),
    ("What do the passages have in common, and what not?", 2),
    ("Compare the two passages.", 2),
    ("Which facts in the text are the most important ones? Give three.", 1),
    ("Give the text a title and say why it fits.", 1),
    ("Answer in a full sentence: {question}", 1),
    ("{question} Explain your answer.", 1),
    ("Rewrite the text in simpler words.", 1),
    ("Which names and numbers does the text mention?", 1),
    ("Tell me what I need to know from these documents.", 3),
)
# An answer repeats itself from where this many consecutive words occur again.
_REPEATED = 8


@dataclass(frozen=True)
class InstructionExample:
    """One instruction about some passages, and the answer of the frozen LM.

    Attributes:
        prompt: Name of the prompt, one of `prompts.TRAINED`.
        passages: Texts of the passages.
        titles: Titles of the passages; None where there is none.
        instruction: The instruction.
        response: The answer, without repetition.
        ended: Whether the answer is complete, so that its end is learned too.
    """

    prompt: str
    passages: tuple[str, ...]
    titles: tuple[str | None, ...]
    instruction: str
    response: str
    ended: bool

    @property
    def chunks(self) -> list[Chunk]:
        """The passages with their titles."""
        pairs = zip(self.passages, self.titles, strict=True)
        return [Chunk(text, title=title) for text, title in pairs]


def write_instructions(
    generator: Generator,
    examples: Sequence[QAExample],
    path: str | os.PathLike[str],
    count: int,
    *,
    longest_chunk: int = 400,
    max_tokens: int = 96,
    batch: int = 8,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Path:
    """Generates answers of the frozen LM to open instructions about passages, as JSON Lines.

    Answers are appended to the file as they are generated; the same call resumes.

    Args:
        generator: The frozen LM.
        examples: Source of passages and questions.
        path: The file, .jsonl.
        count: Total number of answers.
        longest_chunk: Most tokens of a passage; longer ones are left out.
        max_tokens: Longest answer, in tokens.
        batch: Number of answers generated together.
        seed: Seed of the choice of passages, instructions and prompts.
        on_progress: Called with the number of answers added.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rag = SacRAG(CachedCompressor(Full(generator, Full.default_config()), {}), on_miss="text")
    decoding = Decoding(max_new_tokens=max_tokens)
    written = sum(1 for _ in read_instructions([path])) if path.is_file() else 0
    drawn = islice(_draw(generator, examples, longest_chunk, random.Random(seed)), written, count)
    while asked := list(islice(drawn, batch)):
        messages = [TRAINED[one.prompt].messages(one.instruction, one.chunks) for one in asked]
        answers = rag.chat(messages, decoding)
        with path.open("a", encoding="utf-8") as file:
            for one, answer in zip(asked, answers, strict=True):
                text, whole = without_repetition(answer.text)
                ended = answer.finish_reason != "length" or whole
                file.write(json.dumps(asdict(replace(one, response=text, ended=ended))) + "\n")
        if on_progress is not None:
            on_progress(len(asked))
    return path


def read_instructions(paths: Sequence[str | os.PathLike[str]]) -> Iterator[InstructionExample]:
    """Reads a file of `write_instructions`, gzipped (.gz) or not.

    Raises:
        ValueError: for a line that is not such an example, naming file and line.
    """
    for path in paths:
        opened: Any = gzip.open if Path(path).suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    values = json.loads(line)
                    lists = {name: tuple(values[name]) for name in ("passages", "titles")}
                    example = InstructionExample(**{**values, **lists})
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"{path}:{number} must be an example of sac-rag train-instructions, "
                        f"but: {error}"
                    ) from error
                yield example


def without_repetition(text: str) -> tuple[str, bool]:
    """An answer up to where it begins to repeat itself, and whether anything was cut.

    A cut answer ends with a sentence or a line, if one is complete.
    """
    words = list(re.finditer(r"\S+", text))
    seen: set[tuple[str, ...]] = set()
    for i in range(len(words) - _REPEATED + 1):
        gram = tuple(word[0] for word in words[i : i + _REPEATED])
        if gram in seen:
            before = text[: words[i].start()]
            ends = [m.end() for m in re.finditer(r"(?<!\d)[.!?](?=\s)|(?=\n)", before)]
            return before[: ends[-1] if ends else len(before)].rstrip(), True
        seen.add(gram)
    return text, False


def _draw(
    generator: Generator, examples: Sequence[QAExample], longest: int, rng: random.Random
) -> Iterator[InstructionExample]:
    pool = PassagePool(examples)
    while True:
        example = rng.choice(examples)
        words, k = rng.choice(INSTRUCTIONS)
        instruction = words.replace("{question}", rng.choice(example.questions).text)
        chunks = pool.passages_for(example, k, rng)
        prompt = rng.choice(OPEN)
        if all(len(generator.tokenize(chunk.text)) <= longest for chunk in chunks):
            passages, titles = zip(*((chunk.text, chunk.title) for chunk in chunks), strict=True)
            yield InstructionExample(prompt, passages, titles, instruction, "", ended=False)
