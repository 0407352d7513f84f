"""Embedder, texts to vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from sac_rag import default_models as models
from sac_rag import forks
from sac_rag.lm.digests import digest_json, tokenizer_digest, weights_digest

# Fields that determine embeddings besides weights and tokenizer.
_CONFIG_FIELDS = (
    "model_type",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "position_embedding_type",
)


class Embedder:
    """A sentence-transformers model with mean pooling, as most of them have.

    Attributes:
        model: The HF encoder, in evaluation mode.
        tokenizer: Its HF tokenizer.
        max_tokens: Tokens of a text that are read; later ones are cut off.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int = 256) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        # A fast tokenizer keeps truncation and padding as state, and some versions of it refuse to
        # be set by one thread while used by another ("Already borrowed").
        self._lock = forks.lock(self, "_lock")

    @classmethod
    def from_pretrained(cls, model: str = "minilm", device: str | None = None) -> Embedder:
        """Loads a default model by name, a local folder, or a hub id, in float32.

        Args:
            model: For example "minilm" or "models/my-embedder/".
            device: Default: CUDA if there is one, else CPU.

        Raises:
            ValueError: for an unknown name, or a folder that holds no such model.
            ModelUnavailableError: if a default model cannot be fetched.
        """
        source = models.resolve(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            network = AutoModel.from_pretrained(source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source!r} is not an encoder that transformers can load: {error}"
            ) from error
        return cls(network.to(device), tokenizer)

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return int(self.model.config.hidden_size)

    @cached_property
    def identity(self) -> str:
        """Digest of everything that determines a vector."""
        return digest_json(
            [
                weights_digest(self.model),
                tokenizer_digest(self.tokenizer),
                {field: getattr(self.model.config, field, None) for field in _CONFIG_FIELDS},
                self.max_tokens,
            ]
        )

    def embed(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 32,
        on_progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Turns texts into vectors of length 1, so that their inner product is the cosine.

        Args:
            texts: In any order; texts of similar length are run together.
            batch_size: Texts run together.
            on_progress: Called with the number of texts embedded since the last call.

        Returns:
            Shape: (texts, dimension).

        Raises:
            ValueError: if batch_size is below 1.
            TypeError: for one str in place of several.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of texts, was: one str; put it in a list")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, was: {batch_size}")
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        # The longest first, so that a batch too large for the memory fails at once.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors[rows] = self._embed_batch([texts[i] for i in rows])
            if on_progress is not None:
                on_progress(len(rows))
        return vectors

    def _embed_batch(self, texts: list[str]) -> NDArray[np.float32]:
        # Tokenizers reject half a surrogate pair: replaced, as the generator's tokenizer does.
        whole = [
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts
        ]
        with self._lock:
            inputs = self.tokenizer(
                whole,
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
        inputs = inputs.to(self.model.device)
        with torch.inference_mode():
            states = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
            means = (states * mask).sum(dim=1) / mask.sum(dim=1)
            unit = torch.nn.functional.normalize(means, dim=-1)
        vectors: NDArray[np.float32] = unit.cpu().numpy()
        return vectors
