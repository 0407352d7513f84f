"""Parquet and what frameworks export are read as data: by their fields, nothing of it executed.

The exports were written by langchain-core 1.8.3 and llama-index-core 0.14.25, shortened here to the
fields that come first.
"""

from __future__ import annotations

import datetime
import decimal
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sac_rag.chunk import Chunk
from sac_rag.retrieval.readers import read_documents

Bad = list[tuple[str, str]]


def read(path: Path) -> tuple[list[Chunk], Bad]:
    bad: Bad = []
    return list(read_documents([path], on_bad=lambda *what: bad.append(what))), bad


def saved(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


# --- LangChain


def serialised(text: str, **fields: Any) -> dict[str, Any]:
    """What `dumpd` makes of a Document."""
    return {
        "lc": 1,
        "type": "constructor",
        "id": ["langchain", "schema", "document", "Document"],
        "kwargs": {"page_content": text, "type": "Document", **fields},
    }


# Metadata that looks like a serialised object is wrapped by LangChain itself.
OWL_METADATA = {"source": "owls.md", "page": 3, "lc": 1}
COPPER_METADATA = {"title": "Metals", "nested": {"lc": 1, "type": "secret", "id": ["X"]}}
SERIALISED = [
    serialised("Owls hear.", id="owl-1", metadata={"__lc_escaped__": OWL_METADATA}),
    serialised(
        "Copper conducts.",
        metadata={"title": "Metals", "nested": {"__lc_escaped__": COPPER_METADATA["nested"]}},
    ),
]
FIELDS = [
    {"id": "owl-1", "metadata": OWL_METADATA, "page_content": "Owls hear.", "type": "Document"},
    {"id": None, "metadata": COPPER_METADATA, "page_content": "Copper conducts."},
]


@pytest.mark.parametrize("records", [SERIALISED, FIELDS], ids=["dumpd", "fields"])
@pytest.mark.parametrize("name", ["docs.json", "docs.jsonl"])
def test_langchain_documents_are_named_by_their_source(
    tmp_path: Path, records: list[Any], name: str
) -> None:
    path = tmp_path / name
    lines = name.endswith("jsonl")
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    documents, bad = read(path)
    assert bad == []
    assert documents == [
        Chunk("Owls hear.", id="owls.md", metadata={**OWL_METADATA, "id": "owl-1"}),
        Chunk("Copper conducts.", id=f"{path}:2", title="Metals", metadata=COPPER_METADATA),
    ]


def test_a_vector_store_that_langchain_dumped_is_read_without_its_vectors(tmp_path: Path) -> None:
    dumped = {
        "u1": {
            "id": "u1",
            "vector": [0.8, -0.2],
            "text": "Owls hear.",
            "metadata": {"__lc_escaped__": OWL_METADATA},
        },
        "u2": {"id": "u2", "vector": [0.1, 0.9], "text": "Copper conducts.", "metadata": {}},
    }
    documents, bad = read(saved(tmp_path / "vectors.json", dumped))
    assert bad == []
    assert documents == [
        Chunk("Owls hear.", id="owls.md", metadata={**OWL_METADATA, "id": "u1"}),
        Chunk("Copper conducts.", id="u2"),
    ]


def test_what_a_document_itself_has_as_its_id_is_kept(tmp_path: Path) -> None:
    metadata = {"source": "owls.md", "id": "own", "node_id": "n", "part": 3}
    record = {"page_content": "Owls hear.", "id": "owl-1", "metadata": metadata}
    assert read(saved(tmp_path / "docs.json", [record]))[0][0].metadata == metadata


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({**SERIALISED[0], "id": ["langchain", "schema", "HumanMessage"]}, '"Document"'),
        ({**SERIALISED[0], "type": "secret", "id": ["OPENAI_API_KEY"]}, "'secret'"),
        ({"lc": 1, "type": "not_implemented", "id": ["os", "system"], "repr": "x"}, "os"),
        ({**SERIALISED[0], "kwargs": None}, "kwargs"),
        (serialised(None), '"text"'),  # type: ignore[arg-type]
        (serialised("a", metadata=[1]), '"metadata"'),
        (serialised("a", id=[1]), '"id"'),
        ({"page_content": 5}, '"text"'),
    ],
)
def test_other_things_that_langchain_serialises_are_reported_and_not_made(
    tmp_path: Path, record: Any, problem: str
) -> None:
    path = saved(tmp_path / "docs.json", [record, FIELDS[0]])
    documents, ((place, why),) = read(path)
    assert [document.text for document in documents] == ["Owls hear."]
    assert place == f"{path}:1"
    assert problem in why


# --- LlamaIndex


def node(name: str, text: str | None, source: str | None = None, **fields: Any) -> dict[str, Any]:
    """What SimpleDocumentStore persists of a TextNode."""
    related = {"1": {"node_id": source, "node_type": "4", "metadata": {}}} if source else {}
    data = {"id_": name, "embedding": None, "metadata": {}, "relationships": related, "text": text}
    return {"__data__": {**data, "class_name": "TextNode", **fields}, "__type__": "1"}


def document(name: str, text: str, **metadata: Any) -> dict[str, Any]:
    """What it persists of a Document."""
    made = node(name, text, metadata=metadata, text_resource={"text": text, "path": None})
    return {**made, "__type__": "4"}


DOCSTORE = {
    "docstore/ref_doc_info": {"owls.md": {"node_ids": ["n1", "n2"], "metadata": {}}},
    "docstore/data": {
        "n1": node("n1", "Owls hear.", "owls.md", metadata={"page": 1}),
        "lone.md": document("lone.md", "A lone document.", title="Lone"),
        "owls.md": document("owls.md", "Owls hear. They never miss."),
        "n2": node("n2", "They never miss.", "owls.md"),
        "x": {
            "__data__": {"id_": "x", "metadata": {}, "text_resource": {"text": "Of a newer kind."}},
            "__type__": "5",
        },
    },
}


@pytest.mark.parametrize("named", [True, False])
def test_a_docstore_gives_nodes_by_document_and_documents_that_have_none(
    tmp_path: Path, named: bool
) -> None:
    path = saved(tmp_path / "storage" / "docstore.json", DOCSTORE)
    # What else is persisted beside it is not documents.
    for other in ("index_store.json", "graph_store.json", "default__vector_store.json"):
        saved(path.with_name(other), {"graph_dict": {}})
    documents, bad = read(path if named else path.parent)
    assert bad == []
    assert documents == [
        Chunk("Owls hear.", id="owls.md", metadata={"page": 1, "node_id": "n1"}),
        Chunk("They never miss.", id="owls.md", metadata={"node_id": "n2"}),
        Chunk("A lone document.", id="lone.md", title="Lone", metadata={"title": "Lone"}),
        Chunk("Of a newer kind.", id="x"),
    ]


def test_a_docstore_of_another_namespace_is_read(tmp_path: Path) -> None:
    data = {"n1": node("n1", "Owls hear.", "owls.md")}
    info = {"owls.md": {"node_ids": ["n1"], "metadata": {}}}
    store = {"mine/data": data, "mine/metadata": {"n1": {}}, "mine/ref_doc_info": info}
    documents, bad = read(saved(tmp_path / "docstore.json", store))
    assert [(d.text, d.id) for d in documents] == [("Owls hear.", "owls.md")]
    assert bad == []


@pytest.mark.parametrize("store", [{}, {"docstore/data": {}}, {"docstore/metadata": {"a": {}}}])
def test_a_docstore_whose_nodes_are_in_a_vector_store_says_so(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    path = saved(tmp_path / "docstore.json", store)
    documents, ((place, problem),) = read(path)
    assert (documents, place) == ([], str(path))
    assert "a vector store that keeps the text itself" in problem
    assert "store_nodes_override=True" in problem


def test_a_sentence_with_a_window_is_the_window(tmp_path: Path) -> None:
    window = {"window": "It rained. Owls hear. Fog fell.", "original_text": "Owls hear."}
    data = {
        "n1": node("n1", "Owls hear.", "owls.md", metadata=window),
        "n2": node("n2", "A view.", "owls.md", metadata={"window": "to the south"}),
    }
    documents, bad = read(saved(tmp_path / "docstore.json", {"docstore/data": data}))
    assert [document.text for document in documents] == [window["window"], "A view."]
    assert bad == []


def test_parents_of_nodes_are_read_with_them(tmp_path: Path) -> None:
    data = {
        "p": node("p", "Owls hear. They never miss.", "owls.md"),
        "n1": node("n1", "Owls hear.", "owls.md"),
        "n2": node("n2", "They never miss.", "owls.md"),
    }
    documents, _ = read(saved(tmp_path / "docstore.json", {"docstore/data": data}))
    assert {document.id for document in documents} == {"owls.md"}
    assert len(documents) == 3


def test_a_bad_node_is_reported_by_its_name(tmp_path: Path) -> None:
    data = {
        "a": node("a", None),
        "b": {"__data__": "{}", "__type__": "1"},
        "c": 5,
        "d": node("d", "good", metadata=[]),
        "e": node("e", "good"),
    }
    path = saved(tmp_path / "docstore.json", {"docstore/data": data})
    documents, bad = read(path)
    assert [document.text for document in documents] == ["good"]
    assert [place for place, _ in bad] == [f"{path}:{name}" for name in "abcd"]


# --- json


def test_a_json_file_is_a_list_of_records_or_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.json", [{"text": "one", "page": 1}, ["two"], {"text": "three"}])
    documents, ((place, _),) = read(path)
    assert documents[0] == Chunk("one", id=f"{path}:1", metadata={"page": 1})
    assert [documents[1].id, place] == [f"{path}:3", f"{path}:2"]
    assert read(saved(tmp_path / "b.json", {"text": "one"}))[0][0].text == "one"


@pytest.mark.parametrize("content", ["{}", "5", '{"a": {"text": "b"}}', "[", '"\\ud800"', "\xff"])
def test_any_other_json_file_is_reported(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="latin-1")
    documents, bad = read(path)
    assert documents == []
    assert [place for place, _ in bad] == [str(path)]


# --- Parquet


def table(path: Path, *rows: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, **options)
    return path


def test_a_parquet_row_is_a_document_and_its_other_columns_are_metadata(tmp_path: Path) -> None:
    path = table(
        tmp_path / "a.parquet",
        {
            "text": "Owls hear.",
            "id": 7,
            "title": "Owls",
            "page": 3,
            "metadata": {"lang": "en"},
            "day": datetime.date(1931, 5, 1),
            "price": decimal.Decimal("1.50"),
            "tags": ["a", "b"],
            "blob": b"\x00",
        },
        {"text": "Copper conducts.", "id": None, "title": None},
    )
    first, second = read(path)[0]
    assert (first.text, first.id, first.title) == ("Owls hear.", "7", "Owls")
    assert first.metadata == {
        "page": 3, "lang": "en", "day": "1931-05-01", "price": "1.50", "tags": ["a", "b"],
        "blob": None,
    }  # fmt: skip
    assert json.loads(json.dumps(first.metadata)) == first.metadata
    assert (second.text, second.id, second.title) == ("Copper conducts.", f"{path}:2", None)


def test_texts_and_ids_of_bytes_are_read_and_a_uuid_is_its_digits(tmp_path: Path) -> None:
    path = table(
        tmp_path / "a.parquet",
        {"text": "Owls hear\u2026".encode(), "id": b"doc-1", "title": b"Owls"},
        {"text": b"Copper.", "id": bytes(range(16)), "title": None},
        {"text": b"caf\xe9", "id": b"\xff", "title": None},
    )
    documents, ((place, why),) = read(path)
    assert documents == [
        Chunk("Owls hear\u2026", id="doc-1", title="Owls"),
        Chunk("Copper.", id="000102030405060708090a0b0c0d0e0f"),
    ]
    assert place == f"{path}:3"
    assert '"text" must be text' in why and "cast the column to string" in why


def test_numbers_that_pandas_made_floats_are_what_they_were(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "id": 1.0, "title": float("nan")},
        {"text": "b", "id": None, "title": 2.5},
    ]
    path = table(tmp_path / "a.parquet", *rows)
    assert read(path) == ([Chunk("a", id="1"), Chunk("b", id=f"{path}:2", title="2.5")], [])


def test_a_row_that_is_too_long_is_left_out_with_its_place(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"text": "one"}, {"text": "x" * 1001}, {"text": "three"})
    bad: Bad = []
    found = read_documents([path], on_bad=lambda *what: bad.append(what), max_document_bytes=1000)
    assert [document.text for document in found] == ["one", "three"]
    assert [(place, "at most 1,000 bytes" in why) for place, why in bad] == [(f"{path}:2", True)]


def test_row_groups_are_read_as_they_are_needed(tmp_path: Path) -> None:
    path = table(
        tmp_path / "a.parquet", *({"text": f"Text {n}."} for n in range(5000)), row_group_size=100
    )
    documents = read_documents([path])
    assert next(documents).text == "Text 0."
    assert [document.id for document in documents][-1] == f"{path}:5000"


def test_bad_rows_and_files_are_reported_with_their_places(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"text": "one"}, {"text": None}, {"text": "three"})
    documents, ((place, why),) = read(path)
    assert [document.text for document in documents] == ["one", "three"]
    assert (place, '"text"' in why) == (f"{path}:2", True)
    other = table(tmp_path / "b.parquet", {"body": "one", "id": "x"})
    assert read(other) == ([], [(str(other), 'there must be a column "text", there are: body, id')])
    (tmp_path / "c.parquet").write_bytes(path.read_bytes()[:-20])
    documents, ((place, why),) = read(tmp_path / "c.parquet")
    assert (documents, place) == ([], str(tmp_path / "c.parquet"))
    assert "Parquet that can be read" in why


def test_without_pyarrow_the_command_that_helps_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "a.parquet", {"text": "one"})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"a\.parquet needs .* pip install 'sac-rag\[parquet\]'"):
        read_documents([tmp_path])
    assert path.exists()


def test_reading_exports_imports_no_framework_and_no_pyarrow() -> None:
    code = (
        "import sys, sac_rag.retrieval.readers; print(sorted("
        "{'langchain_core', 'llama_index', 'pyarrow', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
