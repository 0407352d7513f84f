"""Compressor: text to AnchorKV."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from sac_rag.compressors.anchor_selection import segment_bounds
from sac_rag.compressors.batching import Segment, padded_tokens, passes
from sac_rag.compressors.budget import heads_together, num_entries
from sac_rag.compressors.config import Budget, CompressorConfig, StoredDtype
from sac_rag.compressors.layout import Layout, after_sink, collate
from sac_rag.compressors.pretrained import Pretrained
from sac_rag.errors import PromptTooLongError
from sac_rag.kv import AnchorKV, quantize, require_finite
from sac_rag.lm.digests import digest_json, tensors_digest
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import PromptFormat

# Raised when the same weights and config give other KV than before: old entries then miss.
KV_FORMAT = 1


class Compressor(Pretrained, ABC):
    """A compression method over one generator.

    A method defines how a segment is laid out for the encoder and which slots are anchors
    (`layout`); this class does the rest: tokens, segments, sink, batches, encoder pass, read-out,
    saving and loading.

    Attributes:
        generator: The frozen LM, which also encodes.
        config: Everything besides the weights that determines the KV.
        weights: Trained tensors by name; none for a method without training.
        cue: The learned embedding that follows each chunk in a prompt, if the method has one.
            Shape: (hidden,)
        generator_adapter: Name of the LoRA that is on while prompts with its anchors are read and
            answered; None where the frozen LM answers, as for most compressors.
        prompt_format: Format of the prompts it was trained for, if it was trained for one; saved
            beside the weights.
        batch_tokens: Most tokens in one encoder pass, pads included: enough to fill the matrix
            units of a small machine, and a bound on activations (about 60 MB for a 135M model,
            1 GB for an 8B one).
    """

    method: ClassVar[str]
    # Weights that are fitted separately, before the others are trained.
    fitted: frozenset[str] = frozenset()
    # Whether it can compute the KV of chunks that a store does not have.
    computes: ClassVar[bool] = True
    # Whether it appends slots to a text, whose positions `config.positions` gives.
    has_slots: ClassVar[bool] = False
    batch_tokens: int = 2048

    def __init__(self, generator: Generator, config: CompressorConfig) -> None:
        if config.method != self.method:
            raise ValueError(f"config.method must be {self.method!r}, was: {config.method!r}")
        if config.positions != "appended" and not self.has_slots:
            raise ValueError(
                f"positions={config.positions!r} is for methods that append slots to a text, and "
                f"{self.method!r} keeps the text's own tokens; leave it out"
            )
        self.generator = generator
        self.config = config
        self.weights: dict[str, Tensor] = {}
        self.cue: Tensor | None = None
        self.generator_adapter: str | None = None
        self.prompt_format: PromptFormat | None = None
        self._adapter: str | None = None
        self._merged_encoder: Callable[[], Any] | None = None
        self._sink_ids = generator.tokenize(config.sink, special=True)
        self._heading_ids = generator.tokenize(config.heading, special=True)

    @abstractmethod
    def layout(self, tokens: Tensor) -> Layout:
        """Lays out one segment.

        Args:
            tokens: Token ids, at least one. Shape: (tokens,)
        """

    @property
    def sink_ids(self) -> list[int]:
        """Token ids read before each segment and dropped from its KV."""
        return list(self._sink_ids)

    @property
    def is_nested(self) -> bool:
        """Whether the first entries of one compression serve every higher ratio too."""
        return self.config.is_nested

    def num_entries(self, num_tokens: int, ratio: int | None = None) -> int:
        """Number of entries of a chunk, over all layers and heads.

        Args:
            num_tokens: Tokens of the chunk.
            ratio: Source tokens per entry. Default: the config's.
        """
        bounds = segment_bounds(num_tokens, self.config.segment_tokens)
        return sum(self.num_segment_entries(end - start, ratio) for start, end in bounds)

    def num_segment_entries(self, num_tokens: int, ratio: int | None = None) -> int:
        """Number of entries of one segment at a ratio; by default the config's."""
        layers, kv_heads, _ = self.generator.kv_shape
        step = heads_together(self.config.budget, layers, kv_heads)
        return num_entries(num_tokens, ratio or self.config.ratio, layers * kv_heads, step)

    def join(self, segments: Sequence[AnchorKV]) -> AnchorKV:
        """Joins the segments of a chunk, in order."""
        return AnchorKV.join(segments)

    @property
    def heading_ids(self) -> list[int]:
        """Token ids before each chunk that are compressed with it."""
        return list(self._heading_ids)

    def at_ratio(self, ratio: int) -> Self:
        """The same weights at another ratio.

        Raises:
            ValueError: if the weights are for one ratio only.
        """
        return self._with(ratio=ratio)

    def with_budget(self, budget: Budget) -> Self:
        """The same weights with another distribution of entries over heads.

        Raises:
            ValueError: if the weights have no fitted budgets, or the anchors are not learned.
        """
        if budget == self.config.budget:
            return self
        if "budget" not in self.weights:
            raise ValueError(
                f"budget={budget!r} needs fitted budgets, and these weights have none; fit them: "
                "sac-rag fit, or sac-rag train with scorer_texts"
            )
        return self._with(budget=budget)

    def storing(self, dtype: StoredDtype) -> Self:
        """The same weights with KV in another dtype."""
        return self._with(stored_dtype=dtype)

    def without_generator_adapter(self) -> Self:
        """The same compressor, with prompts answered by the frozen LM."""
        if self.generator_adapter is None:
            return self
        other = self._with(generator_adapter_rank=0)
        other.generator_adapter = None
        return other

    def merged(self) -> Self:
        """The same for inference, with LoRA merged into a copy of the weights at first use.

        Keys and values differ from the unmerged ones by rounding: in bfloat16 both were equally
        far (keys 0.6 %, values 1.5 %) from those computed in float32. It must not be trained, nor
        be given other weights.
        """
        if self._adapter is None or self._merged_encoder is not None:
            return self
        other = copy(self)
        # Cached, so that copies for other ratios share it.
        other._merged_encoder = cache(partial(self.generator.merged_encoder, self._adapter))
        return other

    def _with(self, **changes: Any) -> Self:
        other = copy(self)
        other.config = replace(self.config, **changes)
        return other

    def choose(self, layout: Layout, keys: Tensor, values: Tensor) -> Tensor:
        """Chooses the entries to keep, once keys and values are computed.

        Args:
            layout: Layout of the segment, without sink.
            keys: Rotated for the layout's positions. Shape: (layers, kv_heads, slots, head_dim)
            values: Shape: (layers, kv_heads, slots, head_dim)

        Returns:
            head * slots + slot of each entry to keep, in order of importance if entries are ranked,
            else anchor by anchor. Shape: (entries,)
        """
        layers, kv_heads, slots, _ = keys.shape
        heads = torch.arange(layers * kv_heads, device=keys.device)
        anchors = layout.anchors
        # (anchors, 1) or (anchors, heads)
        by_head = anchors[:, None] if anchors.ndim == 1 else anchors.flatten(0, 1).T
        return (heads * slots + by_head).flatten()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies trained weights into the compressor.

        Raises:
            ValueError: if names or shapes differ from those of this method, model and config.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        mismatches = sorted(
            name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)
        )
        if mismatches:
            raise ValueError(
                f"{len(mismatches)} of the compressor's weights do not fit this model and config, "
                f"the first is {mismatches[0]!r}: expected shape {expected.get(mismatches[0])}, "
                f"got {got.get(mismatches[0])}; load it with the model it was trained for"
            )
        with torch.no_grad():
            for name, tensor in weights.items():
                self.weights[name].copy_(tensor)

    def compress(self, texts: Sequence[str]) -> list[AnchorKV]:
        """Compresses chunks, each by itself at position 0.

        Args:
            texts: Chunks; one longer than a segment is encoded in several passes.

        Returns:
            One AnchorKV per text, in order, in the stored dtype of the config.

        Raises:
            ValueError: for a text that is empty or only white space, or if its KV is not finite in
                the stored dtype.
            PromptTooLongError: for a text longer than the model's context, before any work.
            TypeError: for one str in place of several.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be several texts, was: one str; put it in a list")
        chunks = [self.tokenize(text) for text in texts]
        limit = self.generator.max_positions
        for number, ids in enumerate(chunks):
            if len(ids) > limit:
                raise PromptTooLongError(
                    f"chunk {number} has {len(ids)} tokens, but the model has {limit} positions; "
                    "split it (sac_rag.split)"
                )
        return self.compress_tokens(chunks)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of the heading and a chunk; special tokens spelled out in it stay plain text.

        Raises:
            ValueError: if the text is empty or only white space.
        """
        if not text.strip():
            raise ValueError("a chunk must have text, was: empty or only white space")
        return [*self._heading_ids, *self.generator.tokenize(text)]

    def compress_tokens(self, chunks: Sequence[Sequence[int]], *, start: int = 0) -> list[AnchorKV]:
        """Compresses chunks given as token ids.

        Args:
            chunks: Token ids of each chunk, at least one each.
            start: Position of each chunk's first token. Only tests of moving need it: what is
                stored is always computed at position 0.
        """
        by_number = dict(self.compress_each(chunks, start=start))
        return [by_number[number] for number in range(len(chunks))]

    @torch.no_grad()
    def compress_each(
        self, chunks: Sequence[Sequence[int]], *, start: int = 0
    ) -> Iterator[tuple[int, AnchorKV]]:
        """Compresses chunks as `compress_tokens` does, and yields each when it is finished.

        Yields:
            Number and AnchorKV of a chunk, roughly from the longest to the shortest.
        """
        counts = [len(ids) for ids in chunks]
        is_int8 = self.config.stored_dtype == "int8"
        # Where ratios are nested, all of them have the same scales: those of all tokens.
        encoder = self.at_ratio(1) if is_int8 and self.is_nested else self
        remaining = Counter(segment.chunk for batch in self._passes(counts) for segment in batch)
        encoded: defaultdict[int, list[tuple[int, AnchorKV]]] = defaultdict(list)
        for batch in self._passes(counts):
            tokens = [
                torch.tensor(chunks[s.chunk][s.start : s.end], device=self.generator.device)
                for s in batch
            ]
            kvs = encoder.encode(tokens, [start + segment.start for segment in batch])
            for segment, kv in zip(batch, kvs, strict=True):
                encoded[segment.chunk].append((segment.start, kv))
                remaining[segment.chunk] -= 1
            for chunk in dict.fromkeys(segment.chunk for segment in batch):
                if remaining[chunk]:
                    continue
                parts = sorted(encoded.pop(chunk), key=lambda part: part[0])
                whole = require_finite(self.join([kv for _, kv in parts]))
                if is_int8:
                    # Rounded now as it would be when read from a store.
                    whole = quantize(whole)
                    if self.is_nested:
                        cut = whole.first(self.num_entries(whole.num_tokens))
                        whole = cut.map(torch.clone)  # a view would keep all entries in memory
                yield chunk, whole

    def tokens_read(self, counts: Sequence[int]) -> int:
        """Number of tokens the encoder reads for chunks of these lengths, with sinks and pads."""
        return padded_tokens(self._passes(counts), len(self._sink_ids))

    def _passes(self, counts: Sequence[int]) -> Iterator[list[Segment]]:
        return passes(
            counts,
            segment_tokens=self.config.segment_tokens,
            sink=len(self._sink_ids),
            batch_tokens=self.batch_tokens,
        )

    def encode(self, segments: Sequence[Tensor], starts: Sequence[int]) -> list[AnchorKV]:
        """One encoder pass over segments, with gradients if the caller has them on.

        Args:
            segments: Token ids. Shape of each: (tokens,)
            starts: Position of each segment's first token; the sink stands right before it.

        Returns:
            One AnchorKV per segment, its positions counted as `starts` are and its keys rotated for
            them; with stored_dtype "int8" not yet quantized.
        """
        # Before the adapter is on: some methods run the frozen LM to choose anchors.
        layouts = [self.layout(tokens) for tokens in segments]
        with self._encoder() as encoder:
            return self.read(encoder, layouts, starts, [len(tokens) for tokens in segments])

    def collated(
        self, layouts: Sequence[Layout], starts: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Inputs of one pass over layouts, each behind the sink.

        Returns:
            Embeddings, positions, additive attention mask, and the number of tokens of the sink.
            Shapes: (rows, sink + slots, hidden), (rows, sink + slots),
            (rows, 1, sink + slots, sink + slots)
        """
        sink = self.generator.embed(self._sink_ids)
        embeds, positions, mask = collate([after_sink(layout, sink) for layout in layouts])
        at = positions + torch.tensor(starts, device=positions.device)[:, None]
        return embeds, at, self.generator.attention_mask(mask), len(sink)

    def read(
        self,
        encoder: Any,
        layouts: Sequence[Layout],
        starts: Sequence[int],
        num_tokens: Sequence[int],
    ) -> list[AnchorKV]:
        """KV of the anchors of layouts, from one pass of a decoder stack.

        Args:
            encoder: The decoder stack; the caller holds the generator.
            layouts: One per segment.
            starts: Position of each segment's first token.
            num_tokens: Tokens of each segment.
        """
        embeds, positions, mask, sink = self.collated(layouts, starts)
        layers = encoder(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=True
        ).past_key_values.layers
        # Rows are separated by one unbind: the gradient of one selection per row would be a tensor
        # of the whole size per row.
        row_keys = torch.stack([layer.keys for layer in layers])[..., sink:, :].unbind(1)
        row_values = torch.stack([layer.values for layer in layers])[..., sink:, :].unbind(1)
        return [
            self._read_out(*row)
            for row in zip(layouts, starts, row_keys, row_values, num_tokens, strict=True)
        ]

    @contextmanager
    def _encoder(self) -> Iterator[Any]:
        if self._merged_encoder is not None:
            with self.generator.running():
                yield self._merged_encoder()
        else:
            with self.generator.running(self._adapter):
                yield self.generator.encoder

    def _read_out(
        self, layout: Layout, start: int, keys: Tensor, values: Tensor, num_tokens: int
    ) -> AnchorKV:
        """KV of the anchors of one segment.

        Args:
            layout: Layout of the segment, without sink.
            start: Position of its first token.
            keys: Padded on the right. Shape: (layers, kv_heads, slots, head_dim)
            values: Shape: (layers, kv_heads, slots, head_dim)
            num_tokens: Tokens of the segment.
        """
        stored = self.config.stored_dtype
        # A chunk is quantized once all its segments are joined.
        dtype = keys.dtype if stored == "int8" else getattr(torch, stored)
        slots = len(layout.embeds)
        keys, values = keys[:, :, :slots], values[:, :, :slots]
        with torch.no_grad():
            entries = self.choose(replace(layout, positions=layout.positions + start), keys, values)
        layers, kv_heads, _, _ = keys.shape
        return AnchorKV(
            keys=keys.flatten(0, 2).index_select(0, entries).to(dtype),
            values=values.flatten(0, 2).index_select(0, entries).to(dtype),
            positions=(layout.positions[entries % slots] + start).int(),
            heads=(entries // slots).short(),
            num_layers=layers,
            num_kv_heads=kv_heads,
            num_tokens=num_tokens,
        )

    @property
    def fingerprint(self) -> str:
        """Digest of everything except the text that determines a KV."""
        return digest_json(self.fingerprint_fields())

    def fingerprint_fields(self) -> dict[str, str]:
        """What the fingerprint is a digest of, by name, so that mismatches can be named."""
        return {
            "kv_format": str(KV_FORMAT),
            "compressor_weights": tensors_digest(self.weights),
            **self.generator_fields(),
            **self.config.fingerprint_fields(),
        }

    def generator_fields(self) -> dict[str, str]:
        """The fingerprint fields of the generator."""
        # The digest of the weights covers the dtype too, but nobody could read it from there.
        identity = {**self.generator.identity, "dtype": self.generator.dtype_name}
        return {f"generator.{name}": value for name, value in identity.items()}
