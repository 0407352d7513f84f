"""A public name refuses an unknown keyword, and one text in place of several."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models import PROSE, make_compressor, make_model, make_tokenizer

import sac_rag
from sac_rag import (
    CachedCompressor,
    Chunk,
    ChunkIndex,
    Compressor,
    CompressorConfig,
    DiskStore,
    Full,
    Generator,
    MemoryStore,
    ObjectStore,
    PrecompressJob,
    PromptFormat,
    SacRAG,
    TieredStore,
)

# Types whose items may be texts, so that one text would be taken for its letters.
_SEVERAL_TEXTS = re.compile(
    r"(Sequence|Iterable|Collection)\[(str|ChunkLike|tuple\[str|Chunk\]|Sequence\[(str|Message))"
)


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every function, constructor and method that `sac_rag.__all__` gives, by name."""
    for name in sac_rag.__all__:
        found = getattr(sac_rag, name)
        if not inspect.isclass(found):
            if callable(found):
                yield name, found
            continue
        if not issubclass(found, Exception):
            yield name, found
        for method, value in vars(found).items():
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", function


FUNCTIONS = dict(public_functions())


@pytest.fixture(scope="module")
def full(llama: Generator) -> Compressor:
    return make_compressor(llama, "full")


@pytest.fixture
def rag(full: Compressor, home: Path) -> SacRAG:
    return SacRAG(CachedCompressor(full, {}))


# --- keywords

# What takes any keyword hands it on, and what gets it refuses it.
HANDED_ON = {
    "Full.default_config": lambda model, archive: Full.default_config(no_such=1),
    "Generator.from_pretrained": lambda model, archive: Generator.from_pretrained(model, no_such=1),
    "SacRAG.from_pretrained": lambda model, archive: SacRAG.from_pretrained(
        model, compressor="full", no_such=1
    ),
    "SacRAG.from_archive": lambda model, archive: SacRAG.from_archive(archive, model, no_such=1),
}


def test_no_other_public_name_takes_any_keyword() -> None:
    takes_any = {
        name
        for name, function in FUNCTIONS.items()
        if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    }
    assert takes_any == set(HANDED_ON)


@pytest.mark.parametrize("name", HANDED_ON)
def test_a_keyword_that_is_handed_on_is_refused_by_name(
    name: str, tmp_path: Path, home: Path
) -> None:
    model = tmp_path / "model"
    make_model("llama").save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    archive = tmp_path / "corpus.sacrag"
    if name == "SacRAG.from_archive":
        with DiskStore(tmp_path / "store") as store:
            filled = SacRAG.from_pretrained(model, compressor="full", store=store)
            filled.precompress(PROSE[:1])
            filled.export(archive)
    with pytest.raises(TypeError, match="no_such"):
        HANDED_ON[name](model, archive)


# --- one text in place of several


class _Embedder:
    identity, dimension = "none", 4


def _tiers() -> TieredStore:
    return TieredStore([MemoryStore(), MemoryStore()])


TEXT = "The red lighthouse"
ONE_TEXT: dict[str, Callable[[SacRAG, Path], Any]] = {
    "CachedCompressor.compress": lambda rag, _: rag.compressor.compress(TEXT),
    "CachedCompressor.fetch": lambda rag, _: rag.compressor.fetch(TEXT),
    "CachedCompressor.keep": lambda rag, _: rag.compressor.keep(
        TEXT, rag.compressor.inner.compress([TEXT])[0], TEXT
    ),
    "ChunkIndex.add": lambda rag, _: ChunkIndex(_Embedder()).add(TEXT),  # type: ignore[arg-type]
    "ChunkIndex.build": lambda rag, _: ChunkIndex.build(TEXT, _Embedder()),  # type: ignore[arg-type]
    "Compressor.compress": lambda rag, _: rag.compressor.inner.compress(TEXT),
    "CompressorConfig": lambda rag, _: CompressorConfig(lora_targets=TEXT),  # type: ignore[arg-type]
    "DiskStore.gc": lambda rag, place: DiskStore(place / "store").gc(keep_fingerprints=TEXT),
    "DiskStore.offer": lambda rag, place: DiskStore(place / "store").offer(
        "ab" * 32, _kv(rag), TEXT
    ),
    "DiskStore.pin": lambda rag, place: DiskStore(place / "store").pin("ab" * 32),
    "DiskStore.prefetch": lambda rag, place: DiskStore(place / "store").prefetch("ab" * 32),
    "DiskStore.put": lambda rag, place: DiskStore(place / "store").put("ab" * 32, _kv(rag), TEXT),
    "DiskStore.replace_document": lambda rag, place: DiskStore(place / "store").replace_document(
        "a", TEXT
    ),
    "DiskStore.replace_documents": lambda rag, place: DiskStore(place / "store").replace_documents(
        {"a": TEXT}  # type: ignore[dict-item]
    ),
    "DiskStore.unpin": lambda rag, place: DiskStore(place / "store").unpin("ab" * 32),
    "ObjectStore.put": lambda rag, place: ObjectStore(str(place / "shards")).put(
        "ab" * 32, _kv(rag), TEXT
    ),
    "ObjectStore.replace_documents": lambda rag, place: ObjectStore(
        str(place / "shards")
    ).replace_documents({"a": TEXT}),  # type: ignore[dict-item]
    "TieredStore.offer": lambda rag, _: _tiers().offer("ab" * 32, _kv(rag), TEXT),
    "TieredStore.prefetch": lambda rag, _: _tiers().prefetch("ab" * 32),
    "TieredStore.put": lambda rag, _: _tiers().put("ab" * 32, _kv(rag), TEXT),
    "TieredStore.replace_documents": lambda rag, _: _tiers().replace_documents(
        {"a": TEXT}  # type: ignore[dict-item]
    ),
    "Embedder.embed": lambda rag, _: sac_rag.Embedder(rag.generator.model, None).embed(TEXT),
    "PrecompressJob": lambda rag, _: PrecompressJob(rag.compressor, TEXT),
    "PromptFormat.messages": lambda rag, _: PromptFormat().messages("Who?", TEXT),  # type: ignore[arg-type]
    "PromptFormat.passages": lambda rag, _: PromptFormat().passages(TEXT),  # type: ignore[arg-type]
    "PromptFormat.pieces": lambda rag, _: PromptFormat().pieces(
        rag.generator.tokenizer,
        "Who?",
        TEXT,  # type: ignore[arg-type]
    ),
    "SacRAG.answer": lambda rag, _: rag.answer("Who?", TEXT),
    "SacRAG.batch": lambda rag, _: rag.batch([("Who?", TEXT)]),
    "SacRAG.complete": lambda rag, _: rag.complete([TEXT]),
    "SacRAG.precompress": lambda rag, _: rag.precompress(TEXT),
    "SacRAG.prefetch": lambda rag, _: rag.prefetch(TEXT),
    "SacRAG.prompt_ids": lambda rag, _: rag.prompt_ids("Who?", TEXT),
    "SacRAG.stream": lambda rag, _: rag.stream("Who?", TEXT),
    "SacRAG.stream_complete": lambda rag, _: rag.stream_complete(TEXT),
    "SacRAG.submit": lambda rag, _: rag.submit("Who?", TEXT).result(60),
    "SacRAG.submit_complete": lambda rag, _: rag.submit_complete(TEXT).result(60),
    "by_rank": lambda rag, _: sac_rag.by_rank(TEXT, rag.compressor),
    "fit": lambda rag, place: sac_rag.fit("smollm2-135m", place / "fitted", data="a.json"),
    "read_documents": lambda rag, _: sac_rag.read_documents(TEXT),
    "read_questions": lambda rag, _: list(sac_rag.read_questions(TEXT)),
    "wikipedia_leads": lambda rag, _: sac_rag.wikipedia_leads("History"),
}


CONVERSATIONS = ("chat", "stream_chat", "submit_chat")


def _kv(rag: SacRAG) -> Any:
    return rag.compressor.inner.compress([TEXT])[0]


def test_every_public_name_that_takes_several_texts_is_tried() -> None:
    takes_several = {
        name
        for name, function in FUNCTIONS.items()
        for parameter in inspect.signature(function).parameters.values()
        if _SEVERAL_TEXTS.search(str(parameter.annotation))
        and not str(parameter.annotation).startswith(("Callable", "Reader | None"))
    }
    # A text is matched as its letters are; a conversation has no texts among its items.
    others = {"PromptFormat.matches", *(f"SacRAG.{name}" for name in CONVERSATIONS)}
    # It needs a server, and has the checks of ObjectStore.
    others |= {"RedisStore.put", "RedisStore.replace_documents"}
    assert takes_several - set(ONE_TEXT) - others == set()
    assert set(ONE_TEXT) - set(FUNCTIONS) == set()


@pytest.mark.parametrize("name", ONE_TEXT)
def test_one_text_in_place_of_several_is_refused(name: str, rag: SacRAG, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=r"several|one str|was one|in a list"):
        ONE_TEXT[name](rag, tmp_path)
    assert len(rag.compressor.store) == 0


def test_one_document_in_place_of_several_is_refused(rag: SacRAG) -> None:
    with pytest.raises(TypeError):
        rag.precompress(Chunk(TEXT))  # type: ignore[arg-type]
