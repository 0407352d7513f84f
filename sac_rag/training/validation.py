"""Validation: how much content of the text reaches the answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from sac_rag.cached import CachedCompressor
from sac_rag.evaluation.questions import QAExample
from sac_rag.evaluation.scores import f1
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.generate import Decoding
from sac_rag.training.config import TrainConfig
from sac_rag.training.objective import Objective
from sac_rag.training.rows import Row, RowMaker, Source, batched

# Padded tokens of a pass: more than in a training step, since nothing is kept for gradients.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Validation:
    """Figures on held-out questions, teacher-forced.

    Attributes:
        ratio: Source tokens per anchor.
        loss: Cross-entropy of the gold answers, in nats per token.
        accuracy: Share of the gold answers' tokens that were the most likely.
        first_accuracy: Accuracy of the first token of each answer.
        wrong_loss, wrong_accuracy, wrong_first_accuracy: The same with another question's text.
        f1: Best F1 over the gold answers, mean over generated answers; None without any.
        ended: Share of generated answers that ended before the token limit.
        prompt: Name of the prompt; "" for the one saved beside the weights.
    """

    ratio: int
    loss: float
    accuracy: float
    first_accuracy: float
    wrong_loss: float
    wrong_accuracy: float
    wrong_first_accuracy: float
    f1: float | None = None
    ended: float | None = None
    prompt: str = ""

    @property
    def content(self) -> float:
        """Accuracy less that with a wrong text: the part that comes from the text."""
        return self.accuracy - self.wrong_accuracy

    def to_dict(self) -> dict[str, float | int | str | None]:
        """The fields and `content` as JSON values."""
        return {**asdict(self), "content": self.content}


class Validator:
    """Validates a compressor on the same questions each time.

    Args:
        objective: Objective of the compressor.
        maker: Makes rows of the prompts.
        examples: Held-out questions, of which a fixed sample is used.
        config: Numbers of contexts, questions per context, and generated answers.
        prompt: Index of the prompt in the maker.
        name: Name of the prompt in figures.
    """

    def __init__(
        self,
        objective: Objective,
        maker: RowMaker,
        examples: Sequence[QAExample],
        config: TrainConfig,
        *,
        prompt: int = 0,
        name: str = "",
    ) -> None:
        chosen = random.Random(0).sample(list(examples), min(config.eval_examples, len(examples)))
        self._objective = objective
        self._format = maker.formats[prompt]
        self._name = name
        self._rows = [
            row
            for example in chosen
            for row in maker.rows(
                example.gold[:1],
                example.questions[: config.questions_per_context],
                prompt=prompt,
            )
        ]
        self._wrong = [
            _with_source(row, other.sources[0])
            for row, other in zip(self._rows, self._rows[1:] + self._rows[:1], strict=True)
        ]
        asked = [(q, example.gold[0]) for example in chosen for q in example.questions]
        self._asked = random.Random(0).sample(asked, min(config.eval_answers, len(asked)))

    def measure(self, ratio: int, *, read_as: str = "anchors") -> Validation:
        """Figures at one ratio, or of the frozen LM reading the text (read_as="text")."""
        right = self._predict(self._rows, ratio, read_as)
        wrong = self._predict(self._wrong, ratio, read_as)
        answered, ended = (None, None) if read_as == "text" else self._answer(ratio)
        return Validation(ratio, *right, *wrong, f1=answered, ended=ended, prompt=self._name)

    def _predict(self, rows: Sequence[Row], ratio: int, read_as: str) -> tuple[float, float, float]:
        loss, correct, count, first_correct, first = 0.0, 0, 0, 0, 0
        for batch in batched(rows, _BATCH_TOKENS, random.Random(0)):
            predicted = self._objective.predict(batch, ratio, read_as=read_as)
            count += len(predicted.labels)
            loss += float(predicted.loss) * len(predicted.labels)
            correct += int(predicted.correct.sum())
            first += int(predicted.first.sum())
            first_correct += int(predicted.correct[predicted.first].sum())
        return loss / count, correct / count, first_correct / first

    def _answer(self, ratio: int) -> tuple[float, float] | tuple[None, None]:
        """F1 of generated answers, and the share of them that ended before the token limit."""
        if not self._asked:
            return None, None
        compressor = self._objective.compressor.at_ratio(ratio)
        rag = SacRAG(
            CachedCompressor(compressor, {}),
            prompt_format=self._format,
            decoding=Decoding(max_new_tokens=32),
        )
        scores: list[float] = []
        ended = 0
        for begin in range(0, len(self._asked), 10):
            asked = self._asked[begin : begin + 10]
            answers = rag.batch([(question.text, [chunk]) for question, chunk in asked])
            ended += sum(answer.finish_reason != "length" for answer in answers)
            scores += [
                f1(answer.text, question.answers)
                for answer, (question, _) in zip(answers, asked, strict=True)
            ]
        return sum(scores) / len(scores), ended / len(scores)


def _with_source(row: Row, source: Source) -> Row:
    parts = tuple(source if isinstance(part, Source) else part for part in row.parts)
    return replace(row, parts=parts)
