"""Records to documents; jsonl, a record per line."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from sac_rag.chunk import Chunk
from sac_rag.retrieval.readers import langchain, llama_index
from sac_rag.retrieval.readers.content import not_utf8, other_encoding

# The id of a document that has none, of its place and its text.
IdOf: TypeAlias = Callable[[str, str], str]


def place_as_id(place: str, text: str) -> str:
    """The place itself."""
    return place


def text_as_id(place: str, text: str) -> str:
    """A digest of the text, for documents whose place is no name, as those of standard input."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return f"stdin-{digest.hexdigest()}"


def read_jsonl(
    lines: Iterable[bytes | None],
    name: str,
    on_bad: Callable[[str, str], None],
    *,
    too_long: str,
    id_of: IdOf = place_as_id,
) -> Iterator[Chunk]:
    """A document per line that is not blank; see `read_documents`.

    Args:
        lines: None stands for one that is too long.
        name: The file's path; a record's place is the path and its line.
        on_bad: As for `read_documents`.
        too_long: What is wrong with a line that is.
        id_of: Makes the id of a record that has none.
    """
    for number, line in enumerate(lines, 1):
        place = f"{name}:{number}"
        if line is None:
            on_bad(place, too_long)
        elif number == 1 and (problem := other_encoding(line)) is not None:
            on_bad(name, f"a text {problem}")
            return
        elif line.strip():
            try:
                record = parse_json(line.removeprefix(codecs.BOM_UTF8))
                document = to_document(record, place, id_of)
            except ValueError as error:
                on_bad(place, str(error))
            else:
                yield document


def parse_json(data: bytes) -> Any:
    """JSON to a value.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return json.loads(data.decode())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"a record must be JSON, but: {error.msg}, line {error.lineno}, column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"a record {not_utf8(data, error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a record must be JSON that can be read, but: {error}") from None


def to_document(record: Any, place: str, id_of: IdOf = place_as_id) -> Chunk:
    """The document of a record: a plain one, or one that LangChain or LlamaIndex serialised.

    Args:
        record: A JSON value.
        place: Where it is.
        id_of: Makes the id of a record that has none.

    Raises:
        ValueError: if it is not a document, with the reason.
    """
    if not isinstance(record, dict):
        raise ValueError(f'a record must be an object, {{"text": …}}, was: {record!r:.80}')
    if langchain.is_document(record):
        record = langchain.plain_record(record)
    elif llama_index.is_node(record):
        record = llama_index.plain_record(record)
    record = dict(record)
    text = _take(record, "text", str)
    if text is None:
        raise ValueError(f'a record must have a "text", has: {", ".join(record) or "nothing"}')
    name, title = _take_id(record), _take_title(record)
    metadata = _take(record, "metadata", dict) or {}
    return checked(
        Chunk(
            text=text,
            id=id_of(place, text) if name is None else name,
            title=title,
            metadata={**record, **metadata},
        )
    )


def checked(document: Chunk) -> Chunk:
    """The document itself.

    Raises:
        ValueError: if it is not valid Unicode, which tokenizers refuse.
    """
    for part in (document.text, document.id or "", document.title or ""):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            # Half a surrogate pair, from a JSON escape or an old file name.
            raise ValueError(f"text, id and title must be valid Unicode, but: {error}") from None
    return document


def _take_id(record: dict[str, Any]) -> str | None:
    """Removes a record's id: text, or a number without a fraction; "" and NaN count as absent."""
    value = record.pop("id", None)
    if _is_missing(value) or value == "":
        return None
    # Above 2**53 several whole numbers are one float.
    is_rounded = isinstance(value, float) and not (value.is_integer() and abs(value) < 2**53)
    name = None if is_rounded else _as_name(value)
    if name is None:
        raise ValueError(
            f'"id" must be text or a whole number, was: {value!r:.80}; write it as text'
        )
    return name


def _take_title(record: dict[str, Any]) -> str | None:
    """Removes a record's title: text or a number; anything else is no title and stays metadata."""
    title = _as_name(record.get("title"))
    if title is not None or _is_missing(record.get("title")):
        record.pop("title", None)
    return title


def _as_name(value: object) -> str | None:
    """Text or a number as text; pandas makes 2001.0 of 2001 where others of a column are absent."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or _is_missing(value):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _take(record: dict[str, Any], key: str, *kinds: type) -> Any:
    """Removes a value from a record; null counts as absent."""
    value = record.pop(key, None)
    if value is not None and type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f'"{key}" must be {expected}, was: {value!r:.80}')
    return value
