"""Questions about the sentences of `PROSE`, and copies of weights."""

from __future__ import annotations

from torch import Tensor

from sac_rag.chunk import Chunk
from sac_rag.evaluation.questions import Question
from sac_rag.lm.generator import Generator
from support.models import PROSE

ASKED = (
    ("Who counted ships?", "The lighthouse keeper"),
    ("What conducts better than iron?", "Copper"),
    ("When was the tower finished?", "1889"),
    ("What moves slowly?", "A glacier"),
    ("When did she plant barley?", "March"),
    ("In how many languages was it signed?", "two"),
    ("What do owls hear?", "a mouse"),
    ("When does the library stay open?", "Every Thursday"),
)


def asked(number: int, *others: int) -> tuple[list[Chunk], list[Question]]:
    chunks = [Chunk(PROSE[i]) for i in (*others, number)]
    return chunks, [Question(str(number), ASKED[number][0], (ASKED[number][1],))]


def weights_of(generator: Generator) -> dict[str, Tensor]:
    """Copies of everything but LoRA."""
    named = generator.model.named_parameters()
    return {name: weight.clone() for name, weight in named if "lora_" not in name}
