"""Compressor, text to AnchorKV. Knows nothing of stores, prompts or answers."""

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
from sac_rag.errors import PromptTooLongError
from sac_rag.kv import AnchorKV, quantize
from sac_rag.lm.digests import digest_json, tensors_digest
from sac_rag.lm.generator import Generator

# Raise it when the same weights and config come to mean other KV: old entries then miss.
KV_FORMAT = 1


class Compressor(ABC):
    """A compression method over one generator.

    A method says how a segment is laid out for the encoder and which slots are kept (`layout`);
    this class does everything else: tokens, segments, sink, batches, the encoder pass, read-out.

    Attributes:
        generator: The frozen LM, which also encodes.
        config: What determines the KV besides weights.
        weights: The trained tensors by name; none for a method without training.
        cue: The learned embedding that follows each chunk in a prompt, if the method has one.
            Shape: (hidden,)
        generator_adapter: Name of the LoRA that is on while prompts with its anchors are read and
            answered. None, but for those that were trained with one: the frozen LM answers.
        batch_tokens: Most tokens in one encoder pass, pads included: enough to fill the matrix
            units of a small machine, and a bound on activations (about 60 MB for a 135M model,
            1 GB for an 8B one).
    """

    method: ClassVar[str]
    # Weights that are fitted apart, before the others are trained.
    fitted: frozenset[str] = frozenset()
    # Whether it computes what a store does not have.
    computes: ClassVar[bool] = True
    batch_tokens: int = 2048

    def __init__(self, generator: Generator, config: CompressorConfig) -> None:
        if config.method != self.method:
            raise ValueError(f"config.method must be {self.method!r}, was: {config.method!r}")
        self.generator = generator
        self.config = config
        self.weights: dict[str, Tensor] = {}
        self.cue: Tensor | None = None
        self.generator_adapter: str | None = None
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
        """Token ids read before each segment and dropped."""
        return list(self._sink_ids)

    @property
    def is_nested(self) -> bool:
        """Whether one compression serves every higher ratio too, by its first entries."""
        return self.config.is_nested

    def num_entries(self, num_tokens: int, ratio: int | None = None) -> int:
        """Entries that a chunk of so many tokens has, over all layers and heads.

        Args:
            num_tokens: Of the chunk.
            ratio: Source tokens per entry. Default: the config's.
        """
        bounds = segment_bounds(num_tokens, self.config.segment_tokens)
        return sum(self.num_segment_entries(end - start, ratio) for start, end in bounds)

    def num_segment_entries(self, num_tokens: int, ratio: int | None = None) -> int:
        """Entries that one segment has at a ratio; by default the config's."""
        layers, kv_heads, _ = self.generator.kv_shape
        step = heads_together(self.config.budget, layers, kv_heads)
        return num_entries(num_tokens, ratio or self.config.ratio, layers * kv_heads, step)

    def join(self, segments: Sequence[AnchorKV]) -> AnchorKV:
        """One value of a chunk's segments, in order."""
        return AnchorKV.join(segments)

    @property
    def heading_ids(self) -> list[int]:
        """Token ids that stand before each chunk's own and are compressed with them."""
        return list(self._heading_ids)

    def at_ratio(self, ratio: int) -> Self:
        """The same weights at another ratio.

        Raises:
            ValueError: if the weights are of one ratio alone.
        """
        return self._with(ratio=ratio)

    def with_budget(self, budget: Budget) -> Self:
        """The same weights with entries given out to heads in another way.

        Raises:
            ValueError: if the weights have no budgets to go by, or the anchors are not learned.
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
        """The same weights, their KV handed over in another dtype."""
        return self._with(stored_dtype=dtype)

    def without_generator_adapter(self) -> Self:
        """The same, its prompts answered by the frozen LM."""
        if self.generator_adapter is None:
            return self
        other = self._with(generator_adapter_rank=0)
        other.generator_adapter = None
        return other

    def merged(self) -> Self:
        """The same, for inference alone, with LoRA merged into weights of its own at first use.

        Keys and values differ from the unmerged ones' by rounding: in bfloat16 both were equally
        far (keys 0.6 %, values 1.5 %) from what is computed in float32. It must not be trained, nor
        be given other weights.
        """
        if self._adapter is None or self._merged_encoder is not None:
            return self
        other = copy(self)
        # Shared by the copies for other ratios.
        other._merged_encoder = cache(partial(self.generator.merged_encoder, self._adapter))
        return other

    def _with(self, **changes: Any) -> Self:
        other = copy(self)
        other.config = replace(self.config, **changes)
        return other

    def choose(self, layout: Layout, keys: Tensor, values: Tensor) -> Tensor:
        """Which slots to keep, now that their keys and values are known.

        Args:
            layout: The segment's, without a sink.
            keys: Rotated for the layout's positions. Shape: (layers, kv_heads, slots, head_dim)
            values: Shape: (layers, kv_heads, slots, head_dim)

        Returns:
            head * slots + slot of each entry to keep, in order of importance where there is one,
            else anchor after anchor. Shape: (entries,)
        """
        layers, kv_heads, slots, _ = keys.shape
        heads = torch.arange(layers * kv_heads, device=keys.device)
        # (anchors,) or (anchors, heads)
        kept = layout.kept[:, None] if layout.kept.ndim == 1 else layout.kept.flatten(0, 1).T
        return (heads * slots + kept).flatten()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over trained weights.

        Raises:
            ValueError: if names or shapes are not those of this method, model and config.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        differing = sorted(
            name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)
        )
        if differing:
            raise ValueError(
                f"{len(differing)} of the compressor's weights do not fit this model and config, "
                f"the first is {differing[0]!r}: expected shape {expected.get(differing[0])}, "
                f"got {got.get(differing[0])}; load it with the model it was trained for"
            )
        with torch.no_grad():
            for name, tensor in weights.items():
                self.weights[name].copy_(tensor)

    def compress(self, texts: Sequence[str]) -> list[AnchorKV]:
        """Compresses chunks, each alone, as if each stood at position 0.

        Args:
            texts: Chunks; a chunk longer than a segment is encoded in several passes.

        Returns:
            One AnchorKV a text, in order, in the config's stored dtype.

        Raises:
            ValueError: for a text that is empty or only white space.
            PromptTooLongError: for a text longer than the model's context, before any work.
        """
        chunks = [self.tokenize(text) for text in texts]
        limit = self.generator.max_positions
        for number, ids in enumerate(chunks):
            if len(ids) > limit:
                raise PromptTooLongError(
                    f"chunk {number} has {len(ids)} tokens, but the model has {limit} positions; "
                    "split it (sac_rag.retrieval.splitter.split)"
                )
        return self.compress_tokens(chunks)

    def tokenize(self, text: str) -> list[int]:
        """A chunk's tokens behind the heading's; special tokens spelled out in it stay plain text.

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
            start: Position of each chunk's first token. Only a test of moving needs it: what is
                stored is always computed at 0.
        """
        done = dict(self.compress_each(chunks, start=start))
        return [done[number] for number in range(len(chunks))]

    @torch.no_grad()
    def compress_each(
        self, chunks: Sequence[Sequence[int]], *, start: int = 0
    ) -> Iterator[tuple[int, AnchorKV]]:
        """Compresses chunks as `compress_tokens` does and hands over each when it is done.

        Yields:
            A chunk's number and its AnchorKV, about in the order of falling length.
        """
        counts = [len(ids) for ids in chunks]
        is_int8 = self.config.stored_dtype == "int8"
        # Where ratios are nested, every one of them has the same scales: those of all tokens.
        encoder = self.at_ratio(1) if is_int8 and self.is_nested else self
        left = Counter(segment.chunk for batch in self._passes(counts) for segment in batch)
        encoded: defaultdict[int, list[tuple[int, AnchorKV]]] = defaultdict(list)
        for batch in self._passes(counts):
            tokens = [
                torch.tensor(chunks[s.chunk][s.start : s.end], device=self.generator.device)
                for s in batch
            ]
            kvs = encoder.encode(tokens, [start + segment.start for segment in batch])
            for segment, kv in zip(batch, kvs, strict=True):
                encoded[segment.chunk].append((segment.start, kv))
                left[segment.chunk] -= 1
            for chunk in dict.fromkeys(segment.chunk for segment in batch):
                if left[chunk]:
                    continue
                parts = sorted(encoded.pop(chunk), key=lambda part: part[0])
                whole = self.join([kv for _, kv in parts])
                if is_int8:
                    # Rounded now as it would be on coming out of a store.
                    whole = quantize(whole)
                    if self.is_nested:
                        cut = whole.first(self.num_entries(whole.num_tokens))
                        whole = cut.map(torch.clone)  # a view would keep all of it in memory
                yield chunk, whole

    def tokens_read(self, counts: Sequence[int]) -> int:
        """Tokens that the encoder reads for chunks of so many, sinks and pads included."""
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
            Keys rotated for, and positions counted from, position 0 of `starts`' count; with
            stored_dtype "int8" as they were computed.
        """
        # Before the adapter is on: some methods ask the frozen LM where to put their anchors.
        layouts = [self.layout(tokens) for tokens in segments]
        sink = self.generator.embed(self._sink_ids)
        embeds, positions, mask = collate([after_sink(layout, sink) for layout in layouts])
        at = positions + torch.tensor(starts, device=positions.device)[:, None]
        with self._encoder() as encoder:
            layers = encoder(
                inputs_embeds=embeds,
                position_ids=at,
                attention_mask=self.generator.attention_mask(mask),
                use_cache=True,
            ).past_key_values.layers
        # Rows apart by one unbind: the gradient of many single selections would be summed over as
        # many tensors of the whole size.
        every_key = torch.stack([layer.keys for layer in layers])[..., len(sink) :, :].unbind(1)
        every_value = torch.stack([layer.values for layer in layers])[..., len(sink) :, :].unbind(1)
        return [
            self._read_out(layout, start, keys, values, len(tokens))
            for layout, start, keys, values, tokens in zip(
                layouts, starts, every_key, every_value, segments, strict=True
            )
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
        """Keeps the anchors' KV of one segment.

        Args:
            layout: The segment's, without a sink.
            start: Position of its first token.
            keys: Padded on the right. Shape: (layers, kv_heads, slots, head_dim)
            values: Shape: (layers, kv_heads, slots, head_dim)
            num_tokens: Tokens of the segment.
        """
        stored = self.config.stored_dtype
        # A chunk is quantized when it is whole.
        dtype = keys.dtype if stored == "int8" else getattr(torch, stored)
        slots = len(layout.embeds)
        keys, values = keys[:, :, :slots], values[:, :, :slots]
        with torch.no_grad():
            kept = self.choose(replace(layout, positions=layout.positions + start), keys, values)
        layers, kv_heads, _, _ = keys.shape
        return AnchorKV(
            keys=keys.flatten(0, 2).index_select(0, kept).to(dtype),
            values=values.flatten(0, 2).index_select(0, kept).to(dtype),
            positions=(layout.positions[kept % slots] + start).int(),
            heads=(kept // slots).short(),
            num_layers=layers,
            num_kv_heads=kv_heads,
            num_tokens=num_tokens,
        )

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines a KV but the text."""
        return digest_json(self.fingerprint_fields())

    def fingerprint_fields(self) -> dict[str, str]:
        """What the fingerprint covers, by name, so that a difference can be named."""
        return {
            "kv_format": str(KV_FORMAT),
            "compressor_weights": tensors_digest(self.weights),
            **self.generator_fields(),
            **self.config.fingerprint_fields(),
        }

    def generator_fields(self) -> dict[str, str]:
        """Those of them that are the generator's."""
        # Told by the weights' digest too, but not so that anyone could read it.
        identity = {**self.generator.identity, "dtype": self.generator.dtype_name}
        return {f"generator.{name}": value for name, value in identity.items()}
