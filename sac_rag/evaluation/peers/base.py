"""Peer: a system of another package that answers trials within the budget that SAC has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import ClassVar

from sac_rag.chunk import Chunk
from sac_rag.evaluation.quality import Answering, answered_by, beginning, text_reader, token_budget
from sac_rag.evaluation.sample import Trial
from sac_rag.lm.digests import digest_json
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.generate import Decoding
from sac_rag.reports import Answer


class Peer(ABC):
    """A system that answers trials with the model and prompt format of a pipeline.

    Attributes:
        name: Its name on the command line and in the files of answers.
        title: Its name in a report.
        does: What it does, in one line.
        package: Distribution that it comes from; None for this one.
        modules: What must be importable for it, with the distribution that each is from.
        models: Default models that it needs besides the generator.
        blocked: Why it cannot run, whatever is installed; "" if it can.
        rag: Model, prompt format, and the compressor whose budget it has.
        ratio: Source tokens per KV entry of each head, or per token of text that is read.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    does: ClassVar[str]
    package: ClassVar[str | None] = None
    modules: ClassVar[dict[str, str]] = {}
    models: ClassVar[tuple[str, ...]] = ()
    blocked: ClassVar[str] = ""

    def __init__(self, rag: SacRAG, ratio: int) -> None:
        """Loads nothing that an answer does not need."""
        if reason := self.reason():
            raise ImportError(f"{self.name} cannot run: {reason}")
        if ratio < 1:
            raise ValueError(f"ratio must be at least 1, was: {ratio}")
        self.rag = rag
        self.ratio = ratio

    @abstractmethod
    def answer(self, trials: Sequence[Trial], decoding: Decoding) -> Sequence[Answer]:
        """Answers trials, in order, all in one batch."""

    @classmethod
    def version(cls) -> str:
        """Version of its package; "" if that is not installed, or there is none."""
        try:
            return metadata.version(cls.package) if cls.package else ""
        except metadata.PackageNotFoundError:
            return ""

    @classmethod
    def reason(cls) -> str:
        """Why it cannot run; "" if it can."""
        missing = [package for module, package in cls.modules.items() if not _is_there(module)]
        if cls.blocked or not missing:
            return cls.blocked
        return f"{', '.join(sorted(set(missing)))} not installed; run: make peers"

    @property
    def fingerprint(self) -> str:
        """Digest of what determines its answers besides model, prompt and questions."""
        return digest_json([self.name, self.package, self.version()])

    def budget(self, chunk: Chunk) -> int:
        """Tokens, or KV entries per head, that may stand for a chunk."""
        return token_budget(chunk, self.rag.compressor.inner, self.ratio)

    def answering(self) -> Answering:
        """The system that `evaluate_answering` measures."""
        return Answering(self.name, self.ratio, self.answer, fingerprint=self.fingerprint)


class TextPeer(Peer):
    """A peer that shortens the text; the frozen LM reads what is left."""

    def __init__(self, rag: SacRAG, ratio: int) -> None:
        super().__init__(rag, ratio)
        self._answer = answered_by(text_reader(rag))

    @abstractmethod
    def shorten(
        self, question: str, chunks: Sequence[Chunk], budgets: Sequence[int]
    ) -> list[Chunk]:
        """Chunks with less text, in order; some may be left out.

        Args:
            question: May be ignored, by peers that compress before any question is known.
            chunks: Whole chunks.
            budgets: Tokens of each chunk; a peer that compares chunks may spend their sum.
        """

    def answer(self, trials: Sequence[Trial], decoding: Decoding) -> Sequence[Answer]:
        """Answers trials from what is left of their text."""
        return self._answer([self.shortened(trial) for trial in trials], decoding)

    def shortened(self, trial: Trial) -> Trial:
        """A trial with the text that is read: never more tokens than the budget."""
        budgets = [self.budget(chunk) for chunk in trial.chunks]
        chunks = trial.chunks
        if any(self.count(c.text) > budget for c, budget in zip(chunks, budgets, strict=True)):
            shorter = self.shorten(trial.question.text, chunks, budgets)
            chunks = tuple(self.within(shorter, sum(budgets)))
        return Trial(trial.number, trial.question, chunks)

    def within(self, chunks: Sequence[Chunk], budget: int) -> list[Chunk]:
        """The first chunks, the last of them cut, that have at most `budget` tokens together."""
        cut = []
        for chunk in chunks:
            text = beginning(chunk.text, budget, self.rag.generator)
            budget -= self.count(text)
            if text.strip():
                cut.append(with_text(chunk, text))
        return cut

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.rag.generator.tokenize(text))


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def with_text(chunk: Chunk, text: str) -> Chunk:
    """A chunk with another text."""
    return Chunk(text, chunk.id, chunk.title, chunk.metadata, chunk.ratio)


class Blocked(Peer):
    """A peer that cannot run here; it is listed with the reason."""

    def answer(self, trials: Sequence[Trial], decoding: Decoding) -> Sequence[Answer]:
        """Raises RuntimeError."""
        raise RuntimeError(f"{self.name} cannot run: {self.blocked}")
