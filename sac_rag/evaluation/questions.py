"""Questions with their answers and gold passages, and readers of their files."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
import string
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sac_rag.chunk import Chunk

T = TypeVar("T")
OnBad: TypeAlias = Callable[[str, str], None]
Layout: TypeAlias = Callable[[Any, str, OnBad], Iterator["QAExample"]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """A question with all accepted answers.

    Attributes:
        id: That in the data, else the place it was read from.
        text: The question.
        answers: All gold answers, in the data's order, without duplicates.
    """

    id: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QAExample:
    """Questions that share their gold passages.

    Attributes:
        gold: The passages that answer.
        questions: At least one.
        distractors: The record's own passages that do not answer.
        article: Examples of one article are each other's hard distractors.
    """

    gold: tuple[Chunk, ...]
    questions: tuple[Question, ...]
    distractors: tuple[Chunk, ...] = ()
    article: str | None = None


def normalised(text: str) -> str:
    """A text as SQuAD compares answers: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def says(text: str, answers: Iterable[str]) -> bool:
    """Whether a normalised text contains one of some answers, as whole words.

    Args:
        text: Normalised by the caller, since it may be searched often.
        answers: Not normalised. One that normalises to nothing is contained in no text.
    """
    return any(answer and f" {answer} " in f" {text} " for answer in map(normalised, answers))


def read_questions(
    paths: Iterable[str | Path], *, on_bad: OnBad | None = None
) -> Iterator[QAExample]:
    """Reads question-answering data, its layout recognised by its content, gzipped (.gz) or not.

    SQuAD, one JSON document, an example per paragraph; questions without answers are left out:
    `{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers":
    [{"text"}]}]}]}]}`. MRQA, JSONL, an example per line, a `{"header": …}` allowed first:
    `{"context", "qas": [{"qid", "question", "answers": [str]}]}`. And JSONL with passages:
    `{"question", "answers": [str], "ctxs": [{"title", "text", "gold": bool}]}`, where, if no
    passage has a "gold" (or "isgold"), those that contain an answer are gold.

    Args:
        paths: Files.
        on_bad: Called with the place and the problem of each record or question that is left
            out. Default: raise ValueError at the first.

    Returns:
        The examples; JSONL is read line by line as they are consumed.

    Raises:
        FileNotFoundError: at once, if a file does not exist.
        TypeError: at once, if `paths` is one path.
        ValueError: when a file is reached that is empty, of an unknown layout or truncated.
    """
    if isinstance(paths, str | Path):
        raise TypeError(f"paths must be several paths, was one: {paths!r}; put it in a list")
    files = [Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"question data must be a file that exists, was: '{file}'")
    return chain.from_iterable(_examples(file, on_bad or _refuse) for file in files)


def hold_out(
    examples: Sequence[QAExample], share: float
) -> tuple[list[QAExample], list[QAExample]]:
    """Splits the examples of a file by articles, as training does: the last ones are held out.

    Args:
        examples: In the order of the file.
        share: Of the articles, from 0 to 1, rounded up to a whole number of them.

    Returns:
        The other examples, and those held out.
    """
    # Examples without an article each count as one.
    names = [example.article or f"example {i}" for i, example in enumerate(examples)]
    articles = list(dict.fromkeys(names))
    last = set(articles[len(articles) - math.ceil(share * len(articles)) :])
    pairs = list(zip(names, examples, strict=True))
    return (
        [example for name, example in pairs if name not in last],
        [example for name, example in pairs if name in last],
    )


def _refuse(place: str, message: str) -> None:
    raise ValueError(f"{place}: {message}")


def _examples(path: Path, on_bad: OnBad) -> Iterator[QAExample]:
    name = path.as_posix()
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            seen: list[bytes] = []
            layout = _layout(file, seen)
            lines = chain(seen, file)
            if layout is None:
                yield from _squad(_document(b"".join(lines), name), name, on_bad)
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _record(line, f"{name}:{number}", layout, on_bad)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name} must be whole gzip, but: {error}; get it again") from error


def _layout(file: Iterable[bytes], seen: list[bytes]) -> Layout | None:
    """The layout of a file's lines; None for a file that is one JSON document.

    Args:
        file: Its lines. Two that are not blank are read, since the first record may be bad.
        seen: Receives the lines that were read.
    """
    looked_at = 0
    for line in file:
        seen.append(line)
        if not line.strip():
            continue
        try:
            record = _parsed(line)
        except ValueError:
            record = {}
        for key, layout in _LAYOUTS.items():
            if key in record:
                return layout
        looked_at += 1
        if looked_at == 2:
            break
    return None


def _document(content: bytes, name: str) -> list[Any]:
    if not content.strip():
        raise ValueError(f"{name} must hold question data, was: empty")
    try:
        return _take(_parsed(content), "data", list)
    except ValueError as error:
        raise ValueError(
            f'{name} must be SQuAD JSON, {{"data": […]}}, or JSONL with "context" and "qas" or '
            f'with "question" and "ctxs" on each line, but as JSON: {error}'
        ) from error


def _squad(articles: list[Any], name: str, on_bad: OnBad) -> Iterator[QAExample]:
    for number, article in enumerate(articles):
        place = f"{name} data[{number}]"
        try:
            title = _title(article)
            paragraphs = _take(article, "paragraphs", list)
        except ValueError as error:
            on_bad(place, str(error))
            continue
        for index, paragraph in enumerate(paragraphs):
            yield from _paragraph(paragraph, f"{place}.paragraphs[{index}]", on_bad, title)


def _record(line: bytes, place: str, layout: Layout, on_bad: OnBad) -> Iterator[QAExample]:
    try:
        record = _parsed(line)
    except ValueError as error:
        on_bad(place, str(error))
        return
    if "header" not in record:
        yield from layout(record, place, on_bad)


def _paragraph(
    record: Any, place: str, on_bad: OnBad, article: str | None = None
) -> Iterator[QAExample]:
    """A context with its questions: a paragraph of SQuAD or a line of MRQA."""
    try:
        context, items = _words(record, "context"), _take(record, "qas", list)
    except ValueError as error:
        on_bad(place, str(error))
        return
    questions = []
    for number, item in enumerate(items):
        try:
            questions.append(_question(item, f"{place}.qas[{number}]"))
        except ValueError as error:
            on_bad(f"{place}.qas[{number}]", str(error))
    answerable = tuple(question for question in questions if question.answers)
    if answerable:
        title = article.replace("_", " ") if article else None
        yield QAExample((Chunk(context, id=article, title=title),), answerable, article=article)


def _with_passages(record: Any, place: str, on_bad: OnBad) -> Iterator[QAExample]:
    """A question with its passages."""
    try:
        question = _question(record, place)
        chunks, flags = [], []
        for item in _take(record, "ctxs", list):
            title = _title(item)
            chunks.append(Chunk(_words(item, "text"), id=title, title=title))
            flags.append(_flag(item))
        if not question.answers:
            return
        if not any(flag is not None for flag in flags):
            flags = [says(normalised(chunk.text), question.answers) for chunk in chunks]
        if not any(flags):
            raise ValueError('one of "ctxs" must be gold or contain an answer, none is or does')
    except ValueError as error:
        on_bad(place, str(error))
        return
    sides: tuple[list[Chunk], list[Chunk]] = ([], [])
    for chunk, flag in zip(chunks, flags, strict=True):
        sides[0 if flag else 1].append(chunk)
    yield QAExample(tuple(sides[0]), (question,), distractors=tuple(sides[1]))


def _question(item: Any, place: str) -> Question:
    """A question; without answers if the data marks it as impossible."""
    text, listed = _words(item, "question"), _take(item, "answers", list)
    if item.get("is_impossible") is True:
        listed = []
    answers = [
        _words(a, "text") if isinstance(a, dict) else _words({"answer": a}, "answer")
        for a in listed
    ]
    name = item.get("id", item.get("qid"))
    return Question(place if name is None else str(name), text, tuple(dict.fromkeys(answers)))


def _flag(passage: dict[str, Any]) -> bool | None:
    """Whether a passage is gold; None where the data does not say."""
    flag = passage.get("gold", passage.get("isgold"))
    if flag not in (None, True, False):
        raise ValueError(f'"gold" must be true or false, was: {flag!r:.80}')
    return None if flag is None else bool(flag)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.removeprefix(codecs.BOM_UTF8).decode())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"a record must be JSON, but: {error.msg}, line {error.lineno}, column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"a record must be UTF-8, but: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a record must be JSON that can be read, but: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"a record must be an object, was: {value!r:.80}")
    return value


def _take(record: Any, key: str, kind: type[T]) -> T:
    if not isinstance(record, dict):
        raise ValueError(f'an object with "{key}" was expected, was: {record!r:.80}')
    value = record.get(key)
    if not isinstance(value, kind):
        raise ValueError(f'"{key}" must be a {kind.__name__}, was: {value!r:.80}')
    return value


def _words(record: Any, key: str) -> str:
    text = _take(record, key, str)
    if not text.strip():
        raise ValueError(f'"{key}" must have text, was: {text!r:.80}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'"{key}" must be valid Unicode, but: {error}') from None
    return text


def _title(record: Any) -> str | None:
    """The title of an article or passage that has one."""
    if isinstance(record, dict) and not record.get("title"):
        return None
    return _words(record, "title")


_LAYOUTS: dict[str, Layout] = {
    "header": _paragraph,
    "context": _paragraph,
    "ctxs": _with_passages,
}
