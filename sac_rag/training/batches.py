"""An endless, repeatable stream of batches. Knows nothing of models or losses."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch.utils.data import IterableDataset

from sac_rag.passages import PassagePool
from sac_rag.questions import QAExample, read_questions
from sac_rag.training.config import TrainConfig
from sac_rag.training.rows import SHORTEST_TEXT, Row, RowMaker, batched

# Documents of prose shuffled together; more would only cost memory.
_SHUFFLED = 4096


@dataclass(frozen=True)
class Batch:
    """What one step learns from: rows, and the ratio that their chunks are compressed at."""

    rows: tuple[Row, ...]
    ratio: int


def split_examples(config: TrainConfig) -> tuple[list[QAExample], list[QAExample]]:
    """Training and validation examples: no article is in both.

    Raises:
        ValueError: if nothing is left to train on, or to validate on.
    """
    examples = list(read_questions(config.data)) if config.data else []
    if config.validation:
        held = list(read_questions(config.validation))
    else:
        # Examples without an article each count as one.
        names = [example.article or f"example {i}" for i, example in enumerate(examples)]
        articles = list(dict.fromkeys(names))
        last = set(articles[len(articles) - config.held_out_articles :])
        pairs = list(zip(names, examples, strict=True))
        held = [example for name, example in pairs if name in last]
        examples = [example for name, example in pairs if name not in last]
    if config.text_share < 1 and not examples:
        raise ValueError(
            f"no training examples: all {len(held)} are held out for validation; give more data, "
            f"a validation file, or lower held_out_articles ({config.held_out_articles})"
        )
    if config.data and not held:
        raise ValueError(
            "no validation examples: give a validation file, or raise held_out_articles "
            f"({config.held_out_articles})"
        )
    return examples, held


def rows_for_scorer(
    config: TrainConfig, maker: RowMaker, examples: Sequence[QAExample]
) -> list[Row]:
    """Rows whose targets show what is needed of a text: its questions, or itself once more.

    Args:
        config: How many, and how long at most.
        maker: Makes rows of the prompt.
        examples: Questions; prose is to be repeated where there are none.
    """
    rng = random.Random(f"{config.seed} scorer")
    rows: Iterator[Row | None]
    if examples:
        rows = (maker.ask(e.gold, e.questions) for e in rng.sample(examples, len(examples)))
    else:
        texts = list(islice(read_documents(config.text), 50 * config.scorer_texts))
        rng.shuffle(texts)
        rows = (maker.continue_text(text, config.text_tokens, repeat=True) for text in texts)
    made = (row for row in rows if row is not None)
    short = (r for r in made if all(len(s.ids) <= config.longest_chunk for s in r.sources))
    return list(islice(short, config.scorer_texts))


class BatchStream(IterableDataset):  # type: ignore[type-arg]
    """Batches without end, the same ones for equal configs.

    Args:
        config: What to draw.
        maker: Makes rows of the prompt.
        examples: Questions to learn from.
    """

    def __init__(self, config: TrainConfig, maker: RowMaker, examples: Sequence[QAExample]) -> None:
        super().__init__()
        self._config = config
        self._maker = maker
        self._examples = examples

    def __iter__(self) -> Iterator[Batch]:
        config = self._config
        random_batch = random.Random(f"{config.seed} batch")
        streams = {
            name: batched(rows, config.batch_tokens, random.Random(f"{config.seed} {name}"))
            for name, rows in (("questions", self._questions()), ("text", self._prose()))
        }
        step = 0
        while True:
            is_prose = step < config.text_first or random_batch.random() < config.text_share
            kind = "text" if is_prose else "questions"
            ratio = random_batch.choice(self._ratios(step))
            yield Batch(tuple(next(streams[kind])), ratio)
            step += 1

    def _ratios(self, step: int) -> Sequence[int]:
        """The ratios that have joined by a step: with a curriculum the lowest first."""
        config = self._config
        ascending = sorted(config.ratios)
        if not config.curriculum:
            return ascending
        progress = step / (config.curriculum * config.steps)
        return ascending[: min(len(ascending), 1 + int(progress * (len(ascending) - 1)))]

    def _questions(self) -> Iterator[Row]:
        config = self._config
        rng = random.Random(f"{config.seed} examples")
        pool = PassagePool(self._examples) if max(config.chunks) > 1 else None
        found = True
        while found:
            found = False
            for example in rng.sample(self._examples, len(self._examples)):
                chunks = list(example.gold)
                k = rng.choice(config.chunks)
                if pool is not None and k > 1:
                    chunks = pool.passages_for(example, k, rng)
                gold = {chunk.text for chunk in example.gold}
                count = min(len(example.questions), config.questions_per_context)
                row = self._maker.ask(
                    chunks,
                    rng.sample(example.questions, count),
                    learns=[config.distractors_learn or c.text in gold for c in chunks],
                )
                if all(len(source.ids) <= config.longest_chunk for source in row.sources):
                    found = True
                    yield row
        raise ValueError(
            f"no passage of {', '.join(config.data)} fits into longest_chunk "
            f"({config.longest_chunk} tokens)"
        )

    def _prose(self) -> Iterator[Row]:
        config = self._config
        rng = random.Random(f"{config.seed} prose")
        found = True
        while found:
            found = False
            documents = read_documents(config.text)
            while group := list(islice(documents, _SHUFFLED)):
                rng.shuffle(group)
                for text in group:
                    row = self._maker.continue_text(text, config.text_tokens, repeat=config.repeat)
                    if row is not None:
                        found = True
                        yield row
        raise ValueError(
            f"no document of {', '.join(config.text)} has {SHORTEST_TEXT} tokens; "
            "a blank line ends a document"
        )


def read_documents(paths: Sequence[str]) -> Iterator[str]:
    """Documents of plain text files, separated by blank lines, gzipped (.gz) or not; streamed."""
    for path in paths:
        opened = gzip.open if Path(path).suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            lines: list[str] = []
            for line in file:
                if line.strip():
                    lines.append(line.strip())
                elif lines:
                    yield " ".join(lines)
                    lines = []
            if lines:
                yield " ".join(lines)
