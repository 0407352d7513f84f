"""What is claimed of corpus.py: every document is read or reported, every word is in one piece."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sac_rag.chunk import Chunk
from sac_rag.lm.text_tokenizer import TextTokenizer
from sac_rag.retrieval import splitter
from sac_rag.retrieval.readers import read_documents
from sac_rag.retrieval.readers.files import left_out
from sac_rag.retrieval.splitter import sentences, split


def read(*paths: str | Path) -> list[Chunk]:
    return list(read_documents(paths))


def read_with_bad(*paths: str | Path) -> tuple[list[Chunk], list[tuple[str, str]]]:
    bad: list[tuple[str, str]] = []
    documents = list(read_documents(paths, on_bad=lambda place, why: bad.append((place, why))))
    return documents, bad


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["notes/owls.txt", "notes/owls.txt.gz", "notes/owls.TXT"])
def test_a_text_file_is_named_by_its_path_and_titled_by_its_stem(
    in_folder: Path, name: str
) -> None:
    write(Path(name), "Owls hear mice.\nUnder snow.")
    assert read(name) == [Chunk("Owls hear mice.\nUnder snow.", id=name, title="owls")]


@pytest.mark.parametrize(
    ("content", "title"),
    [
        ("# On owls\n\nThey hear.", "On owls"),
        ("\n\n### On owls ###\r\nThey hear.", "On owls"),
        ("# On C#\n", "On C#"),
        ("They hear.\n# Later\n", "file.v2"),
        ("#hashtag\n", "file.v2"),
        ("#\nThey hear", "file.v2"),
        ("", "file.v2"),
    ],
)
def test_a_markdown_file_is_titled_by_a_heading_only_if_it_starts_with_one(
    tmp_path: Path, content: str, title: str
) -> None:
    (document,) = read(write(tmp_path / "file.v2.md", content))
    assert document.title == title
    assert document.text == content.replace("\r\n", "\n")


def test_a_byte_order_mark_and_foreign_line_ends_are_no_part_of_the_text(tmp_path: Path) -> None:
    (document,) = read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree"))
    assert document.text == "one\ntwo\nthree"
    (document,) = read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n'))
    assert document.text == "one"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_jsonl_file_is_one_document_a_line(in_folder: Path, name: str) -> None:
    lines = [
        '{"text": "zero", "id": "z", "title": "Zero", "metadata": {"page": 1}, "lang": "en"}',
        "",
        '{"text": "two", "id": null, "title": null, "metadata": null}',
        '{"text": "three", "id": 3}',
    ]
    write(Path(name), "\n".join(lines))
    assert read(name) == [
        Chunk("zero", id="z", title="Zero", metadata={"page": 1, "lang": "en"}),
        Chunk("two", id=f"{name}:3"),
        Chunk("three", id="3"),
    ]


def test_line_separators_inside_a_record_do_not_end_its_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0cfour"
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert [document.text for document in read(path)] == [text]


BAD_RECORDS = {
    b"{'text': 'a'}": "JSON",
    b'{"text": "a"': "JSON",
    b'["a"]': "object",
    b'{"title": "a"}': '"text"',
    b'{"text": null}': '"text"',
    b'{"text": 5}': '"text"',
    b'{"text": "a", "id": 1.5}': '"id" must be text or a whole number, was: 1.5; write it as text',
    b'{"text": "a", "id": 1e300}': '"id"',
    b'{"text": "a", "id": {"$oid": "5f"}}': '"id"',
    b'{"text": "a", "id": true}': '"id"',
    b'{"text": "a", "metadata": []}': '"metadata"',
    b'{"text": "a\xff"}': "iconv -f CP1252 -t UTF-8",
    b'{"text": "\\ud800"}': "Unicode",
    b'{"text": "a", "title": "\\ud800"}': "Unicode",
    b"[" * 100_000: "JSON",
    b'{"text": "a", "n": ' + b"1" * 10_000 + b"}": "JSON",
}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("1.0", "1"),
        ("9007199254740993", "9007199254740993"),
        ('"1.0"', "1.0"),
        ("NaN", None),
        ("null", None),
        ('""', None),
    ],
)
def test_an_id_is_text_or_a_whole_number(tmp_path: Path, given: str, name: str | None) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "a", "id": {given}}}')
    assert [document.id for document in read(path)] == [name or f"{path}:1"]


@pytest.mark.parametrize(
    ("given", "title", "metadata"),
    [
        ("2001", "2001", {}),
        ("2001.0", "2001", {}),
        ("2.5", "2.5", {}),
        ("NaN", None, {}),
        ("true", None, {"title": True}),
        ('["a", "b"]', None, {"title": ["a", "b"]}),
    ],
)
def test_no_title_loses_its_document(
    tmp_path: Path, given: str, title: str | None, metadata: dict[str, Any]
) -> None:
    (document,) = read(write(tmp_path / "a.jsonl", f'{{"text": "a", "title": {given}}}'))
    assert (document.title, document.metadata) == (title, metadata)


@pytest.mark.parametrize("record", BAD_RECORDS, ids=lambda record: record[:30].decode("latin-1"))
def test_a_bad_record_is_reported_with_its_place_and_skipped(tmp_path: Path, record: bytes) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + record + b'\n{"text": "three"}\n')
    documents, bad = read_with_bad(path)
    assert [document.text for document in documents] == ["one", "three"]
    ((place, why),) = bad
    assert place == f"{path.as_posix()}:2"
    assert BAD_RECORDS[record] in why
    with pytest.raises(ValueError, match=r"a\.jsonl:2: "):
        read(path)


def test_a_text_that_is_not_utf8_is_reported_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\ntwo\ncaf\xe9\n")
    documents, bad = read_with_bad(path, write(tmp_path / "b.txt", "good"))
    assert [document.text for document in documents] == ["good"]
    assert [place for place, _ in bad] == [f"{path.as_posix()}:3"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no gzip", "empty"])
def test_a_damaged_gzip_file_is_reported_and_the_next_file_read(
    tmp_path: Path, damage: str
) -> None:
    path = write(tmp_path / "a.txt.gz", "".join(f"line {i} of the text\n" for i in range(1000)))
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    path.write_bytes(
        {"truncated": data[:-20], "flipped": bytes(flipped), "no gzip": b"a", "empty": data[:5]}[
            damage
        ]
    )
    documents, bad = read_with_bad(path, write(tmp_path / "b.txt", "good"))
    assert [document.text for document in documents] == ["good"]
    assert [place for place, _ in bad] == [path.as_posix()]


def test_what_was_whole_in_a_truncated_jsonl_gz_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", "".join(f'{{"text": "{i**9}"}}\n' for i in range(50_000)))
    path.write_bytes(path.read_bytes()[:-1000])
    documents, bad = read_with_bad(path)
    assert len(documents) > 1000
    assert documents[1000].text == str(1000**9)
    assert bad[-1][0] == path.as_posix()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json", "a.txt.gz"])
def test_a_file_of_another_encoding_is_reported_once_with_the_command_that_converts_it(
    tmp_path: Path, name: str, encoding: str
) -> None:
    text = '{"text": "café", "id": "a"}\n' * 2
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = write(tmp_path / name, (mark + text).encode(encoding))
    documents, bad = read_with_bad(path)
    assert documents == []
    asked = {"utf-16-be": "UTF-16"}.get(encoding, encoding.upper())
    assert {f"iconv -f {asked} -t UTF-8 OLD > NEW" in why for _, why in bad} == {True}
    assert len(bad) == (2 if (encoding, name) == ("cp1252", "a.jsonl") else 1)  # lines are records


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_line_that_is_too_long_is_left_out_and_the_others_are_read(
    tmp_path: Path, ending: str
) -> None:
    lines = [json.dumps({"text": text}) for text in ("one", "x" * 10_000, "three", "y" * 9_000)]
    path = write(tmp_path / f"a.jsonl{ending}", "\n".join(lines))
    bad: list[tuple[str, str]] = []
    found = read_documents(
        [path], on_bad=lambda *what: bad.append(what), max_document_bytes=len(lines[2]) + 1
    )
    assert [(document.text, document.id) for document in found] == [
        ("one", f"{path}:1"),
        ("three", f"{path}:3"),
    ]
    assert [place for place, _ in bad] == [f"{path}:2", f"{path}:4"]
    assert all(f"at most {len(lines[2]) + 1} bytes" in why and "split" in why for _, why in bad)


@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.json", "a.json.gz", "-"])
def test_a_file_that_is_too_long_is_left_out_with_its_place(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.dumps([{"text": "word " * 20}] * 16)
    path = write(tmp_path / name, content) if name != "-" else Path("-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    limit = len(content) // 16 if ".json" in name else len(content)  # of one document
    bad: list[tuple[str, str]] = []

    def read_up_to(most: int) -> list[Chunk]:
        sys.stdin.seek(0)
        on_bad = lambda *what: bad.append(what)  # noqa: E731
        return list(read_documents([path], on_bad=on_bad, max_document_bytes=most))

    assert read_up_to(limit - 1) == []
    ((place, why),) = bad
    assert place == str(path)
    assert "bytes, unpacked" in why
    assert len(read_up_to(limit + 1)) == (16 if ".json" in name else 1)


def test_what_is_left_out_is_never_all_in_memory(tmp_path: Path) -> None:
    bomb = tmp_path / "a.txt.gz"
    line = tmp_path / "a.jsonl"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(bytes(2**20))
    with line.open("wb") as plain:
        plain.truncate(400 * 2**20)  # sparse: no line ends
        plain.seek(0, os.SEEK_END)
        plain.write(b'\n{"text": "last"}\n')
    code = (
        "import resource, sys\n"
        "from sac_rag.retrieval.readers import read_documents\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used()\n"
        "found = list(read_documents(sys.argv[1:], on_bad=lambda *what: None))\n"
        "print([document.text for document in found], (used() - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bomb), str(line)],
        capture_output=True,
        text=True,
        check=True,
    )
    found, mebibytes = done.stdout.rsplit(" ", 1)
    assert found == "['last']"
    assert int(mebibytes) < 100


def test_files_that_are_not_read_are_counted_by_their_endings(in_folder: Path) -> None:
    for name in ("d/a.pdf", "d/b.PDF", "d/x/c.csv", "d/.hidden.doc", "d/README", "d/.git/x.bin"):
        write(Path(name), "x")
    assert left_out(["d", "-"]) == {".pdf": 2, ".csv": 1, "without an ending": 1}
    complaint = r"must be a file to read.*in 'd' there are: 2 \.pdf, 1 \.csv, 1 without an ending"
    with pytest.raises(ValueError, match=complaint):
        read_documents(["d"])
    write(Path("d/t.txt"), "text")
    assert [document.id for document in read("d")] == ["d/t.txt"]
    (in_folder / "empty").mkdir()
    with pytest.raises(ValueError, match="in 'empty' there are: none"):
        read_documents(["empty"])


def test_a_file_that_is_named_twice_is_read_once(in_folder: Path) -> None:
    for name in ("d/k.txt", "d/l.txt"):
        write(Path(name), name)
    paths = ("d/l.txt", "d", in_folder / "d", "./d/k.txt", in_folder / "d" / "k.txt")
    assert [document.id for document in read(*paths)] == ["d/l.txt", "d/k.txt"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "secret").chmod(0)
    write(tmp_path / "b.txt", "good")
    documents, bad = read_with_bad(tmp_path)
    assert [document.text for document in documents] == ["good"]
    assert [place for place, _ in bad] == [str(tmp_path / "a.txt")]


def test_a_folder_is_read_in_sorted_order_without_hidden_and_other_files(in_folder: Path) -> None:
    for name in ("d/b.txt", "d/a/z.md", "d/a.jsonl", "d/.hidden.txt", "d/.git/x.txt", "d/p.pdf"):
        write(Path(name), '{"text": "x"}')
    (in_folder / "d/folder.txt").mkdir()
    (in_folder / "d/dangling.txt").symlink_to(in_folder / "nowhere")
    os.mkfifo(in_folder / "d/pipe.txt")
    assert [document.id for document in read("d")] == ["d/a/z.md", "d/a.jsonl:1", "d/b.txt"]
    assert [document.id for document in read(in_folder / "d/a")] == [f"{in_folder}/d/a/z.md"]


def test_a_link_to_a_folder_is_not_followed_unless_it_is_named(in_folder: Path) -> None:
    write(Path("outside/secret.txt"), "secret")
    write(Path("d/a.txt"), "a")
    (in_folder / "d/out").symlink_to(in_folder / "outside")
    (in_folder / "d/loop").symlink_to(in_folder / "d")
    assert [document.id for document in read("d")] == ["d/a.txt"]
    assert [document.id for document in read("d/out")] == ["d/out/secret.txt"]


def test_a_hidden_file_is_read_if_it_is_named(in_folder: Path) -> None:
    write(Path(".a.txt"), "a")
    assert [document.title for document in read(".a.txt")] == [".a"]


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.txt.zip", ".txt", "a.gz"])
def test_a_named_file_of_another_kind_is_refused_before_anything_is_read(
    tmp_path: Path, name: str
) -> None:
    good = write(tmp_path / "good.txt", "good")
    other = write(tmp_path / name, "x")
    with pytest.raises(ValueError, match=r"must end in \.txt"):
        read_documents([good, other])


@pytest.mark.parametrize("name", ["nowhere.txt", ""])
def test_a_missing_path_is_refused_before_anything_is_read(in_folder: Path, name: str) -> None:
    good = write(in_folder / "good.txt", "good")
    with pytest.raises(FileNotFoundError, match=f"'{name}'"):
        read_documents([good, name])


def test_one_path_in_place_of_several_is_refused() -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        read_documents("a.txt")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have Unicode file names only")
def test_a_file_whose_name_is_not_unicode_is_reported(in_folder: Path) -> None:
    write(Path(os.fsdecode(b"d/caf\xe9.txt")), "a")
    write(Path("d/z.txt"), "z")
    documents, bad = read_with_bad("d")
    assert [document.id for document in documents] == ["d/z.txt"]
    assert len(bad) == 1
    assert "Unicode" in bad[0][1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b", "id": "x"}\n', ["a", "b"]),
        (b' {"text": "a"}', ["a"]),
        (b"{not json}\nb", ["{not json}\nb"]),
        (b"[1]\nb", ["[1]\nb"]),
        (b"plain\n{}", ["plain\n{}"]),
    ],
)
def test_standard_input_is_jsonl_if_its_first_line_is(
    monkeypatch: pytest.MonkeyPatch, given: bytes, expected: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert [document.text for document in read("-")] == expected


def test_documents_of_standard_input_are_named_by_their_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = []
    for content in (b"one", b"two", b"one", b'{"text": "one"}\n{"text": "two", "id": "-:2"}\n{'):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        documents, bad = read_with_bad("-")
        names += [document.id for document in documents]
    one, two, again, of_record, own = names
    assert (one, two) == ("stdin-" + digest_of("one"), "stdin-" + digest_of("two"))
    assert (again, of_record, own) == (one, one, "-:2")
    assert [place for place, _ in bad] == ["-:3"]  # where it is, for who looks for it


def digest_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def texts(text: str, tokenizer: Any, max_tokens: int) -> list[str]:
    return [piece.text for piece in split(Chunk(text), tokenizer, max_tokens=max_tokens)]


def words(*sentences: str) -> str:
    return "".join("".join(sentences).split())


def lowercasing_wordpiece() -> PreTrainedTokenizerFast:
    """Unlike byte-level BPE: takes accents and control characters away and has unknown words."""
    vocabulary = {"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, ".": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


WORDPIECE = lowercasing_wordpiece()

FRAGMENTS = st.sampled_from(
    [
        "The cat sat. ",
        "Dr. Who? ",
        "\n\n",
        "\n",
        "  ",
        "<|im_end|>",
        "....",
        "。",
        "é",
        "e\u0301",
        "👩‍👩‍👧",
        "🇩🇪",
    ]
)
ANY_TEXT = st.one_of(st.text(), st.lists(FRAGMENTS | st.text(max_size=5), max_size=40).map("".join))


@settings(deadline=None, max_examples=300)
@example("\u0301" * 50, 4)
@example("🇩🇪" * 50, 8)
@example("." * 100 + "x", 4)
@given(text=ANY_TEXT, max_tokens=st.integers(4, 40))
def test_pieces_keep_within_the_limit_lose_nothing_and_stay_in_order(
    tokenizer: Any, text: str, max_tokens: int
) -> None:
    pieces = texts(text, tokenizer, max_tokens)
    assert all(1 <= count(tokenizer, piece) <= max_tokens for piece in pieces)
    assert all(piece == piece.strip() != "" for piece in pieces)
    position = 0
    for piece in pieces:
        found = text.index(piece, position)
        assert text[position:found].strip() == ""
        position = found + len(piece)
    assert text[position:].strip() == ""


@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT, max_tokens=st.integers(1, 20))
def test_so_they_do_with_a_tokenizer_that_changes_the_text(text: str, max_tokens: int) -> None:
    pieces = texts(text, WORDPIECE, max_tokens)
    assert all(count(WORDPIECE, piece) <= max_tokens for piece in pieces)
    assert words(*pieces) == words(text)


SENTENCES = st.lists(
    st.lists(st.sampled_from(["the", "cat", "counted", "été", "7"]), min_size=1, max_size=12).map(
        lambda words: " ".join(["The", *words]) + "."
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=200)
@given(sentences=SENTENCES, max_tokens=st.integers(4, 60), gap=st.sampled_from([" ", "\n", "\n\n"]))
def test_a_sentence_that_fits_is_never_cut(
    tokenizer: Any, sentences: list[str], max_tokens: int, gap: str
) -> None:
    pieces = texts(gap.join(sentences), tokenizer, max_tokens)
    for sentence in sentences:
        if count(tokenizer, sentence) <= max_tokens:
            assert any(sentence in piece for piece in pieces)


def test_a_piece_takes_as_many_sentences_as_fit(tokenizer: Any) -> None:
    sentences = [f"Ship {i} came in from the west." for i in range(30)]
    limit = count(tokenizer, " ".join(sentences[:7]))
    pieces = texts(" ".join(sentences), tokenizer, limit)
    assert pieces[0] == " ".join(sentences[:7])


def test_a_paragraph_end_is_preferred_once_the_piece_is_half_full(tokenizer: Any) -> None:
    first, second = "Ship 1 came. Ship 2 came in.", "Ship 3 came. Ship 4."
    both = f"{first}\n\n{second}"
    assert texts(both, tokenizer, count(tokenizer, both) - 1) == [first, second]
    under_heading = f"Ships\n\n{first}"
    pieces = texts(under_heading, tokenizer, count(tokenizer, under_heading) - 1)
    assert pieces == ["Ships\n\nShip 1 came.", "Ship 2 came in."]


def test_a_sentence_that_fits_only_alone_is_not_cut() -> None:
    vocabulary = {"x": 0, "y": 1, "。": 2, "z": 3, "。z": 4, "y。": 5}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("。", "z"), ("y", "。")]))
    )
    assert tokenizer.tokenize("xy。z") == ["x", "y", "。z"]
    assert tokenizer.tokenize("xy。") == ["x", "y。"]
    assert texts("xy。z", tokenizer, 2) == ["xy。", "z"]


def test_a_sentence_that_does_not_fit_is_cut_at_spaces(tokenizer: Any) -> None:
    sentence = " ".join(f"Ship{i}" for i in range(100))
    pieces = texts(f"Short one. {sentence}. Another one.", tokenizer, 20)
    assert pieces[0] == "Short one."
    assert " ".join(pieces).split() == f"Short one. {sentence}. Another one.".split()


def test_sentences_end_at_full_stops_and_paragraphs_but_not_at_initials() -> None:
    text = "Dr. J. Smith came. She saw 3.5 owls!\n\nA heading\n\nDone? \u96ea\u3002\u9ed2"
    expected = [
        "Dr. J. Smith came.",
        "She saw 3.5 owls!",
        "A heading",
        "Done?",
        "\u96ea\u3002",
        "\u9ed2",
    ]
    assert sentences(text) == expected
    assert sentences(" \n\n ") == []


def test_a_list_without_full_stops_is_cut_at_lines(tokenizer: Any) -> None:
    lines = [f"- copper and silver and iron {i}" for i in range(40)]
    pieces = texts("\n".join(lines), tokenizer, 60)
    assert "\n".join(pieces).split("\n") == lines


@pytest.mark.parametrize(
    "one", ["e\u0301", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "❤\ufe0f", "क्षि", "\u1112\u1161\u11ab"]
)
def test_an_unbroken_text_is_cut_between_characters_as_readers_see_them(
    tokenizer: Any, one: str
) -> None:
    size = count(tokenizer, one)
    # Room for all but the last token of a fourth.
    pieces = texts(one * 300, tokenizer, 4 * size - 1)
    assert len(pieces) >= 75
    assert all(piece == one * (len(piece) // len(one)) for piece in pieces)


def test_a_word_of_ten_thousand_characters_is_cut(tokenizer: Any) -> None:
    word = "abcdefghij" * 1000
    pieces = texts(word, tokenizer, 256)
    assert "".join(pieces) == word
    assert max(count(tokenizer, piece) for piece in pieces) <= 256
    assert len(pieces) <= count(tokenizer, word) // 250 + 1


def test_a_character_that_cannot_fit_is_refused_with_what_it_takes(tokenizer: Any) -> None:
    assert count(tokenizer, "👍") == 4
    with pytest.raises(ValueError, match=r"must be at least 4.*'👍', was: 3"):
        texts("Good 👍", tokenizer, 3)
    assert texts("Good 👍", tokenizer, 4)[-1] == "👍"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("He wrote.", " J. R. R. Tolkien did."),
        ("He paid.", " Dr. Who paid 3.50 in the U.S. Army."),
        ("It melts.", " Some, e.g. Copper, melt, cf. Fig. 3 there."),
        ('"Who?" he asked.', ' "I!" she said.'),
        ("(Nobody.)", " Fine."),
        ('"I!"', " Fine."),
        ("**Now.**", " Fine."),
        ("It was in 1990.", " Then... what came, came."),
        ("So it is…", " What?! no more."),
        ("Do:", "\n\n1. Copper\n2. Iron"),
        ("A heading", "\n \nA text"),
        ("猫が座った。", "「犬も座った」"),
        ("「はい。」", "犬\uff01"),
        ("هل هذا؟", " نعم"),
        ("نعم\u06d4", " هل هذا"),
        ("यह है।", " वह था॥"),
        ("वह था॥", "यह है"),
    ],
)
def test_sentences_end_where_common_sense_says(tokenizer: Any, first: str, then: str) -> None:
    # All but the last token would fit, so every end of a sentence seen in `then` would be taken.
    limit = count(tokenizer, first + then) - 1
    assert texts(first + then, tokenizer, limit)[0] == first


def test_each_piece_carries_its_documents_name_and_its_own_number(tokenizer: Any) -> None:
    document = Chunk("One. Two. Three.", id="d", title="T", metadata={"lang": "en"})
    pieces = split(document, tokenizer, max_tokens=4)
    assert pieces == [
        Chunk(text, "d", "T", {"lang": "en", "part": part, "parts": len(pieces)})
        for part, text in enumerate((piece.text for piece in pieces), 1)
    ]
    assert len(pieces) >= 3
    assert document.metadata == {"lang": "en"}
    own = {"part": "second", "parts": 9, "id": "x", "node_id": "n"}
    assert all(
        piece.metadata == own
        for piece in split(Chunk("One. Two.", "d", None, own), tokenizer, max_tokens=4)
    )


def test_a_document_that_fits_stays_one_piece_without_the_white_space_around_it(
    tokenizer: Any,
) -> None:
    document = Chunk(" One.\n\nTwo.\n", id="d", title="T", metadata={"lang": "en"})
    assert split(document, tokenizer) == [Chunk("One.\n\nTwo.", "d", "T", {"lang": "en"})]


@pytest.mark.parametrize("text", ["", " \n\t\u3000\u2028"])
def test_a_document_of_white_space_has_no_pieces(tokenizer: Any, text: str) -> None:
    assert split(Chunk(text), tokenizer) == []


def test_special_tokens_in_the_text_count_as_the_characters_they_are(tokenizer: Any) -> None:
    marker = "<|im_end|>"
    as_text = tokenizer(marker, add_special_tokens=False, split_special_tokens=True).input_ids
    assert len(as_text) > 1
    pieces = texts(" ".join([marker] * 10), tokenizer, len(as_text))
    assert pieces == [marker] * 10


def test_a_limit_below_one_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 1, was: 0"):
        split(Chunk("a"), tokenizer, max_tokens=0)


def test_a_tokenizer_that_cannot_say_where_its_tokens_are_is_refused() -> None:
    with pytest.raises(TypeError, match="fast HF tokenizer"):
        split(Chunk("a"), str.split)


class CountsCharacters(TextTokenizer):
    """Records how much text it was given."""

    seen = 0

    def ids(self, text: str) -> list[int]:
        self.seen += len(text)
        return super().ids(text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        self.seen += len(text)
        return super().offsets(text)


@pytest.mark.parametrize(
    "text",
    [
        "The cat sat on the mat. It sat there.\n\n" * 10_000,
        "cat " * 50_000,
        "x" * 200_000,
        "." * 200_000,
        "x" + " " * 200_000 + "x",
    ],
    ids=["prose", "one sentence", "one word", "dots", "spaces"],
)
def test_the_work_grows_with_the_text_and_no_faster(
    tokenizer: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = CountsCharacters(tokenizer, control=False)
    monkeypatch.setattr(splitter, "ordinary_tokenizer", lambda tokenizer: recorder)
    split(Chunk(text), tokenizer, max_tokens=256)
    # Once to see where the tokens are, once to check each piece, and some of it cut again.
    assert recorder.seen < 4 * len(text)


def test_reading_files_loads_no_torch() -> None:
    modules = "sac_rag.retrieval.readers, sac_rag.retrieval.splitter"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
