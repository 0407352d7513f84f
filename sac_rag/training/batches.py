"""Batches: an endless, reproducible stream of batches of rows."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from sac_rag.evaluation.passages import PassagePool
from sac_rag.evaluation.questions import QAExample, Question, hold_out, read_questions
from sac_rag.training.config import TrainConfig
from sac_rag.training.instructions import read_instructions
from sac_rag.training.rows import SHORTEST_TEXT, Row, RowMaker, batched

T = TypeVar("T")

# Offset between the seeds of workers, larger than the seeds of runs.
_SEEDS_PER_RUN = 1_000_003

# A draft of an answer without information.
_UNKNOWN = "The passages so far do not say."
# Number of documents of prose shuffled together; more would only cost memory.
_SHUFFLED = 4096


@dataclass(frozen=True)
class Batch:
    """Rows of one training step, and the ratio at which their chunks are compressed."""

    rows: tuple[Row, ...]
    ratio: int


def split_examples(config: TrainConfig) -> tuple[list[list[QAExample]], list[QAExample]]:
    """Training examples of each file, and validation examples: no article is in both.

    Raises:
        ValueError: if no examples remain for training, or for validation.
    """
    files = [list(read_questions([path])) for path in config.data]
    if config.validation:
        held_out = list(read_questions(config.validation))
    else:
        parts = [hold_out(examples, config.held_out_share) for examples in files]
        files = [learned for learned, _ in parts]
        held_out = [example for _, last in parts for example in last]
    if config.text_share < 1 and not any(files):
        raise ValueError(
            f"no training examples: all {len(held_out)} are held out for validation; give more "
            f"data, a validation file, or lower held_out_share ({config.held_out_share})"
        )
    if config.data and not held_out:
        raise ValueError(
            "no validation examples: give a validation file, or raise held_out_share "
            f"({config.held_out_share})"
        )
    return files, held_out


def rows_for_scorer(
    config: TrainConfig, maker: RowMaker, examples: Sequence[Sequence[QAExample]]
) -> list[Row]:
    """Rows whose targets attend to what is needed of a text: answers, or the text repeated.

    Args:
        config: Number of rows and their greatest length.
        maker: Makes rows of the prompts.
        examples: Questions of each file; without any, prose is repeated.
    """
    rng = random.Random(f"{config.seed} scorer")
    rows: Iterator[Row | None]
    if any(examples):
        # Prompts in which all questions about a text share a row.
        prompts = [i for i in range(len(maker.formats)) if maker.shares_chunks(i)]
        drawn = islice(mixed(examples, config.data_shares, rng), sum(map(len, examples)))
        rows = (
            maker.ask(one.gold, one.questions, prompt=prompts[number % len(prompts)])
            for number, (_, one) in enumerate(drawn)
        )
    else:
        texts = list(islice(read_documents(config.text), 50 * config.scorer_texts))
        rng.shuffle(texts)
        rows = (maker.continue_text(text, config.text_tokens, repeat=True) for text in texts)
    made = (row for row in rows if row is not None)
    short = (r for r in made if all(len(s.ids) <= config.longest_chunk for s in r.sources))
    return list(islice(short, config.scorer_texts))


def mixed(
    files: Sequence[Sequence[T]], shares: Sequence[float], rng: random.Random
) -> Iterator[tuple[int, T]]:
    """Endless stream of items, each file in random order and repeated when all were drawn.

    Args:
        files: Items of each file; an empty file is never drawn from.
        shares: Relative frequency of each file; none = by its number of items.
        rng: Equal states give equal orders.

    Yields:
        Number of the file, and the item.
    """
    weights = [
        share if file else 0.0
        for file, share in zip(files, shares or [len(file) for file in files], strict=True)
    ]
    orders = [_shuffled_forever(file, rng) for file in files]
    while True:
        (number,) = rng.choices(range(len(files)), weights)
        yield number, next(orders[number])


def _shuffled_forever(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    while True:
        yield from rng.sample(items, len(items))


class BatchStream(IterableDataset):  # type: ignore[type-arg]
    """Endless stream of batches, the same for equal configs.

    Each worker process of a DataLoader has its own stream; workers take turns.

    Args:
        config: Config of the run.
        maker: Makes rows of the prompts.
        examples: Training questions of each file.
    """

    def __init__(
        self, config: TrainConfig, maker: RowMaker, examples: Sequence[Sequence[QAExample]]
    ) -> None:
        super().__init__()
        self._config = config
        self._maker = maker
        self._examples = examples

    def __iter__(self) -> Iterator[Batch]:
        config = self._config
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            config = replace(config, seed=config.seed + _SEEDS_PER_RUN * (1 + worker.id))
            yield from BatchStream(config, self._maker, self._examples)._batches()
        else:
            yield from self._batches()

    def _batches(self) -> Iterator[Batch]:
        config = self._config
        random_batch = random.Random(f"{config.seed} batch")
        streams = {
            name: batched(rows, config.batch_tokens, random.Random(f"{config.seed} {name}"))
            for name, rows in (
                ("questions", self._questions()),
                ("instructions", self._instructions()),
                ("text", self._prose()),
            )
        }
        step = 0
        while True:
            drawn = random_batch.random()
            kind = "questions"
            if step < config.text_first or drawn < config.text_share:
                kind = "text"
            elif drawn < config.text_share + config.instruction_share:
                kind = "instructions"
            ratio = random_batch.choice(self._ratios(step))
            yield Batch(tuple(next(streams[kind])), ratio)
            step += 1

    def _ratios(self, step: int) -> Sequence[int]:
        """The ratios drawn from at a step; with a curriculum the lowest join first."""
        config = self._config
        ascending = sorted(config.ratios)
        if not config.curriculum:
            return ascending
        progress = step / (config.curriculum * config.steps)
        return ascending[: min(len(ascending), 1 + int(progress * (len(ascending) - 1)))]

    def _questions(self) -> Iterator[Row]:
        config, maker = self._config, self._maker
        rng = random.Random(f"{config.seed} examples")
        pools = [
            PassagePool(file) if max(config.chunks) > 1 and file else None
            for file in self._examples
        ]
        too_long = 0
        for file, example in mixed(self._examples, config.data_shares, rng):
            k, pool, gold = rng.choice(config.chunks), pools[file], list(example.gold)
            chunks, others = gold, []
            if pool is not None and k > 1:
                close = rng.random() < config.close_distractors
                chunks = pool.passages_for(example, k, rng, close=close)
                others = [chunk for chunk in chunks if chunk not in gold]
            count = min(len(example.questions), config.questions_per_context)
            questions = rng.sample(example.questions, count)
            prompt = rng.randrange(len(maker.formats))
            draft = _UNKNOWN
            if maker.refines(prompt) and others and rng.random() < 0.5:
                # The draft has the answer, and the new passages do not help.
                questions, chunks, draft = questions[:1], others, questions[0].answers[0]
            rows = maker.rows(
                chunks,
                questions,
                prompt=prompt,
                learns=[config.distractors_learn or chunk in gold for chunk in chunks],
                draft=draft,
            )
            if all(len(source.ids) <= config.longest_chunk for source in rows[0].sources):
                too_long = 0
                yield from rows
            elif (too_long := too_long + 1) > 3 * sum(map(len, self._examples)):
                raise ValueError(
                    f"no passage of {', '.join(config.data)} fits into longest_chunk "
                    f"({config.longest_chunk} tokens)"
                )

    def _instructions(self) -> Iterator[Row]:
        config = self._config
        rng = random.Random(f"{config.seed} instructions")
        numbers = {name: number for number, name in enumerate(config.prompts)}
        examples = [
            example
            for example in read_instructions(config.instructions)
            if example.response and example.prompt in numbers
        ]
        if not examples:
            raise ValueError(
                f"no answer of {', '.join(config.instructions)} was written in a prompt of the run "
                f"({', '.join(numbers) or 'none are named'})"
            )
        for example in _shuffled_forever(examples, rng):
            yield self._maker.ask(
                example.chunks,
                [Question("", example.instruction, (example.response,))],
                prompt=numbers[example.prompt],
                ends=example.ended,
            )

    def _prose(self) -> Iterator[Row]:
        config = self._config
        rng = random.Random(f"{config.seed} prose")
        has_rows = True
        while has_rows:
            has_rows = False
            documents = read_documents(config.text)
            while group := list(islice(documents, _SHUFFLED)):
                rng.shuffle(group)
                for text in group:
                    row = self._maker.continue_text(text, config.text_tokens, repeat=config.repeat)
                    if row is not None:
                        has_rows = True
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
