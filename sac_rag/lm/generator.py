"""Generator: the frozen LM and its tokenizer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sac_rag import default_models as models
from sac_rag import forks
from sac_rag.errors import UnsupportedModelError
from sac_rag.lm import attention, model_files, quantized, rope
from sac_rag.lm.adapters import Adapters
from sac_rag.lm.digests import digest_json, tokenizer_digest, weights_digest
from sac_rag.lm.encoder import merged, without_last_mlp
from sac_rag.lm.step import Step
from sac_rag.lm.text_tokenizer import TextTokenizer, ordinary_tokenizer

# Fields of a config that never change a key: names, versions, training settings, what comes after
# the last layer. All others may (architectures have different multipliers) and are digested.
_NOT_IN_A_KEY = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "transformers_version",
    "use_cache",
}


class Generator:
    """A loaded causal LM, frozen, that encodes chunks and generates answers.

    The weights are hashed once, at construction; later changes of them are not detected. That
    includes changes of a file that a model given here is mapped from: `from_pretrained` reads the
    weights into memory.

    Attributes:
        model: The HF causal LM, in evaluation mode, with no trainable parameter. Its attention is
            that of `sac_rag.lm.attention`, which without entry masks calls transformers'.
        encoder: Its decoder stack without what keys and values do not need; weights are shared.
        tokenizer: Its HF tokenizer; changes of it after construction have no effect on `tokenize`.
        frequencies: RoPE frequencies. Shape: (rotated_dims / 2,)
        identity: Digests of everything in the model that determines a KV, by name.
        weights: What the matrices are packed as for single tokens: "float16", "int8" or "int4";
            None for exact ones. Chunks and prompts are always read with exact weights.

    Raises:
        ValueError: for unknown `weights`, or where there is no kernel for them.
        UnsupportedModelError: if the model's keys cannot be moved (see `rope.require_movable`), or
            its attention implementation takes no mask.
    """

    def __init__(self, model: Any, tokenizer: Any, *, weights: str | None = None) -> None:
        _require_no_adapters(model)
        if weights is not None:
            quantized.require_usable(weights, model.device)
        usual = model.config._attn_implementation
        if usual in attention.NAMES:
            model.set_attn_implementation(attention.NAMES[usual])
        elif usual not in attention.NAMES.values():
            raise UnsupportedModelError(
                "attention must accept a mask over single entries: load the model with "
                f"attn_implementation='sdpa' or 'eager', was: {usual!r}"
            )
        self._attention: str = model.config._attn_implementation
        self.frequencies = rope.frequencies_of(model)
        self.model = model.eval().requires_grad_(False)
        self.encoder = without_last_mlp(model.base_model)
        self.kv_shape = _kv_shape(model)
        self.tokenizer = tokenizer
        self._template_tokenizer = TextTokenizer(tokenizer, control=True)
        self._ordinary_tokenizer = ordinary_tokenizer(tokenizer)
        self.identity = {
            "weights": weights_digest(model),
            "tokenizer": tokenizer_digest(tokenizer),
            "model": digest_json(
                {k: v for k, v in model.config.to_dict().items() if k not in _NOT_IN_A_KEY}
            ),
            # Not determined by the config: model.to(bfloat16) rounds them, loading does not.
            "frequencies": digest_json(self.frequencies.double().tolist()),
        }
        # Whether LoRA is on is state of the shared model, so only one thread may run it at a time.
        self._lock = forks.lock(self, "_lock", threading.RLock)
        forks.in_child(self, _compute_in_one_thread)
        self._adapters = Adapters(model)
        self.weights = weights
        self._step: Step | None = None
        if weights is not None and self.step(None) is None:
            raise UnsupportedModelError(
                f"weights={weights!r} needs a Llama, Qwen2 or Qwen3 model without hooks, was: "
                f"{type(model).__name__}; leave it out"
            )

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        weights: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **model_kwargs: Any,
    ) -> Generator:
        """Loads a default model by name, a local folder, or a hub id.

        Args:
            model: For example "smollm2-135m", "models/my-llama/" or "Qwen/Qwen3-0.6B".
            device: Default: CUDA if there is one, else CPU.
            dtype: torch.float32, torch.bfloat16, torch.float16 or their names. Default: bfloat16
                where the device computes in it, else float32 on CPU and float16 on CUDA.
            attn_implementation: "sdpa" or "eager". Default: as transformers chooses.
            weights: "float16", "int8" or "int4" writes answers, each after its first token, with
                matrices packed into copies of that many bits, on CPU: faster, and not always the
                same answer. A compressor with a generator adapter has exact ones. Default: exact.
            revision: Branch, tag or commit of a model on the Hub. Default: "main".
            token: Access token of the Hub. Default: that of `hf auth login` or HF_TOKEN.
            cache_dir: Folder of downloads. Default: that of huggingface_hub.
            **model_kwargs: Further arguments of `AutoModelForCausalLM.from_pretrained`. With
                `device_map`, in place of `device`, all weights must be on one device.

        Raises:
            ValueError: for an unknown name or dtype, for files that are missing, cut short or
                git-lfs pointers, or with trust_remote_code=True.
            TypeError: for an argument that transformers does not know.
            ModelUnavailableError: if a default model cannot be fetched.
            UnsupportedModelError: before any weights are read, if its keys cannot be moved.
        """
        _require_usable(model_kwargs, device)
        source = models.resolve(model)
        hub = {"revision": revision or "main", "token": token, "cache_dir": cache_dir}
        model_files.require_loadable(source, hub)
        try:
            config = AutoConfig.from_pretrained(source, **hub)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source!r} is not a causal LM that transformers can load: {error}"
            ) from error
        rope.require_movable(config)
        tokenizer = _load_tokenizer(source, hub)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if attn_implementation is not None:
            model_kwargs["attn_implementation"] = attn_implementation
        try:
            network = AutoModelForCausalLM.from_pretrained(
                source, dtype=_dtype(dtype, device), **hub, **model_kwargs
            )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"weights of {source!r} could not be read: {error}") from error
        if model_kwargs.get("device_map") is None:
            network = network.to(device)
        _require_one_device(network)
        # The identity is that of the bytes that are computed with, whatever becomes of the file.
        model_files.read_into_memory(network)
        return cls(network, tokenizer, weights=weights)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def dtype_name(self) -> str:
        """The dtype as configs and reports spell it: "float32", "bfloat16" or "float16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def max_positions(self) -> int:
        """Number of positions of the model; no prompt may be longer."""
        return int(self.model.config.max_position_embeddings)

    @property
    def hidden_size(self) -> int:
        """Width of the input embeddings."""
        return int(self.model.config.hidden_size)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        configured = self.model.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*listed, self.tokenizer.eos_token_id) if i is not None)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, without any added ones.

        Args:
            text: Any text.
            special: Whether "<|im_end|>" in the text is that special token (in a template) or ten
                ordinary characters (in a chunk or a question, which must not end their turn). So
                are all added tokens that are not words or white space, such as "<tool_call>".
        """
        return (self._template_tokenizer if special else self._ordinary_tokenizer).ids(text)

    def attention_mask(self, attends_to: Tensor) -> Tensor:
        """The additive mask of the model's attention scores; see `attention.additive`.

        Args:
            attends_to: bool. Shape: (rows, 1, queries, keys)
        """
        return attention.additive(attends_to, self.dtype)

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Input embeddings of token ids. Shape: (tokens,) to (tokens, hidden)."""
        ids = torch.as_tensor(ids, dtype=torch.long, device=self.device)
        embeddings: Tensor = self.model.get_input_embeddings()(ids)
        return embeddings

    def add_adapter(self, name: str, config: Any) -> list[tuple[str, nn.Parameter]]:
        """Adds LoRA weights to the model, switched off.

        Args:
            name: A name that no adapter has. The weights of an AdapterName are deleted some time
                after the last reference to it.
            config: A peft.LoraConfig.

        Returns:
            Parameters with their names, without the adapter's name, in the model's order.
        """
        with self._lock:
            return self._adapters.add(name, config)

    def merged_encoder(self, adapter: str) -> Any:
        """The encoder with an adapter merged into copies of its weights, to run with adapters off.

        The copies take as much memory as the weights that the adapter changes.
        """
        with self._lock:
            return merged(self.encoder, adapter)

    def step(self, adapter: str | None) -> Step | None:
        """The forward pass over single tokens, made once.

        None where only transformers' will do: with an adapter on, with hooks, for other
        architectures.
        """
        if adapter is not None or not Step.is_supported(self.model):
            return None
        if self._step is None:
            self._step = Step(self.model, self.weights)
        return self._step

    @contextmanager
    def running(self, adapter: str | None = None) -> Iterator[Any]:
        """Locks the model for one thread: frozen, or with one adapter on.

        It must not be held across a `yield` to a caller, which would block all other threads.
        """
        is_nested = self._lock._is_owned()
        with self._lock:
            if not is_nested:
                self._restore()
            outer = self._adapters.on if is_nested else None
            try:
                self._adapters.switch(adapter)
                yield self.model
            finally:
                self._adapters.switch(outer)

    def _restore(self) -> None:
        """Undoes what an interrupt has left behind, and what is no longer used."""
        if self.model.config._attn_implementation != self._attention:
            self.model.set_attn_implementation(self._attention)
        self._adapters.switch(None)
        self._adapters.delete_unused()


@torch.no_grad()
def _kv_shape(model: Any) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim) of the model's KV cache.

    Raises:
        UnsupportedModelError: if layers, or keys and values, have different shapes.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    layers = model.base_model(input_ids=token, use_cache=True).past_key_values.layers
    shapes = {tuple(t.shape) for layer in layers for t in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise UnsupportedModelError(
            f"{model.config.model_type}: keys and values of all layers must have one shape, "
            f"were: {sorted(shapes)}"
        )
    ((_, heads, _, head_dim),) = shapes
    return len(layers), heads, head_dim


def _compute_in_one_thread(generator: Generator) -> None:
    """In a forked child: torch's own threads are not there, and it would wait for them forever."""
    torch.set_num_threads(1)


def _load_tokenizer(source: str, hub: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, **hub)
    except Exception as error:  # transformers raises any, by what is missing
        raise ValueError(
            f"{source!r} must have a tokenizer, none could be loaded: {error}; save the model's "
            "beside its weights (tokenizer.save_pretrained)"
        ) from error


def _require_no_adapters(model: Any) -> None:
    """Refuses a model with an adapter: its digest and the frozen model are without."""
    if names := sorted(getattr(model, "peft_config", None) or {}):
        raise UnsupportedModelError(
            f"the model must have no adapters, has: {', '.join(names)}; merge them into the "
            "weights (peft's merge_and_unload), or share the Generator that has added them"
        )


def _require_usable(model_kwargs: dict[str, Any], device: str | torch.device | None) -> None:
    if model_kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code must be False, was: True; code from a model's repository is not run"
        )
    if device is not None and model_kwargs.get("device_map") is not None:
        raise ValueError(f"give device ({device}) or device_map, not both")


def _require_one_device(network: nn.Module) -> None:
    devices = sorted({str(parameter.device) for parameter in network.parameters()})
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"all weights must be on one device, were on: {', '.join(devices)}; give device=…, or "
            "a device_map with one device"
        )


def _dtype(wanted: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted, None) or wanted
    if wanted is None:
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if _cpu_computes_bfloat16() else torch.float32
    if wanted not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, was: {wanted}")
    return wanted


def _cpu_computes_bfloat16() -> bool:
    # Without these instructions bfloat16 is emulated and slower than float32.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
