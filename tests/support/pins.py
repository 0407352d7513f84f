"""What tests/data/pinned was written from, and the script that writes it again.

    python tests/pinned.py [FOLDER]

Users have such stores, archives, collections and checkpoints on their disks. Write the pins again
only in a commit that changes a format or a fingerprint on purpose, says so in the changelog, and
raises the format's number; never to make a test pass after something was moved or renamed. Then
copy the constants that the script prints into test_pins.py.

Folders are packed: that keeps modes and empty folders, which git does not, and makes 60 KB of index
a few. `store-format-2.tar.gz` cannot be written again: the code of commit 88f9ee6, the last that
wrote format 2, made it. It stays as it is.

Every weight here comes from a hash and every RoPE frequency is a power of two, so the fingerprints
do not depend on how a machine draws or rounds numbers. They do depend on what transformers puts
into a model's config, and tokenizers into a tokenizer's JSON.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sac_rag.archive import export
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.collection import Collection, CollectionSettings
from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.compressors.config import CompressorConfig
from sac_rag.compressors.full import Full
from sac_rag.compressors.sac import SAC
from sac_rag.errors import CorruptEntryError
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.origin import Origin
from sac_rag.prompts.format import PromptFormat
from sac_rag.stores import DiskStore
from sac_rag.stores.cipher import Cipher

FOLDER = Path(__file__).parents[1] / "data" / "pinned"
NAMESPACE = "tenant"
CIPHER = Cipher(bytes(range(32)))
FORMAT = PromptFormat(system="Read.", chunk="[{number}] {chunk}", stop=("\n",))
SINK = "<|im_start|>system\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What is stored, by name; "zoë" is not ASCII on purpose.
TEXTS = {
    "owls": "Owls hear mice under snow.",
    "barley": "She sold barley in May.",
    "zoë": "Zoë counted seven ships.",
}
# What was stored once, by the reason why it is no longer there.
GONE = {
    "expired": "Copper is cheap.",
    "evicted": "Ice is a slow river.",
    "forgotten": "The treaty is void.",
    "corrupt": "The tower is tall.",
}
CHUNKS = (
    Chunk(TEXTS["owls"], id="birds.txt", title="Owls", metadata={"page": 3}),
    Chunk(TEXTS["barley"], id="farm.txt"),
    Chunk(TEXTS["zoë"], id="farm.txt", ratio=2),
)
QUESTION = "Who counted the ships?"

_SAC = {"ratio": 3, "lora_rank": 2, "lora_alpha": 4, "stored_dtype": "float32", "sink": SINK}
_CHOSEN = {**_SAC, "anchor_embedding": "none", "attention": "causal"}
_LEARNED = {**_CHOSEN, "anchors": "learned"}

# Fields of a config that are not at their default, by a name of ours.
CONFIGS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "sink": SINK},
    "full, no sink": {"method": "full"},
    "full, float32": {"method": "full", "sink": SINK, "stored_dtype": "float32"},
    "uniform": _SAC,
    "uniform, int8": {**_SAC, "stored_dtype": "int8"},
    "uniform, another ratio": {**_SAC, "ratio": 4},
    "uniform, another sink": {**_SAC, "sink": "<|im_start|>user\n"},
    "uniform, heading": {**_SAC, "heading": "<|im_start|>"},
    "uniform, slots": {**_SAC, "anchor_embedding": "slot", "segment_tokens": 16},
    "uniform, no cue": {**_SAC, "cue": False},
    "uniform, no LoRA": {**_SAC, "lora_targets": ()},
    "generator adapter": {**_SAC, "generator_adapter_rank": 2},
    "anchors see all": {**_SAC, "attention": "anchors"},
    "surprisal": {**_SAC, "anchors": "surprisal"},
    "attention": {**_CHOSEN, "anchors": "attention"},
    "learned": _LEARNED,
    "learned, another ratio": {**_LEARNED, "ratio": 6},
    "learned, network": {**_LEARNED, "scorer_width": 4},
    "learned, layers": {**_LEARNED, "budget": "layers"},
    # Several segments per text, so that their joint order of importance is pinned too.
    "learned, shared": {**_LEARNED, "budget": "shared", "segment_tokens": 16},
}
CHECKPOINT = "learned, shared"
# What is in the stores: compressor, text, documents, namespace.
STORED = (
    (CHECKPOINT, "owls", ("birds.txt", "all.txt"), ""),
    (CHECKPOINT, "barley", ("farm.txt",), NAMESPACE),
    ("full", "owls", ("birds.txt",), ""),
    ("uniform, int8", "zoë", (), ""),
)
PINNED_ENTRY = 3  # of STORED


def numbers(name: str, shape: tuple[int, ...], scale: float) -> Tensor:
    """Float32 from -scale to scale, the same on every machine if the scale is a power of two."""
    digits = hashlib.shake_256(name.encode()).digest(2 * math.prod(shape))
    integers = np.frombuffer(digits, dtype="<i2").astype(np.float32).reshape(shape)
    return torch.from_numpy(integers) / 32768 * scale


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte: nothing is trained."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model() -> Any:
    """A Llama of two layers whose weights are large enough that each of them matters."""
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 256.0},  # 1, 1/4, 1/16, 1/64
        bos_token_id=1,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            shape = tuple(weight.shape)
            if weight.ndim == 1:
                weight.copy_(1 + numbers(name, shape, 0.125))
            else:
                weight.copy_(numbers(name, shape, 1.0 if "embed" in name else 0.5))
        model.lm_head.weight[0] = 0  # no answer ends before it has begun
    return model


def make_generator() -> Generator:
    """On the CPU, in float32."""
    return Generator(make_model(), make_tokenizer())


def make_compressor(generator: Generator, name: str) -> Compressor:
    """One of CONFIGS."""
    settings = CONFIGS[name]
    if settings.get("method") == "full":
        return Full(generator, Full.default_config(**settings))
    compressor = SAC(generator, CompressorConfig(**settings))
    compressor.load_weights(
        {n: numbers(n, tuple(weight.shape), 0.25) for n, weight in compressor.weights.items()}
    )
    return compressor


def make_model_folder(folder: Path) -> None:
    """The model as SacRAG.from_pretrained reads it; it serves as embedder too."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@contextmanager
def beside_the_model(folder: Path) -> Iterator[None]:
    """Works in a folder with `model` and `checkpoint`: the paths that a collection notes.

    Whatever the machine has, a model is loaded on the CPU and in float32: the dtype is in the
    fingerprint.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def value_name(compressor: str, text: str) -> str:
    """Under which a KV is in values.safetensors."""
    return f"{compressor}/{text}"


def fill(folder: Path, cipher: Cipher | None) -> None:
    """A store with all that a store holds: entries, documents, a pin, tombstones, counters."""
    generator = make_generator()

    def keep(store: DiskStore, name: str, text: str, *documents: str) -> CachedCompressor:
        cached = CachedCompressor(make_compressor(generator, name), store, guard=False)
        (kv,) = cached.inner.compress([text])
        cached.keep(text, kv, documents)
        return cached

    with DiskStore(folder, cipher=cipher) as store:
        keep(store, "full", GONE["expired"])
    with DiskStore(folder, cipher=cipher, max_age_s=1e-9) as store:
        assert store.gc().expired == 1
    with DiskStore(folder, cipher=cipher) as store:
        for name, text, documents, namespace in STORED:
            compressor = make_compressor(generator, name)
            cached = CachedCompressor(compressor, store, namespace=namespace, guard=False)
            (kv,) = compressor.compress([TEXTS[text]])
            cached.keep(TEXTS[text], kv, documents)
            cached.fetch([TEXTS[text]], on_miss="raise")
            if (name, text) == STORED[PINNED_ENTRY][:2]:
                store.pin([cached.key(TEXTS[text])])
        kept = {make_compressor(generator, name).fingerprint for name, *_ in STORED}
        keep(store, "uniform, another ratio", GONE["evicted"])
        assert store.gc(kept).superseded == 1
        assert keep(store, "full", GONE["forgotten"], "secret.txt").forget("secret.txt") == 1
        cached = keep(store, "full", GONE["corrupt"], "tower.txt")
        (path,) = folder.glob(f"entries/*/{cached.key(GONE['corrupt'])}-*.kv")
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        try:
            store[cached.key(GONE["corrupt"])]
        except CorruptEntryError:
            assert store.stats().quarantined == 1
        assert cached.fetch([TEXTS["barley"]], on_miss="text").misses == ["absent"]


def pack(folder: Path) -> None:
    """Puts a folder into a .tar.gz beside it, in its place."""

    def nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid, member.gid, member.uname, member.gname = 0, 0, "", ""
        return member

    with tarfile.open(folder.with_name(f"{folder.name}.tar.gz"), "w:gz") as packed:
        packed.add(folder, folder.name, filter=nobodys)
    shutil.rmtree(folder)


def unpack(name: str, into: Path) -> Path:
    """A copy of a pinned folder, to be opened and changed."""
    with tarfile.open(FOLDER / f"{name}.tar.gz") as packed:
        packed.extractall(into, filter="data")
    return into / name


def write(folder: Path) -> None:
    """Writes all pins but `store-format-2` into a folder that has none."""
    generator = make_generator()
    compressor = make_compressor(generator, CHECKPOINT)
    checkpoint.save(compressor, folder / "checkpoint", prompt_format=FORMAT)
    fill(folder / "store", None)
    fill(folder / "store-encrypted", CIPHER)
    with DiskStore(folder / "store", read_only=True) as store:
        export(store, folder / "archive.sacrag", Origin.of(compressor, FORMAT))
    save_file(
        {
            f"{value_name(name, text)}/{part}": tensor.contiguous()
            for name, text in [*[(CHECKPOINT, text) for text in TEXTS], *[s[:2] for s in STORED]]
            for part, tensor in parts_of(
                make_compressor(generator, name).compress([TEXTS[text]])[0]
            ).items()
        },
        folder / "values.safetensors",
    )
    make_model_folder(folder / "model")
    with beside_the_model(folder):
        settings = CollectionSettings(
            model="./model", compressor="./checkpoint", embedder="./model", chunk_tokens=64
        )
        collection = Collection("collection", settings)
        collection.add(CHUNKS)
        assert sum(report.computed for report in collection.precompress(CHUNKS)) == len(CHUNKS)
        collection.close()
    # What other threads of this process have open ends with the collection, and only when all is
    # closed does SQLite merge its log into the index.
    del collection
    gc.collect()
    DiskStore(folder / "collection" / "anchors").close()
    shutil.rmtree(folder / "model")
    for name in ("store", "store-encrypted", "collection"):
        pack(folder / name)


def parts_of(kv: AnchorKV) -> dict[str, Tensor]:
    """What an AnchorKV means, as plain tensors, whatever it is kept in."""
    return {"keys": kv.keys, "values": kv.values, "positions": kv.positions, "heads": kv.heads}


def constants() -> Iterator[str]:
    """What test_pins.py has as literals."""
    generator = make_generator()
    yield "IDENTITY = {"
    yield from (f'    "{name}": "{digest}",' for name, digest in generator.identity.items())
    yield "}"
    yield "FINGERPRINTS = {"
    for name in CONFIGS:
        yield f'    "{name}": "{make_compressor(generator, name).fingerprint}",'
    yield "}"


def main(target: str | None = None) -> None:
    """Replaces the pins, once all of them could be written, and prints the constants."""
    target_folder = FOLDER if target is None else Path(target)
    target_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as home:
        os.environ["SAC_RAG_HOME"] = home
        write(Path(name))
        for made in Path(name).iterdir():
            old = target_folder / made.name
            if old.is_dir():
                shutil.rmtree(old)
            shutil.move(made, old)
    sys.stdout.writelines(f"{line}\n" for line in constants())


if __name__ == "__main__":
    main(*sys.argv[1:])
