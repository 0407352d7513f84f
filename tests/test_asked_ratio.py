"""A question, or a chunk, may ask for another ratio than the compressor has."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.models import PROSE, make_compressor, make_model, make_tokenizer, passes_of

from sac_rag import SacRAG
from sac_rag.cached import CachedCompressor
from sac_rag.chunk import Chunk
from sac_rag.compressors import checkpoint
from sac_rag.compressors.base import Compressor
from sac_rag.lm.generator import Generator
from sac_rag.origin import Origin
from sac_rag.prompts.chat import Message
from sac_rag.prompts.generate import Decoding
from sac_rag.stores import DiskStore

QUESTION = "Who counted the ships?"
SHORT = Decoding(max_new_tokens=8)
PREFIX = 1  # a pipeline's first answer also reads the prefix, in a pass of its own
ON_CPU: dict[str, Any] = {"device": "cpu", "decoding": SHORT}


@pytest.fixture(autouse=True)
def _home(home: Path) -> None:
    """No record of another run is believed."""


@pytest.fixture(scope="module")
def sac(llama: Generator) -> Compressor:
    return make_compressor(llama, "sac")


@pytest.fixture(scope="module")
def full(llama: Generator) -> Compressor:
    return make_compressor(llama, "full")


@pytest.fixture(scope="module")
def nested(llama: Generator) -> Compressor:
    """Learned anchors with a budget for each head, at 2x."""
    return make_compressor(llama, "shared", ratio=2).merged()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the tiny model."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make_rag(sac: Compressor) -> Callable[..., SacRAG]:
    """Makes a pipeline with short answers over a store of its own."""

    def make(compressor: Compressor = sac, store: Any = None, **options: Any) -> SacRAG:
        cached = CachedCompressor(compressor, {} if store is None else store)
        return SacRAG(cached, **{"decoding": SHORT, **options})

    return make


@pytest.fixture
def rag(make_rag: Callable[..., SacRAG]) -> SacRAG:
    return make_rag()


def asked_every_way(rag: SacRAG, chunks: Sequence[Chunk], ratio: int | None) -> list[Any]:
    """Answers to one question at a ratio; the plain prompt's is another."""
    turns = rag.prompt_format.messages(QUESTION, chunks)
    prompt = [*chunks, " Why?"]
    streams = [
        rag.stream(QUESTION, chunks, ratio=ratio),
        rag.stream_chat(turns, ratio=ratio),
        rag.stream_complete(prompt, ratio=ratio),
    ]
    for stream in streams:
        list(stream)
    return [
        rag.answer(QUESTION, chunks, ratio=ratio),
        *rag.batch([(QUESTION, chunks)], ratio=ratio),
        *rag.chat([turns], ratio=ratio),
        *rag.complete([prompt], ratio=ratio),
        *(stream.answer for stream in streams),
    ]


def test_a_store_filled_at_2x_answers_at_any_higher_ratio_as_if_it_were_filled_at_it(
    make_rag: Callable[..., SacRAG], nested: Compressor, disk: DiskStore
) -> None:
    rag = make_rag(nested, disk)
    rag.precompress(PROSE)
    chunks = [Chunk(text) for text in PROSE]
    for ratio in (5, 15):
        expected = asked_every_way(make_rag(nested.at_ratio(ratio)), chunks, None)
        reports = make_rag(nested, disk).answer(QUESTION, chunks, ratio=ratio).chunks
        assert [c.status for c in reports] == ["hit"] * 8
        assert [c.ratio for c in reports] == pytest.approx([ratio] * 8, rel=0.1)
        kvs = nested.at_ratio(ratio).compress(PROSE)
        assert [(c.num_anchors, c.ratio, c.nbytes) for c in reports] == [
            (kv.num_anchors, kv.ratio, kv.nbytes) for kv in kvs
        ]
        with passes_of(nested.generator) as passes:
            got = asked_every_way(rag, chunks, ratio)
        assert len(passes) in (len(got) * 8, len(got) * 8 + PREFIX)  # none of the encoder's
        assert [answer.text for answer in got] == [answer.text for answer in expected]
        assert {answer.usage.kv_bytes for answer in got} == {sum(kv.nbytes for kv in kvs)}
    assert rag.answer(QUESTION, chunks).text == make_rag(nested).answer(QUESTION, chunks).text


def test_a_chunks_ratio_goes_before_the_questions_and_that_before_the_compressors(
    make_rag: Callable[..., SacRAG], nested: Compressor
) -> None:
    rag = make_rag(nested)
    chunks = [Chunk(PROSE[0], ratio=1), Chunk(PROSE[1]), Chunk(PROSE[0], ratio=15)]
    for status in ("absent", "hit"):
        reports = rag.answer(QUESTION, chunks, ratio=5).chunks
        assert [c.status for c in reports] == [status] * 3
        assert [c.ratio for c in reports] == pytest.approx([1, 5, 15], rel=0.1)
    reports = rag.answer(QUESTION, chunks).chunks
    assert [c.ratio for c in reports] == pytest.approx([1, 2, 15], rel=0.1)


def test_a_lower_ratio_than_is_stored_is_a_miss_once(
    make_rag: Callable[..., SacRAG], nested: Compressor, disk: DiskStore
) -> None:
    rag = make_rag(nested, disk)
    rag.precompress(PROSE[:2])
    first = rag.answer(QUESTION, PROSE[:2], ratio=1)
    assert [c.status for c in first.chunks] == ["ratio: stored at 2x, asked for 1x"] * 2
    again = rag.answer(QUESTION, PROSE[:2], ratio=1)
    assert [c.status for c in again.chunks] == ["hit"] * 2
    assert again.text == first.text == make_rag(nested.at_ratio(1)).answer(QUESTION, PROSE[:2]).text
    assert rag.metrics().misses == {"ratio": 2}


def test_a_compressor_with_one_ratio_is_asked_for_no_other(
    rag: SacRAG, make_rag: Callable[..., SacRAG], full: Compressor
) -> None:
    chunk = Chunk(PROSE[0])
    with passes_of(rag.generator) as passes:
        for ask in (
            lambda: rag.answer(QUESTION, [], ratio=7),
            lambda: rag.stream(QUESTION, [chunk], ratio=7),
            lambda: rag.batch([(QUESTION, [Chunk(PROSE[0], ratio=7)])]),
            lambda: rag.chat([[Message("user", (chunk,))]], ratio=7),
            lambda: rag.stream_chat([Message("user", (chunk,))], ratio=7),
            lambda: rag.complete([[chunk, "?"]], ratio=7),
            lambda: rag.stream_complete([chunk, "?"], ratio=7),
        ):
            with pytest.raises(ValueError, match=r"ratio must be 3, .* was: 7; .*at_ratio\(7\)"):
                ask()
        with pytest.raises(ValueError, match="'full' keeps every token: ratio must be 1, was: 2"):
            make_rag(full).answer(QUESTION, [chunk], ratio=2)
    assert passes == []
    assert rag.answer(QUESTION, [chunk], ratio=3).text == rag.answer(QUESTION, [chunk]).text


@pytest.mark.parametrize("ratio", [0, -2, True, "5", 2.5])
def test_what_is_no_ratio_is_refused(
    make_rag: Callable[..., SacRAG], nested: Compressor, ratio: Any
) -> None:
    with pytest.raises(ValueError, match="ratio must be an integer of at least 1, was: "):
        make_rag(nested).answer(QUESTION, PROSE, ratio=ratio)


@pytest.mark.parametrize("stored_dtype", ["float32", "int8"])
def test_an_archive_filled_at_2x_answers_at_15x(
    make_rag: Callable[..., SacRAG],
    nested: Compressor,
    disk: DiskStore,
    saved: Path,
    tmp_path: Path,
    stored_dtype: Any,
) -> None:
    compressor = nested.storing(stored_dtype)
    rag, path = make_rag(compressor, disk), tmp_path / "corpus"
    rag.precompress(PROSE)
    rag.export(path)
    expected = rag.answer(QUESTION, PROSE, ratio=15)
    served = SacRAG.from_archive(path, saved, **ON_CPU)
    at_15 = SacRAG.from_archive(path, saved, ratio=15, on_miss="raise", **ON_CPU)
    for got in (served.answer(QUESTION, PROSE, ratio=15), at_15.answer(QUESTION, PROSE)):
        assert got.text == expected.text
        assert [c.status for c in got.chunks] == ["hit"] * 8
        assert got.usage == expected.usage
    assert served.answer(QUESTION, PROSE).text == rag.answer(QUESTION, PROSE).text
    assert served.answer(QUESTION, PROSE[:1], ratio=1).chunks[0].read_as == "text"


def test_an_origin_has_the_ratio_of_the_compressors_folder(
    nested: Compressor, sac: Compressor, tmp_path: Path
) -> None:
    for compressor, asked, ratio in ((nested, 15, 15), (sac, 3, 3)):
        checkpoint.save(compressor.at_ratio(asked), tmp_path)
        origin = Origin.from_folder(compressor.fingerprint_fields(), tmp_path)
        assert origin.config.ratio == ratio
        assert origin.fingerprint == compressor.fingerprint
        again = Origin.from_dict(json.loads(json.dumps(origin.to_dict())), origin.cue)
        assert again.config == origin.config
