"""Objective: the loss of rows, with the same encoding and assembly as for answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sac_rag.compressors.anchor_selection import eager_attention, max_received_attention
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.full import read_plain
from sac_rag.kv import AnchorKV
from sac_rag.prompts.assemble import Branches, Part, Prompt, assemble
from sac_rag.training.rows import Row, Source

# Outputs of a teacher that are matched: hidden states or logits of the frozen LM reading the full
# text ("hidden", "logits"), or logits with the same compressor's ratio 1 ("self").
Match = Literal["none", "hidden", "logits", "self"]


@dataclass(frozen=True, eq=False)
class Predicted:
    """Predictions of the frozen LM at the places of targets.

    Attributes:
        logits: Shape: (places, vocabulary)
        labels: Target tokens. Shape: (places,)
        first: Whether a place is the first of its target. Shape: (places,)
        row: Number of the place's row in the batch. Shape: (places,)
    """

    logits: Tensor
    labels: Tensor
    first: Tensor
    row: Tensor

    @property
    def loss(self) -> Tensor:
        """Mean cross-entropy, in nats per token."""
        return functional.cross_entropy(self.logits.float(), self.labels)

    @property
    def correct(self) -> Tensor:
        """Whether the most likely token is the label. Shape: (places,)."""
        return self.logits.argmax(dim=-1) == self.labels


class Objective:
    """Losses of a compressor behind one prefix.

    Args:
        compressor: The compressor that is trained; the ratio of its config is not used.
        prefix_ids: Tokens that every row begins with, read once.
        match: Outputs of a teacher to match, if any.
        match_weight: Weight of the matching term; 1 is that of the cross-entropy.
    """

    def __init__(
        self,
        compressor: Compressor,
        prefix_ids: Sequence[int],
        *,
        match: Match = "none",
        match_weight: float = 1.0,
    ) -> None:
        self.compressor = compressor
        self.match = match
        self.match_weight = match_weight
        self._prefix_ids = tuple(prefix_ids)
        self._prefix = read_plain(compressor.generator, prefix_ids) if prefix_ids else None

    def loss(self, rows: Sequence[Row], ratio: int) -> Tensor:
        """Training loss of one batch: cross-entropy of the targets, and the matching term.

        Shape: ().
        """
        compressor = self.compressor.at_ratio(ratio)
        is_taught = self.match == "self" and ratio > 1
        if is_taught and compressor.is_nested:
            # One encoding serves both: the entries kept at a ratio are the first of all entries.
            every = self.encode(compressor.at_ratio(1), rows)
            kvs = [kv.first(compressor.num_entries(kv.num_tokens)) for kv in every]
        else:
            kvs = self.encode(compressor, rows)
            if is_taught:
                with torch.no_grad():
                    every = self.encode(compressor.at_ratio(1), rows)
        prompt = self.prompt(rows, kvs)
        hidden = self._read(prompt)
        places, labels = target_places(rows, prompt.embeds.shape[1])
        generator = compressor.generator
        with generator.running() as model:
            logits = model.lm_head(hidden[places]).float()
        loss = functional.cross_entropy(logits, labels.to(logits.device))
        if self.match == "none" or (self.match == "self" and ratio == 1):
            return loss
        with torch.no_grad():
            teacher = self.prompt(rows, every) if self.match == "self" else self._text_prompt(rows)
            target = self._read(teacher)[target_places(rows, teacher.embeds.shape[1])[0]]
            if self.match != "hidden":
                with generator.running() as model:
                    target = model.lm_head(target).float()
        if self.match == "hidden":
            difference = (hidden[places].float() - target.float()).square().sum(-1)
            distance = difference / target.float().square().sum(-1)
        else:
            distance = functional.kl_div(
                logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
        return loss + self.match_weight * distance.mean()

    @torch.no_grad()
    def predict(self, rows: Sequence[Row], ratio: int, *, read_as: str = "anchors") -> Predicted:
        """Predicts the targets.

        Args:
            rows: A batch.
            ratio: Source tokens per anchor.
            read_as: "anchors", or "text" for the frozen LM reading the chunks themselves.
        """
        if read_as == "text":
            return self._predict(rows, self._text_prompt(rows))
        return self.predict_from(rows, self.encode(self.compressor.at_ratio(ratio), rows))

    @torch.no_grad()
    def predict_from(self, rows: Sequence[Row], kvs: Sequence[AnchorKV]) -> Predicted:
        """Predicts the targets of rows from compressed chunks, in reading order."""
        return self._predict(rows, self.prompt(rows, kvs))

    def _predict(self, rows: Sequence[Row], prompt: Prompt) -> Predicted:
        places, labels = target_places(rows, prompt.embeds.shape[1])
        hidden = self._read(prompt)[places]
        with self.compressor.generator.running() as model:
            logits = model.lm_head(hidden)
        first = torch.cat(
            [torch.arange(target.predicted) == 0 for row in rows for target in row.targets]
        )
        return Predicted(logits.cpu(), labels, first, places[0])

    @torch.no_grad()
    def attention(self, row: Row) -> list[tuple[AnchorKV, Tensor]]:
        """Attention of the targets of a row to its chunks, with all tokens kept.

        Returns:
            KV of each chunk, and the largest attention to each of its tokens, float32.
            Shape of the latter: (layers, kv_heads, tokens)
        """
        generator = self.compressor.generator
        ranked = self.encode(self.compressor.at_ratio(1), [row])
        # In text order, so that entries are tokens.
        kvs = [AnchorKV.uniform(*kv.by_head(), kv.num_tokens) for kv in ranked]
        prompt = self.prompt([row], kvs)
        before = prompt.cache.get_seq_length() - sum(kv.num_tokens for kv in kvs)
        with generator.running(prompt.adapter) as model, eager_attention(model):
            attentions = model.base_model(**prompt.inputs(), output_attentions=True).attentions
        received = max_received_attention(attentions, generator.kv_shape[1])
        measured = []
        for kv in kvs:
            measured.append((kv, received[:, :, before : before + kv.num_tokens]))
            before += kv.num_tokens
        return measured

    def encode(self, compressor: Compressor, rows: Sequence[Row]) -> list[AnchorKV]:
        """Compresses the chunks of all rows, each by itself, in reading order of the rows.

        Chunks that do not learn are encoded without gradients; equal chunks once.
        """
        sources = list(dict.fromkeys(source for row in rows for source in row.sources))
        kvs: dict[Source, AnchorKV] = {}
        device = compressor.generator.device
        for learns in (True, False):
            group = [source for source in sources if source.learns is learns]
            if not group:
                continue
            heading = compressor.heading_ids
            tokens = [torch.tensor([*heading, *source.ids], device=device) for source in group]
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                kvs |= zip(group, compressor.encode(tokens, [0] * len(group)), strict=True)
        return [kvs[source] for row in rows for source in row.sources]

    def prompt(self, rows: Sequence[Row], kvs: Sequence[AnchorKV]) -> Prompt:
        """Assembles prompts with compressed chunks and one branch per target."""
        compressed = iter(kvs)
        parts: list[list[Part | Branches]] = [
            [
                *(next(compressed) if isinstance(part, Source) else part for part in row.parts),
                Branches(tuple(target.ids for target in row.targets)),
            ]
            for row in rows
        ]
        compressor = self.compressor
        return self._assemble(parts, compressor.cue, compressor.generator_adapter)

    def _text_prompt(self, rows: Sequence[Row]) -> Prompt:
        """Assembles the same prompts with chunks as text."""
        heading = self.compressor.heading_ids
        return self._assemble([_as_text(row, heading) for row in rows], None, None)

    def _assemble(
        self,
        parts: Sequence[Sequence[Part | Branches]],
        cue: Tensor | None,
        adapter: str | None,
    ) -> Prompt:
        return assemble(
            parts,
            self.compressor.generator,
            prefix=self._prefix,
            cue=cue,
            adapter=adapter,
            first_position=self.compressor.config.first_position,
        )

    def _read(self, prompt: Prompt) -> Tensor:
        """Last hidden states of the plain text. Shape: (rows, tokens, hidden)."""
        with self.compressor.generator.running(prompt.adapter) as model:
            hidden: Tensor = model.base_model(**prompt.inputs()).last_hidden_state
        return hidden


def target_places(rows: Sequence[Row], columns: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Places of predictions in a left-padded batch.

    Args:
        rows: A batch in which targets end every row.
        columns: Number of tokens of the padded batch.

    Returns:
        (row, column) of each prediction, and the token in the next column.
        Shape of each: (places,)
    """
    at_row: list[int] = []
    at_column: list[int] = []
    labels: list[int] = []
    for number, row in enumerate(rows):
        end = columns - sum(len(target.ids) for target in row.targets)
        for target in row.targets:
            end += len(target.ids)
            at_row += [number] * target.predicted
            at_column += range(end - target.predicted - 1, end - 1)
            labels += target.ids[len(target.ids) - target.predicted :]
    return (torch.tensor(at_row), torch.tensor(at_column)), torch.tensor(labels)


def _as_text(row: Row, heading: list[int]) -> list[Part | Branches]:
    parts: list[Part | Branches] = [
        [*heading, *part.ids] if isinstance(part, Source) else part for part in row.parts
    ]
    return [*parts, Branches(tuple(target.ids for target in row.targets))]
