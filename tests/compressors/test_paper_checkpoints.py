"""The authors' checkpoints give, in our compressor, what their own code gives.

Their file is made up here: its names and shapes are theirs, its numbers are random. Their code is
written out below in plain torch, with two copies of the model, and shares nothing with ours.

TOLERANCE: float32 sums in another order, LoRA merged into the weights on one side. Logits are of
order 10, and one wrong position, slot or matrix changes them by more than 0.1.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PROSE, make_compressor, make_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast

from sac_rag import SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors import checkpoint, pretrained
from sac_rag.compressors import paper_checkpoints as reference
from sac_rag.compressors.full import read_plain
from sac_rag.compressors.sac import SAC
from sac_rag.errors import PromptTooLongError
from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import assemble
from sac_rag.prompts.chat import Markup
from sac_rag.prompts.format import PromptFormat
from sac_rag.prompts.generate import Decoding
from sac_rag.training.objective import Objective
from sac_rag.training.rows import RowMaker

TOLERANCE = 1e-4
SEGMENT = 510
RANK = 4
QUESTION = "What counted seven ships?"

# How Llama 3 cuts text before BPE: a line break goes with the sign before it.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Contexts of one segment, of exactly one, and of two, with the BOS and the heading.
CONTEXTS = {
    "short": PROSE[0],
    "one token": "a",
    "begins with a line break": "\n\n" + PROSE[1],
    "one segment": " ".join(PROSE * 3)[:900],
    "two segments": " ".join(PROSE * 5),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Small, and like Llama 3's in what matters here: it puts a BOS first and merges "?\\n"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end_of_text|>", "<|begin_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*PROSE, *["?\n", ":\n", ":\n\n"] * 20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


def make_generator() -> Generator:
    """The tiny Llama with that tokenizer."""
    return Generator(make_model("llama"), make_tokenizer())


@pytest.fixture(scope="module")
def tiny() -> Generator:
    """One that tests must not change."""
    return make_generator()


def their_file(slots: int = 34, layers: int = 3, hidden: int = 48) -> dict[str, Tensor]:
    """What `adapter.pt` would hold for the tiny Llama."""
    random = torch.Generator().manual_seed(7)

    def tensor(*shape: int, std: float = 0.2) -> Tensor:
        return torch.randn(shape, generator=random) * std

    held = {"role_tokens": tensor(slots, hidden), "special_tokens": tensor(2, hidden, std=0.5)}
    for layer in range(layers):
        for name, out in (("q_proj", 64), ("v_proj", 32)):
            path = f"model.model.layers.{layer}.self_attn.{name}"
            held[f"{path}.lora_A"] = tensor(hidden, RANK)
            held[f"{path}.lora_B"] = tensor(RANK, out)
    return held


class Theirs:
    """Their arithmetic, one question and one context at a time."""

    def __init__(self, ratio: int, file: dict[str, Tensor]) -> None:
        self.ratio = ratio
        self.tokenizer = make_tokenizer()
        self.decoder = make_model("llama")
        self.encoder = copy.deepcopy(self.decoder)
        self.slots, self.lm = file["role_tokens"], file["special_tokens"][1]
        for name, a in file.items():
            if name.endswith("lora_A"):
                module = self.encoder.get_submodule(name.removesuffix(".lora_A")[len("model.") :])
                b = file[name.removesuffix("A") + "B"]
                module.weight.data += 2 * (a @ b).T

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def context(self, text: str) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.ids("### Context:\n"), *self.ids(text)]

    def question(self, text: str) -> list[int]:
        return [
            *self.ids("\n### Question:\n"),
            *self.ids(text),
            *self.ids("\n### Answer:\n"),
        ]

    @torch.no_grad()
    def compress(self, context: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer. Shape of each: (1, kv_heads, anchors, head_dim)"""
        segments = []
        for start in range(0, len(context), SEGMENT):
            ids = torch.tensor([context[start : start + SEGMENT]])
            count = ids.shape[1]
            first = (self.ratio - 1) // 2
            anchors = list(range(first if first < count else 0, count, self.ratio))
            embeds = self.encoder.get_input_embeddings()(ids).clone()
            for slot, anchor in enumerate(anchors):
                embeds[0, anchor] += self.slots[slot]
            cache = self.encoder(
                inputs_embeds=embeds,
                position_ids=torch.arange(start + 1, start + count + 1)[None],
                attention_mask=torch.zeros(1, 1, count, count),
                use_cache=True,
            ).past_key_values
            segments.append(
                [(layer.keys[:, :, anchors], layer.values[:, :, anchors]) for layer in cache.layers]
            )
        return [
            (torch.cat([key for key, _ in layer], 2), torch.cat([value for _, value in layer], 2))
            for layer in zip(*segments, strict=True)
        ]

    @torch.no_grad()
    def logits(self, context: list[int], question: list[int]) -> Tensor:
        """Of the cue and of each token after it. Shape: (1 + tokens, vocabulary)"""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.compress(context)):
            cache.update(keys, values, layer)
        asked = self.decoder.get_input_embeddings()(torch.tensor([question]))
        embeds = torch.cat([self.lm[None, None], asked], dim=1)
        end = len(context)
        logits: Tensor = self.decoder(
            inputs_embeds=embeds,
            position_ids=torch.arange(end, end + embeds.shape[1])[None],
            past_key_values=cache,
        ).logits[0]
        return logits

    def text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def answer(self, context: list[int], question: list[int], count: int) -> list[int]:
        written: list[int] = []
        for _ in range(count):
            written.append(int(self.logits(context, question + written)[-1].argmax()))
        return written


@pytest.fixture(scope="module")
def theirs() -> Theirs:
    return Theirs(15, their_file())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.save(their_file(), tmp_path / "adapter.pt")
    return tmp_path / "adapter.pt"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The tiny Llama as a folder."""
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def ours(adapter: Path) -> SAC:
    return reference.load(adapter, make_generator()).storing("float32")


def save(path: Path, held: Any) -> Path:
    torch.save(held, path)
    return path


# --- the same numbers


def test_the_tokenizer_would_show_a_prompt_that_is_put_together_otherwise() -> None:
    theirs = make_tokenizer()
    for one, other in (("Who?", "\n### Answer"), ("### Context:\n", "\nText")):
        first, then, joined = (
            theirs(text, add_special_tokens=False).input_ids for text in (one, other, one + other)
        )
        assert joined != first + then
    assert theirs("a").input_ids[0] == theirs.bos_token_id


@pytest.mark.parametrize("context", CONTEXTS)
def test_keys_and_values_are_theirs(ours: SAC, theirs: Theirs, context: str) -> None:
    text = CONTEXTS[context]
    ids = theirs.context(text)
    assert ours.tokenize(text) == ids
    assert (len(ids) > SEGMENT) == (context == "two segments")
    expected = theirs.compress(ids)
    (kv,) = ours.compress([text])
    cache = assemble([[kv, [5]]], ours.generator, first_position=1).cache
    assert kv.num_tokens == len(ids)
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        torch.testing.assert_close(layer.keys, keys, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(layer.values, values, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("context", CONTEXTS)
def test_logits_are_theirs(ours: SAC, theirs: Theirs, context: str, home: Path) -> None:
    text = CONTEXTS[context]
    rag = SacRAG(CachedCompressor(ours, {}), prompt_format=reference.FORMAT)
    run = rag._start([(QUESTION, [text])], Decoding(max_new_tokens=1), None)
    prompt, generator = run.prompt, ours.generator
    with torch.no_grad():
        got = generator.model(**prompt.inputs()).logits[0]
    ids, asked = theirs.context(text), theirs.question(QUESTION)
    assert prompt.position_ids[0].tolist() == list(range(len(ids), len(ids) + len(asked) + 1))
    expected = theirs.logits(ids, asked)
    assert expected.abs().max() > 1, "logits too small for the tolerance to mean anything"
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("slots", [102, 10])
def test_logits_are_theirs_at_the_other_ratios(slots: int, tmp_path: Path, home: Path) -> None:
    file = their_file(slots)
    ours = reference.load(save(tmp_path / "a.pt", file), make_generator())
    rag = SacRAG(CachedCompressor(ours.storing("float32"), {}), prompt_format=reference.FORMAT)
    theirs = Theirs(510 // slots, file)
    text = CONTEXTS["two segments"]
    answer = rag.answer("Who?", [text], Decoding(max_new_tokens=8))
    expected = theirs.answer(theirs.context(text), theirs.question("Who?"), 8)
    assert answer.text.strip() == theirs.text(expected)


def test_a_file_of_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    held = {name: tensor.bfloat16() for name, tensor in their_file().items()}
    weights = reference.load(save(tmp_path / "a.pt", held), make_generator()).weights
    assert torch.equal(weights["cue"], held["special_tokens"][1].float())
    assert torch.equal(
        weights["model.layers.2.self_attn.v_proj.lora_B.weight"],
        held["model.model.layers.2.self_attn.v_proj.lora_B"].T.float(),
    )


# --- the folder


def test_the_folder_answers_as_their_code_does(
    adapter: Path, base: Path, theirs: Theirs, tmp_path: Path, home: Path
) -> None:
    out = tmp_path / "new" / "compressor"
    made = reference.convert(adapter, base, out)
    names = {"config.json", "compressor.safetensors", "format.json", "README.md"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == ["compressor"]
    checkpoint.save(made.storing("float32"), tmp_path / "exact", prompt_format=reference.FORMAT)
    rag = SacRAG.from_pretrained(base, compressor=tmp_path / "exact", dtype="float32")
    assert rag.prompt_format == reference.FORMAT
    assert rag.compressor.config.ratio == 15
    for context in ("short", "two segments"):
        text = CONTEXTS[context]
        answer = rag.answer(QUESTION, [text], Decoding(max_new_tokens=12))
        expected = theirs.answer(theirs.context(text), theirs.question(QUESTION), 12)
        assert answer.text.strip() == theirs.text(expected)
        again = rag.answer(QUESTION, [text], Decoding(max_new_tokens=12))
        assert (again.text, again.chunks[0].status) == (answer.text, "hit")


def test_a_folder_that_is_there_and_empty_is_taken(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    reference.convert(adapter, base, tmp_path / "out")
    assert checkpoint.read(tmp_path / "out")[0].first_position == 1


@pytest.mark.parametrize("what", ["a file in it", "a file"])
def test_an_out_that_holds_something_is_left_as_it_is(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    held = out
    if what == "a file in it":
        out.mkdir()
        held = out / "config.json"
    held.write_text("mine")
    # Neither file nor model are there: nothing is read before this is seen.
    with pytest.raises(ValueError, match=r"must be a folder that is new or empty, was: .*another"):
        reference.convert(tmp_path / "no.pt", "no-model", out)
    assert held.read_text() == "mine"


def test_a_conversion_that_fails_leaves_nothing(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        reference.convert(adapter, base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def sac_rag(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sac_rag.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )


def test_the_command_converts(
    adapter: Path, base: Path, theirs: Theirs, tmp_path: Path, home: Path
) -> None:
    out = tmp_path / "out"
    done = sac_rag("convert", str(adapter), "--base", str(base), "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"compressor": str(out), "ratio": 15, "rank": RANK}
    rag = SacRAG.from_pretrained(base, compressor=out, dtype="float32")
    assert rag.answer("Who?", PROSE[:3], Decoding(max_new_tokens=4)).text
    loaded = checkpoint.load(out, rag.generator, stored_dtype="float32")
    ids = theirs.context(PROSE[3])
    (kv,) = loaded.compress([PROSE[3]])
    values = torch.stack([value[0] for _, value in theirs.compress(ids)])
    torch.testing.assert_close(kv.by_head()[1], values, atol=TOLERANCE, rtol=0)


def test_the_command_says_what_is_wrong_in_a_sentence(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    done = sac_rag(
        "convert", str(tmp_path / "adapter.pt"), "--base", str(base), "--out", str(tmp_path / "out")
    )
    assert done.returncode == 1
    assert "must be a dict of tensors written by torch.save" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# --- files that are not theirs


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


@pytest.mark.parametrize("written_by", ["torch", "pickle"])
def test_code_in_a_file_is_refused_and_never_run(
    written_by: str, tiny: Generator, tmp_path: Path
) -> None:
    sprung = tmp_path / "sprung"
    path = tmp_path / "adapter.pt"
    held = {**their_file(), "role_tokens": Trap(sprung)}
    if written_by == "torch":
        torch.save(held, path)
    else:
        path.write_bytes(pickle.dumps(held))
    with pytest.raises(ValueError, match=r"has code in it, of which nothing was run") as refused:
        reference.load(path, tiny)
    assert not sprung.exists()
    assert "weights_only" not in str(refused.value), "torch advises to run the code"
    if written_by == "torch":
        torch.load(path, weights_only=False)
        assert sprung.exists(), "the trap does nothing"


@pytest.mark.parametrize("kept", [0, 1, 3, 100, 2000, -300, -1])
def test_half_a_file_is_refused(kept: int, adapter: Path, tiny: Generator) -> None:
    adapter.write_bytes(adapter.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"must be a dict of tensors .* damaged, .* get the"):
        reference.load(adapter, tiny)


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04", b"\x80\x02.", b"{}", b"\x80\x05N."])
def test_what_torch_did_not_write_is_refused(
    content: bytes, tiny: Generator, tmp_path: Path
) -> None:
    (tmp_path / "adapter.pt").write_bytes(content)
    with pytest.raises(ValueError, match="must be a dict of tensors"):
        reference.load(tmp_path / "adapter.pt", tiny)


def test_a_file_that_is_not_there_is_named(tiny: Generator, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.pt cannot be read: .*No such file"):
        reference.load(tmp_path / "no.pt", tiny)


LORA = "model.model.layers.1.self_attn.v_proj.lora_"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"role_tokens": None}, "lacks 1 tensors, the first is 'role_tokens'"),
        ({f"{LORA}B": None}, f"lacks 1 tensors, the first is '{LORA}B'"),
        ({"decoder.weight": (3,)}, "must not have 1 tensors, the first is 'decoder.weight'"),
        ({f"{LORA}C": (3,)}, "must not have 1 tensors"),
        ({"model.model.layers.99999999999.x": (3,)}, "lacks 4 tensors"),
        ({"role_tokens": (34,)}, r"'role_tokens' .* shape \(34, 0\), .* was: \(34,\)"),
        ({"role_tokens": ()}, r"'role_tokens' .* was: \(\)"),
        ({"role_tokens": (0, 48)}, r"'role_tokens' .* none of it 0, .* was: \(0, 48\)"),
        ({"special_tokens": (1, 48)}, r"'special_tokens' .* \(2, 48\), .* was: \(1, 48\)"),
        ({f"{LORA}A": (RANK, 48)}, r"'.*lora_A' .* \(48, 4\), .* was: \(4, 48\)"),
        ({f"{LORA}A": ()}, r"'.*lora_A' .* was: \(\)"),
        ({f"{LORA}B": (5, 32)}, r"'.*lora_B' .* \(4, 32\), .* was: \(5, 32\)"),
        ({f"{LORA}B": ()}, r"'.*lora_B' .* was: \(\)"),
        ({f"{LORA}B": (RANK, 33)}, "do not fit this model .*v_proj.lora_B"),
        ({"role_tokens": (77, 48)}, "77 slots .* no ratio gives"),
        ({"role_tokens": (9, 48)}, "9 slots .* ratio 5[0-9] to 6[0-9]; give one of them"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    changes: dict[str, tuple[int, ...] | None], complaint: str, tmp_path: Path
) -> None:
    held = their_file()
    for name, shape in changes.items():
        if shape is None:
            del held[name]
        else:
            held[name] = torch.ones(shape)
    with pytest.raises(ValueError, match=complaint):
        reference.load(save(tmp_path / "adapter.pt", held), make_generator())


@pytest.mark.parametrize(
    ("held", "complaint"),
    [
        ([torch.ones(3)], "must hold a flat dict of tensors, was: list"),
        ({"state": their_file()}, "its entry 'state' is a dict"),
        ({3: torch.ones(3)}, "its entry 3 is a Tensor"),
        ({"role_tokens": torch.ones(3, dtype=torch.long)}, "torch.int64"),
        ({"role_tokens": torch.ones(3, 3).to_sparse()}, "torch.sparse_coo"),
        ({"role_tokens": torch.tensor([torch.nan])}, "'role_tokens' is not finite"),
    ],
)
def test_a_file_of_another_structure_is_refused(
    held: Any, complaint: str, tmp_path: Path, tiny: Generator
) -> None:
    with pytest.raises(ValueError, match=complaint):
        reference.load(save(tmp_path / "adapter.pt", held), tiny)


@pytest.mark.parametrize("sizes", [{"layers": 2}, {"hidden": 64}])
def test_another_models_file_is_refused(sizes: dict[str, int], tmp_path: Path, base: Path) -> None:
    path = save(tmp_path / "adapter.pt", their_file(**sizes))
    with pytest.raises(ValueError, match="this one has hidden size 48 and 3 layers; give the base"):
        reference.convert(path, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_bos_is_refused(adapter: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="begin with a BOS"):
        reference.load(adapter, Generator(make_model("llama"), tokenizer))


@pytest.mark.parametrize(("slots", "ratio"), [(102, 5), (34, 15), (10, 51), (510, 1)])
def test_the_ratio_follows_from_the_slots(slots: int, ratio: int, tmp_path: Path) -> None:
    path = save(tmp_path / "adapter.pt", their_file(slots))
    config = reference.load(path, make_generator()).config
    assert (config.ratio, config.segment_tokens) == (ratio, SEGMENT)
    assert (config.lora_rank, config.lora_alpha) == (RANK, 2 * RANK)


def test_a_ratio_that_is_open_can_be_given(tmp_path: Path) -> None:
    path = save(tmp_path / "adapter.pt", their_file(10))
    assert reference.load(path, make_generator(), ratio=50).config.ratio == 50
    with pytest.raises(ValueError, match="ratio 49 to 53, was given: 15"):
        reference.load(path, make_generator(), ratio=15)


# --- what the core learned for it


@pytest.mark.parametrize("prefix", [False, True])
def test_where_a_prompt_starts_changes_positions_and_no_logits(
    tiny: Generator, prefix: bool
) -> None:
    compressor = make_compressor(tiny, "sac")
    (kv,) = compressor.compress([PROSE[0]])
    read = read_plain(tiny, [1, 7, 9]) if prefix else None

    def logits(first: int) -> tuple[Tensor, Tensor]:
        prompt = assemble(
            [[[4, 5], kv, [6, 7, 8]]],
            tiny,
            prefix=read,
            cue=compressor.cue,
            first_position=first,
        )
        with torch.no_grad():
            out = tiny.model(**prompt.inputs()).logits
        return out, torch.cat([prompt.position_ids[0], prompt.next_positions])

    at_zero, positions = logits(0)
    for first in (1, 300):
        elsewhere, moved = logits(first)
        assert torch.equal(moved, positions + first)
        torch.testing.assert_close(elsewhere, at_zero, atol=TOLERANCE, rtol=0)


def test_the_position_left_free_counts_against_the_last(ours: SAC, home: Path) -> None:
    rag = SacRAG(CachedCompressor(ours, {}), prompt_format=reference.FORMAT)
    room = 8192 - len(rag.prompt_ids("Who?", [PROSE[0]]))
    with pytest.raises(PromptTooLongError):
        rag.stream("Who?", [PROSE[0]], Decoding(max_new_tokens=room))
    rag.stream("Who?", [PROSE[0]], Decoding(max_new_tokens=room - 1))


def test_a_chunk_read_as_text_has_its_heading_too(ours: SAC, theirs: Theirs, home: Path) -> None:
    rag = SacRAG(CachedCompressor(ours, {}), prompt_format=reference.FORMAT, on_miss="text")
    ids = theirs.context(PROSE[0]) + theirs.question("Who?")
    assert rag.prompt_ids("Who?", [PROSE[0], Chunk(" ")]) == ids
    answer = rag.answer("Who?", [PROSE[0], Chunk(" ")], Decoding(max_new_tokens=8))
    got = theirs.decoder.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    assert answer.text.strip() == theirs.text(got[0, len(ids) :].tolist())


def test_training_compresses_and_reads_the_heading_too(ours: SAC, theirs: Theirs) -> None:
    rows = RowMaker(ours.generator, reference.FORMAT)
    row = rows.continue_text(" ".join(PROSE), 100)
    assert row is not None
    objective = Objective(ours, rows.prefix_ids)
    (kv,) = objective.encode(ours, [row])
    (source,) = row.sources
    ids = [*theirs.context(""), *source.ids]
    values = torch.stack([value[0] for _, value in theirs.compress(ids)])
    torch.testing.assert_close(kv.by_head()[1].detach(), values, atol=TOLERANCE, rtol=0)
    (target,) = row.targets
    plain = theirs.decoder(torch.tensor([[*ids, *target.ids[:-1]]])).logits[0, -target.predicted :]
    predicted = objective.predict([row], 15, read_as="text")
    torch.testing.assert_close(predicted.logits, plain.detach(), atol=TOLERANCE, rtol=0)


def test_a_raw_format_is_its_own_words_with_the_question_apart() -> None:
    chunk = Chunk("text {question}", title="{question}<|im_end|>")
    own = PromptFormat(
        chat=False, raw=True, prefix="<|im_start|>", chunk="{title}:{chunk}", separator="|",
        user="P{chunks}\nQ: {question}<|im_end|>",
    )  # fmt: skip
    pieces = own.pieces(make_tokenizer(), "{chunks}?", [chunk, chunk])
    assert pieces == [
        Markup("<|im_start|>"), Markup("P"),
        "{question}<|im_end|>:", chunk, "|", "{question}<|im_end|>:", chunk,
        Markup("\nQ: "), "{chunks}?", Markup("<|im_end|>"),
    ]  # fmt: skip
    assert PromptFormat.from_json(own.to_json()) == own
    assert own.opening(make_tokenizer()).startswith("<|im_start|>P")
    asked_first = PromptFormat(chat=False, raw=True, chunk="{chunk}", user="{question}\n{chunks}!")
    assert asked_first.pieces(make_tokenizer(), "Who?", [chunk]) == [
        "Who?", Markup("\n"), chunk, Markup("!")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="the question must have text"):
        own.pieces(make_tokenizer(), " ", [])


def test_raw_is_of_plain_prompts_alone() -> None:
    with pytest.raises(ValueError, match="cannot be 'raw'; give chat=False"):
        PromptFormat(raw=True)
    with pytest.raises(ValueError, match="'raw' must be a bool, was: 1"):
        PromptFormat(chat=False, raw=1)  # type: ignore[arg-type]


def test_a_heading_must_be_a_str() -> None:
    with pytest.raises(ValueError, match="heading must be a str, was: 3"):
        checkpoint.CompressorConfig(heading=3)  # type: ignore[arg-type]
