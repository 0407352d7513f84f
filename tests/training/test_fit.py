"""A compressor is fitted to any model as it is, and keeps what held-out passages need."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import ARCHITECTURES, PROSE, make_compressor, make_model, make_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import sac_rag
from sac_rag.cli import app
from sac_rag.compressors import checkpoint
from sac_rag.compressors.sac import SAC
from sac_rag.evaluation.questions import read_questions
from sac_rag.lm.generator import Generator
from sac_rag.loading import default_compressor
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.format import SPANS
from sac_rag.training import fit_figures
from sac_rag.training.fit import PASSAGES, Fitted, fit

CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}

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


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MRQA's layout: 28 passages of two sentences, with a question about each."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = [
        {
            "context": " ".join(PROSE[i] for i in pair),
            "qas": [{"question": ASKED[i][0], "answers": [ASKED[i][1]]} for i in pair],
        }
        for pair in combinations(range(len(PROSE)), 2)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    rng = random.Random(0)
    path.write_text("\n\n".join(" ".join(rng.sample(PROSE, 3)) for _ in range(20)))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def uneven(model: Any) -> Any:
    """The model with heads that differ as those of real models do: every other one looks up little.

    With random weights alone no head needs more of a text than another.
    """
    config = model.config
    width = config.head_dim
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            if config.model_type == "qwen3":  # normalizes the keys of each head
                layer.self_attn.q_norm.weight.mul_((0.3, 2.0)[number % 2])
                continue
            for head in range(config.num_key_value_heads):
                rows = slice(head * width, (head + 1) * width)
                layer.self_attn.k_proj.weight[rows] *= (0.3, 2.0)[(number + head) % 2]
    return model


def without_grouped_heads() -> Any:
    """A tiny Llama with a KV head for each query head."""
    config = make_model("llama").config.to_dict()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**config, "num_key_value_heads": 4}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.15 if "embed" not in name else 0.5)
    return model


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "llama without grouped heads"])
def fitted(request: pytest.FixtureRequest, questions: Path) -> Fitted:
    made = make_model(request.param) if request.param in ARCHITECTURES else without_grouped_heads()
    return fit(Generator(uneven(made), make_tokenizer()), data=[questions], ratio=4)


def kept(fitted: Fitted, budget: str, ratio: int) -> list[float]:
    """The share of attention kept in each prompt."""
    return [f.attention_kept for f in fitted.figures if (f.budget, f.ratio) == (budget, ratio)]


def budgets(compressor: SAC) -> Tensor:
    """Entries of each head, of a passage at the compressor's ratio. Shape: (layers, kv_heads)."""
    (kv,) = compressor.compress([" ".join(PROSE)])
    return kv.counts


def test_heads_get_different_budgets_and_keep_more_of_held_out_attention_than_equal_ones(
    fitted: Fitted,
) -> None:
    counts = budgets(fitted.compressor)
    assert int(counts.min()) < int(counts.max()) / 2
    assert (fitted.passages, fitted.held_out) == (25, 3)
    for ratio in (3, 4, 5, 10):
        for shared, equal in zip(
            kept(fitted, "shared", ratio), kept(fitted, "uniform", ratio), strict=True
        ):
            assert shared > equal
    assert kept(fitted, "shared", 1) == pytest.approx([1.0, 1.0])
    falling = [kept(fitted, "shared", ratio) for ratio in (1, 2, 3, 4, 5, 10, 20)]
    assert falling == sorted(falling, reverse=True)


def test_nothing_but_scorer_and_budgets_is_fitted(questions: Path) -> None:
    generator = Generator(make_model("qwen3"), make_tokenizer())
    before = {n: weight.clone() for n, weight in generator.model.named_parameters()}
    result = fit(generator, data=[questions], passages=4)
    after = dict(generator.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.compressor.weights.keys() == result.compressor.fitted
    untouched = SAC(generator, result.compressor.config)
    assert any(bool(weight.any()) for weight in untouched.weights.values())
    for name in ("scorer", "scorer.out.weight", "budget"):
        assert not torch.equal(result.compressor.weights[name], untouched.weights[name])


def test_equal_seeds_fit_equal_weights(llama: Generator, questions: Path) -> None:
    one, same, other = (fit(llama, data=[questions], passages=8, seed=seed) for seed in (3, 3, 4))
    assert one.compressor.fingerprint == same.compressor.fingerprint
    assert one.figures == same.figures
    assert one.compressor.fingerprint != other.compressor.fingerprint


def test_what_was_fitted_answers_and_is_what_the_figures_are_of(
    saved: Path, questions: Path, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    out = tmp_path / "made" / "here"
    result = fit(saved, out, data=[questions], passages=6, on_event=events.append, **CPU)
    rag = SacRAG.from_pretrained(saved, compressor=out, **CPU)
    assert rag.compressor.fingerprint == result.compressor.fingerprint
    answer = rag.answer("Who counted ships?", list(PROSE[:3]))
    assert [chunk.status for chunk in answer.chunks] == ["absent"] * 3
    assert answer.usage.source_tokens > 4 * answer.usage.anchors_computed
    assert json.loads((out / "figures.json").read_text()) == result.to_dict()
    assert [e["event"] for e in events] == ["read"] * 5 + ["fit"] + ["measure"]
    assert not list(out.parent.glob(".*"))


def test_a_fitted_compressor_is_replaced_and_nothing_else_is(
    saved: Path, questions: Path, tmp_path: Path, llama: Generator
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = fit(saved, out, data=[questions], passages=2, **CPU)
    second = fit(saved, out, data=[questions], passages=3, seed=1, **CPU)
    loaded = checkpoint.load(out, llama)
    assert loaded.fingerprint == second.compressor.fingerprint != first.compressor.fingerprint
    assert json.loads((out / "figures.json").read_text())["passages"] == 2
    own = Generator(make_model("llama"), make_tokenizer())
    checkpoint.save(make_compressor(own, "learned"), tmp_path / "trained")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    for name, what in (("trained", "a trained one"), ("notes", "something else")):
        with pytest.raises(ValueError, match=f"{name} holds {what}; give another folder"):
            fit("no model either", tmp_path / name)
    with pytest.raises(ValueError, match=r"config\.json holds something else"):
        fit("no model either", out / "config.json")


def test_an_interrupted_fit_leaves_nothing(
    saved: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(saved, tmp_path / "out", data=[questions], passages=2, on_event=interrupt, **CPU)
    save = checkpoint.save

    def save_and_interrupt(*args: Any, **options: Any) -> None:
        save(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(saved, tmp_path / "out", data=[questions], passages=2, **CPU)
    assert list(tmp_path.iterdir()) == []


def test_without_questions_a_text_shows_by_its_repetition_what_is_needed(
    prose: Path,
) -> None:
    generator = Generator(uneven(make_model("llama")), make_tokenizer())
    result = fit(generator, text=[prose], passages=20)
    assert result.passages == 18
    assert result.data == (str(prose),)
    assert kept(result, "shared", 5) > kept(result, "uniform", 5)


def test_without_a_chat_template_there_is_one_prompt(questions: Path) -> None:
    generator = Generator(make_model("llama"), make_tokenizer(chat_template=None))
    result = fit(generator, data=[questions], passages=4)
    assert {figure.prompt for figure in result.figures} == {"plain"}


def test_a_template_that_refuses_system_messages_has_a_chat_prompt(questions: Path) -> None:
    tokenizer = make_tokenizer()
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + str(tokenizer.chat_template)
    result = fit(Generator(make_model("llama"), tokenizer), data=[questions], passages=1)
    assert {figure.prompt for figure in result.figures} == {"plain", "chat"}
    assert (result.passages, result.held_out) == (1, 1)


def test_mistakes_are_refused_before_the_model_is_loaded(questions: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    model = "no model either"
    for options, error, complaint in (
        ({"passages": 0}, ValueError, "passages must be an integer of at least 1, was: 0"),
        ({"ratio": 0}, ValueError, "ratio must be an integer of at least 1, was: 0"),
        ({"data": str(questions)}, TypeError, "data must be several paths, was one"),
        ({"text": empty}, TypeError, "text must be several paths, was one"),
        ({"data": [tmp_path / "no.json"]}, FileNotFoundError, "no.json"),
        ({"text": [tmp_path / "no.txt"]}, FileNotFoundError, "text must be a file that exists"),
        ({"data": [empty]}, ValueError, "empty.txt must hold question data, was: empty"),
        ({"data": [questions], "text": [empty]}, ValueError, r"not both"),
    ):
        with pytest.raises(error, match=complaint):
            fit(model, **options)  # type: ignore[arg-type]


def test_passages_of_no_fitting_length_are_refused(llama: Generator, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.\n")
    with pytest.raises(ValueError, match="no passage has 32 to 510 tokens; give other data"):
        fit(llama, text=[short])
    long = tmp_path / "long.jsonl"
    asked = {"question": "Who?", "answers": ["one"]}
    long.write_text(json.dumps({"context": " ".join(PROSE * 5), "qas": [asked]}))
    with pytest.raises(ValueError, match="no passage has at most 510 tokens"):
        fit(llama, data=[long])
    with pytest.raises(ValueError, match="device and dtype are those of the generator"):
        fit(llama, data=[long], dtype="float32")


def test_the_passages_of_the_package_can_be_read_and_name_their_licence() -> None:
    examples = list(read_questions([PASSAGES]))
    assert len(examples) == len({example.article for example in examples}) == 240
    asked = [(example, question) for example in examples for question in example.questions]
    assert len(asked) == 1121
    assert all(question.answers[0] in example.gold[0].text for example, question in asked)
    assert PASSAGES.stat().st_size < 150_000
    card = (PASSAGES.parent / "README.md").read_text()
    assert "SQuAD v1.0" in card and "CC BY-SA 4.0" in card


# --- the command line


def test_the_command_fits_and_says_how_to_use_it(
    saved: Path, questions: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--model", str(saved), "--passages", "3", "--dtype", "float32"]
    done = CliRunner().invoke(
        app,
        [*arguments, "--out", "fitted", "--data", str(questions), "--ratio", "7"],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.stderr
    assert "fitted on 2 passages" in done.stdout
    (load,) = (line for line in done.stdout.splitlines() if line.startswith("rag = "))
    names: dict[str, Any] = {}
    exec(f"from sac_rag import SacRAG\n{load}", names)
    assert names["rag"].compressor.config.ratio == 7
    done = CliRunner().invoke(
        app,
        [*arguments, "--out", str(tmp_path / "b"), "--text", str(prose), "--json"],
        catch_exceptions=False,
    )
    printed = json.loads(done.stdout)
    assert printed.pop("out") == str(tmp_path / "b")
    assert printed == json.loads((tmp_path / "b" / "figures.json").read_text())


# --- what comes with the package, and what is said where nothing does


def test_a_fitted_compressor_of_a_default_model_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Generator, questions: Path
) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    model = "smollm2-135m"
    assert checkpoint.default(model) == "full"
    with pytest.raises(ValueError, match=r"\('fitted'\) comes with sac_rag for .* only for: none"):
        checkpoint.find("fitted", model)
    fit(llama, tmp_path / "fitted" / model, data=[questions], passages=1)
    assert checkpoint.find("fitted", model) == tmp_path / "fitted" / model
    assert checkpoint.default(model) == "fitted"
    fit(llama, tmp_path / model, data=[questions], passages=1)
    assert checkpoint.find("shipped", model) == tmp_path / model
    assert checkpoint.default(model) == "shipped"
    with pytest.raises(ValueError, match=r"'fitted'\) comes .*'own', only for: smollm2-135m; give"):
        checkpoint.find("fitted", "own")


def test_where_full_is_taken_for_lack_of_a_compressor_the_log_says_so_once(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SacRAG.from_pretrained(saved, compressor="full", **CPU)
    assert caplog.text == ""
    for _ in range(2):
        SacRAG.from_pretrained(saved, **CPU)
    assert caplog.text.count("full keeps every token") == 1
    assert f"sac-rag fit --model {saved} --out FOLDER" in caplog.text
    assert default_compressor("smollm2-135m") == "shipped"


def test_it_is_a_public_name() -> None:
    assert sac_rag.fit is fit


# --- the real model


@pytest.mark.real_model
@pytest.mark.slow
def test_a_fifth_of_the_entries_serves_the_real_model_like_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit_figures, "RATIOS", (5,))
    result = fit("smollm2-135m", passages=20)

    def accuracy(ratio: int, budget: str) -> float:
        of = [f.accuracy for f in result.figures if (f.ratio, f.budget) == (ratio, budget)]
        return sum(of) / len(of)

    assert accuracy(5, "shared") > accuracy(1, "shared") - 0.05
    assert accuracy(5, "shared") > accuracy(5, "uniform")
    assert len(result.figures) == 6


def test_figures_are_of_validation_files_where_there_are_some(
    llama: Generator, questions: Path, prose: Path
) -> None:
    fitted = fit(llama, data=[questions, PASSAGES], validation=[questions], passages=6)
    # All 28 passages are measured on, and none held out.
    assert (fitted.passages, fitted.held_out) == (6, 28)


def test_a_trained_compressor_is_fitted_again_in_its_own_prompt_and_its_lora_stays(
    llama: Generator, questions: Path, tmp_path: Path
) -> None:
    trained = make_compressor(llama, "learned")
    checkpoint.save(trained, tmp_path / "trained", prompt_format=SPANS)
    out = tmp_path / "again"
    fitted = fit(
        llama,
        out,
        data=[questions],
        compressor=tmp_path / "trained",
        keep_scorer=True,
        passages=12,
        ratio=4,
    )
    assert {figure.prompt for figure in fitted.figures} == {"own"}
    config, weights = checkpoint.read(out)
    assert (config.budget, config.ratio, config.lora_rank) == ("shared", 4, 4)
    assert checkpoint.load_prompt_format(out) == SPANS
    assert weights.keys() - trained.weights.keys() == {"budget"}
    assert weights["budget"].std() > 0
    for name, weight in trained.weights.items():
        assert torch.equal(weights[name], weight.half()), name
    other = fit(llama, data=[questions], compressor=tmp_path / "trained", passages=12)
    assert not torch.equal(other.compressor.weights["scorer"], fitted.compressor.weights["scorer"])


def test_what_cannot_be_fitted_again_is_refused(
    llama: Generator, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="keep_scorer=True needs a compressor"):
        fit(llama, data=[questions], keep_scorer=True)
    with pytest.raises(ValueError, match="learned anchors to be fitted again, was: full"):
        fit(llama, data=[questions], compressor="full")
    checkpoint.save(make_compressor(llama, "sac"), tmp_path / "marked")
    with pytest.raises(ValueError, match=r"be fitted again, was: .*marked"):
        fit(llama, data=[questions], compressor=tmp_path / "marked")
