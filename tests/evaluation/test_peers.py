"""Peers answer the same questions within the same budget, and are scored as SAC is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.models import PROSE, make_compressor, make_model, make_tokenizer

from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors.pretrained import METHODS
from sac_rag.evaluation.peers import registry, text_peers
from sac_rag.evaluation.peers.base import Blocked, Peer, TextPeer
from sac_rag.evaluation.peers.kvpress_peers import PressPeer
from sac_rag.evaluation.peers.llmlingua_peers import LLMLingua
from sac_rag.evaluation.peers.neighbours import NeighbourPeer, RefitSAC
from sac_rag.evaluation.peers.registry import PEERS, list_peers, measure_peers, select
from sac_rag.evaluation.quality import answered_by, evaluate, evaluate_answering, text_reader
from sac_rag.evaluation.questions import QAExample, Question
from sac_rag.evaluation.report import read_measured
from sac_rag.evaluation.sample import Sample, Trial, draw
from sac_rag.evaluation.scores import exact_match, f1
from sac_rag.lm.generator import Generator
from sac_rag.pipeline import SacRAG
from sac_rag.prompts.format import SPANS
from sac_rag.prompts.generate import Decoding
from sac_rag.reports import Answer
from sac_rag.retrieval.embedder import Embedder

# The packages' own.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

EXAMPLES = [
    QAExample(
        gold=(Chunk(" ".join(PROSE[number : number + 3])),),
        questions=(Question(str(number), f"What about {PROSE[number].split()[2]}?", ("ships",)),),
        article="one",
    )
    for number in range(len(PROSE) - 2)
]
SHORT = Decoding(max_new_tokens=6, stop=())

TEXT = [name for name, peer in PEERS.items() if issubclass(peer, TextPeer)]
PRESSES = [name for name, peer in PEERS.items() if issubclass(peer, PressPeer)]
NEIGHBOURS = [name for name, peer in PEERS.items() if issubclass(peer, NeighbourPeer)]


class Letters(Embedder):
    """An embedder without a model: how often each letter is in a text."""

    def __init__(self) -> None:
        pass

    def embed(self, texts: Sequence[str], **_: Any) -> NDArray[np.float32]:
        counts = np.array([[text.lower().count(chr(97 + n)) for n in range(26)] for text in texts])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: Any) -> Generator:
    """A tiny Llama that was loaded from a folder: kvpress loads its tokenizer from there again."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Generator.from_pretrained(folder, dtype="float32")


@pytest.fixture
def rag(generator: Generator, home: Path) -> SacRAG:
    compressor = make_compressor(generator, "shared", segment_tokens=40)
    return SacRAG(CachedCompressor(compressor, {}), prompt_format=SPANS)


def sample(k: int = 1, limit: int = 4) -> Sample:
    return draw(EXAMPLES, k=k, limit=limit, seed=0)


def make(name: str, rag: SacRAG, ratio: int) -> Peer:
    """A peer, or a skipped test with the reason why it cannot run."""
    kind = PEERS[name]
    if reason := kind.reason():
        pytest.skip(f"{name}: {reason}")
    if issubclass(kind, text_peers.EmbeddedSentences):
        return kind(rag, ratio, Letters())
    return kind(rag, ratio)


def texts(answers: Sequence[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def budget(rag: SacRAG, trial: Trial, ratio: int) -> int:
    """KV entries per head of a trial's chunks, by compressing them to as many for every head."""
    compressor = make_compressor(rag.generator, "sac", ratio=ratio, segment_tokens=40)
    return sum(kv.num_anchors for kv in compressor.compress([c.text for c in trial.chunks]))


# --- within the budget


@pytest.mark.parametrize("ratio", [2, 5, 15, 200])
@pytest.mark.parametrize("name", TEXT)
def test_a_text_peer_reads_no_more_tokens_than_there_would_be_anchors(
    rag: SacRAG, name: str, ratio: int
) -> None:
    peer = make(name, rag, ratio)
    assert isinstance(peer, TextPeer)
    for trial in sample(k=2).trials:
        shorter = peer.shortened(trial)
        read = sum(len(rag.generator.tokenize(chunk.text)) for chunk in shorter.chunks)
        assert read <= budget(rag, trial, ratio)
        assert read > 0 or ratio == 200
        assert (shorter.number, shorter.question) == (trial.number, trial.question)


@pytest.mark.parametrize("ratio", [2, 5, 15])
@pytest.mark.parametrize("name", PRESSES)
def test_a_press_keeps_as_many_entries_as_there_would_be_anchors(
    rag: SacRAG, name: str, ratio: int
) -> None:
    peer = make(name, rag, ratio)
    assert isinstance(peer, PressPeer)
    layers, kv_heads, _ = rag.generator.kv_shape
    for trial in sample(limit=3).trials:
        kv = peer.compress(peer.passages(trial))
        assert kv.num_entries == layers * kv_heads * budget(rag, trial, ratio)
        assert kv.num_tokens == len(rag.generator.tokenize(trial.chunks[0].text))


@pytest.mark.parametrize("ratio", [2, 5, 15])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour_keeps_as_many_entries_as_there_would_be_anchors(
    rag: SacRAG, name: str, ratio: int
) -> None:
    peer = make(name, rag, ratio)
    assert isinstance(peer, NeighbourPeer)
    layers, kv_heads, _ = rag.generator.kv_shape
    for trial in sample(limit=3).trials:
        (kv,) = peer.compressor.compress([trial.chunks[0].text])
        assert kv.num_entries == layers * kv_heads * budget(rag, trial, ratio)


@pytest.mark.parametrize("name", [*TEXT, *PRESSES, *NEIGHBOURS])
def test_answers_attend_to_the_prompt_and_the_budget(rag: SacRAG, name: str) -> None:
    peer, trials = make(name, rag, 5), sample(k=2, limit=3).trials
    for trial, answer in zip(trials, peer.answer(trials, SHORT), strict=True):
        # The text around the chunks, and one entry more for rounding a mean.
        around = len(rag.prompt_ids(trial.question.text, [Chunk("a")] * 2))
        assert answer.usage.positions_attended <= around + budget(rag, trial, 5) + 1


# --- nothing lost at ratio 1


@pytest.mark.parametrize("name", [*TEXT, *PRESSES])
@pytest.mark.parametrize("k", [1, 2])
def test_at_ratio_1_answers_are_those_of_the_full_text(rag: SacRAG, name: str, k: int) -> None:
    peer, trials = make(name, rag, 1), sample(k=k).trials
    plain = texts(answered_by(text_reader(rag))(trials, SHORT))
    assert texts(peer.answer(trials, SHORT)) == plain
    assert len(set(plain)) > 1


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_at_ratio_1_a_neighbour_keeps_all_entries_as_they_are(rag: SacRAG, name: str) -> None:
    peer = make(name, rag, 1)
    assert isinstance(peer, NeighbourPeer)
    whole = make_compressor(
        rag.generator, "full", segment_tokens=40, sink=rag.compressor.config.sink
    )
    text = EXAMPLES[0].gold[0].text
    (kv,), (expected,) = peer.compressor.compress([text]), whole.compress([text])
    for got, want in zip(kv.by_head(), expected.by_head(), strict=True):
        torch.testing.assert_close(got.float(), want.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*TEXT[-1:], *PRESSES, *NEIGHBOURS])
def test_a_prompt_without_passages_is_answered_from_the_question(rag: SacRAG, name: str) -> None:
    trials = [Trial(0, Question("q", "What about ships?", ("seven",)), ())]
    plain = texts(answered_by(text_reader(rag))(trials, SHORT))
    assert texts(make(name, rag, 5).answer(trials, SHORT)) == plain


# --- what is left


def test_bm25_keeps_the_sentences_with_the_questions_words(rag: SacRAG) -> None:
    peer = make("bm25-sentences", rag, 2)
    assert isinstance(peer, TextPeer)
    question = Question("q", "Who hears a mouse under the snow?", ("owls",))
    trial = Trial(0, question, (Chunk(" ".join(PROSE[:4])), Chunk(" ".join(PROSE[4:]), title="T")))
    left = peer.shortened(trial).chunks
    assert any(PROSE[6] in chunk.text and chunk.title == "T" for chunk in left)
    scarce = make("bm25-sentences", rag, 40)
    assert isinstance(scarce, TextPeer)
    (cut,) = scarce.shortened(trial).chunks
    assert PROSE[6].startswith(cut.text), "the beginning of the best one, where none fits"


def test_refitted_values_have_an_output_closer_to_that_of_all(rag: SacRAG) -> None:
    refit, plain = make("refit", rag, 5), make("read-again", rag, 5)
    assert isinstance(refit, NeighbourPeer)
    assert isinstance(plain, NeighbourPeer)
    assert isinstance(refit.compressor, RefitSAC)
    ids = rag.generator.tokenize(PROSE[0])
    (refitted,), (kept,) = (p.compressor.compress_tokens([ids]) for p in (refit, plain))
    assert torch.equal(refitted.positions, kept.positions)
    assert torch.equal(refitted.keys, kept.keys)
    assert not torch.equal(refitted.values, kept.values)
    layout = refit.compressor.layout(torch.tensor(ids))
    text = slice(layout.sink, layout.sink + len(ids))  # type: ignore[attr-defined]
    errors = {}
    for name, kv in (("refitted", refitted), ("kept", kept)):
        _, values, positions = kv.by_head()
        error = 0.0
        for layer, attention in enumerate(layout.attentions):  # type: ignore[attr-defined]
            whole = layout.values[layer]  # type: ignore[attr-defined]
            weights = attention[0].unflatten(0, (len(whole), -1)).flatten(1, 2)
            inside = weights[..., text].gather(
                2, positions[layer].long()[:, None].expand(-1, weights.shape[1], -1)
            )
            outside = weights.clone()
            outside[..., text] = 0
            share = outside.sum(-1, keepdim=True) + inside.sum(-1, keepdim=True)
            output = (outside @ whole + inside @ values[layer]) / share
            error += float((output - weights @ whole).square().sum())
        errors[name] = error
    assert errors["refitted"] < 0.9 * errors["kept"]


def test_merged_entries_are_means_of_what_they_stand_for(rag: SacRAG) -> None:
    merged, plain = make("merged", rag, 3), make("read-again", rag, 3)
    assert isinstance(merged, NeighbourPeer)
    assert isinstance(plain, NeighbourPeer)
    text = PROSE[1]
    (kv,), (kept,) = merged.compressor.compress([text]), plain.compressor.compress([text])
    assert torch.equal(kv.positions, kept.positions)
    assert not torch.equal(kv.values, kept.values)
    assert (
        kv.values.abs().max()
        <= 1.01
        * make_compressor(rag.generator, "full", sink=rag.compressor.config.sink)
        .compress([text])[0]
        .values.abs()
        .max()
    )


# --- measured as SAC is


def test_answers_of_a_peer_are_scored_as_those_of_sac(rag: SacRAG, tmp_path: Path) -> None:
    """The systems of `evaluate` as peers of themselves: files equal except for the system."""
    asked = sample()
    evaluate(rag, asked, system="full-text", max_new_tokens=5, out=tmp_path / "a.jsonl")
    peer = make("bm25-sentences", rag, 1)
    result = evaluate_answering(
        peer.answering(), rag, asked, max_new_tokens=5, out=tmp_path / "b.jsonl"
    )
    (settings, *rows), (of_peer, *rows_of_peer) = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("a.jsonl", "b.jsonl")
    )
    times = {"seconds": None, "first_token_s": None}
    assert [{**row, **times} for row in rows_of_peer] == [{**row, **times} for row in rows]
    assert settings.keys() == of_peer.keys()
    different = {name for name in settings if settings[name] != of_peer[name]}
    assert different == {"system", "fingerprint"}
    assert result.f1 == np.mean([f1(row["prediction"], row["golds"]) for row in rows])
    assert result.em == np.mean([exact_match(row["prediction"], row["golds"]) for row in rows])


def test_a_measurement_is_resumed_and_reported_beside_sac(rag: SacRAG, tmp_path: Path) -> None:
    asked, kinds = [sample(), sample(k=2)], [PEERS["bm25-sentences"], PEERS["random-anchors"]]
    evaluate(rag, asked[0], max_new_tokens=3, out=tmp_path / "compressed-3x-k1.jsonl")
    answered: list[int] = []

    def measure() -> list[Any]:
        return list(
            measure_peers(
                rag, asked, kinds, [15, 5], tmp_path, max_new_tokens=3, on_progress=answered.append
            )
        )

    first = measure()
    path = tmp_path / "random-anchors-5x-k1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:9])  # interrupted while it wrote the second
    again = measure()
    scores = [(r.system, r.ratio, r.k, r.n, r.f1, r.em, r.fingerprint) for r in first]
    assert [(r.system, r.ratio, r.k, r.n, r.f1, r.em, r.fingerprint) for r in again] == scores
    assert {json.loads(line)["number"] for line in path.read_text().splitlines()[1:]} == {
        trial.number for trial in asked[0].trials
    }
    names = [one.name for one in read_measured(tmp_path) if one.settings["k"] == 1]
    assert names == [
        "anchors, 3x",
        "BM25 sentences, 5x",
        "BM25 sentences, 15x",
        "random anchors, untrained, 5x",
        "random anchors, untrained, 15x",
    ]


def test_another_version_of_a_package_is_another_measurement(
    rag: SacRAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [PEERS["bm25-sentences"]]
    list(measure_peers(rag, [sample()], kinds, [5], tmp_path, max_new_tokens=2))
    monkeypatch.setattr(PEERS["bm25-sentences"], "version", classmethod(lambda cls: "99"))
    with pytest.raises(ValueError, match=r"other settings.*fingerprint"):
        list(measure_peers(rag, [sample()], kinds, [5], tmp_path, max_new_tokens=2))


# --- the list


def test_the_list_has_every_peer_with_its_package_or_the_reason() -> None:
    rows = {row.name: row for row in list_peers()}
    assert list(rows) == list(PEERS)
    assert all(row.does for row in rows.values())
    for name, row in rows.items():
        assert bool(row.reason) == (not PEERS[name].version()) or not row.package or row.reason
        if issubclass(PEERS[name], Blocked):
            assert "needs" in row.reason
    assert rows["bm25-sentences"].version and not rows["bm25-sentences"].reason
    assert not rows["random-anchors"].package


def test_what_is_not_installed_is_named_with_the_remedy(
    rag: SacRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(LLMLingua):
        """A peer of a package that nobody has."""

        modules = {"no_such_package.inside": "no-such-package"}  # noqa: RUF012

    assert Elsewhere.reason() == "no-such-package not installed; run: make peers"
    with pytest.raises(ImportError, match="no-such-package"):
        Elsewhere(rag, 5)
    monkeypatch.setattr(registry, "PEERS", {"llmlingua": Elsewhere})
    runnable, blocked = select()
    assert runnable == []
    assert [row.name for row in blocked] == ["llmlingua"]
    with pytest.raises(ValueError, match="unknown: \\['nobody'\\]"):
        select(["nobody"])


def test_a_blocked_peer_cannot_be_made(rag: SacRAG) -> None:
    with pytest.raises(ImportError, match="CUDA"):
        PEERS["lmcache"](rag, 5)


def test_a_ratio_below_1_is_refused(rag: SacRAG) -> None:
    with pytest.raises(ValueError, match="at least 1, was: 0"):
        PEERS["bm25-sentences"](rag, 0)


def test_neighbours_are_no_methods_of_the_package() -> None:
    assert set(METHODS) == {"sac", "full", "icae", "x500"}
